"""The tokenizer from one layout to the other: `qwen.tiktoken` ↔ `tokenizer.json`.

Both hold the same ranks: one as bytes, the other as merges in GPT-2's spelling of bytes. What was
written is loaded again and must give the source's ids. Knows no weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from qwen.chat_format import TextTokenizer
from qwen.convert_config import EndTokens
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.tokenization_qwen import (
    ENDOFTEXT,
    IMEND,
    IMSTART,
    PAT_STR,
    PUBLISHED_SHA256,
    SPECIAL_TOKENS,
    QWenTokenizer,
    dump_ranks,
)
from qwen.tokenizer import QWEN_SYSTEM, build_text_tokenizer

#: ChatML as Qwen v1's `make_context` writes it, default system text included.
CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + QWEN_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Texts on which normalisation, splitting and merging show.
_SAMPLES = (
    "Hello, world! I'm here; they'LL see  two spaces\n\n\tand 12345 digits in x_1.",
    "你好，世界！今天是2023年9月。",
    "cafe\u0301 A\u030a \u1112\u1161\u11ab \ufb01 \u212b",  # NFC changes these
    "def f(x):\r\n    return {'a': [x ** 2]}  # комментарий, 日本語, العربية, 👩‍💻\n",
    ENDOFTEXT + IMSTART + IMEND,
)
#: What a tokenizer of another family may consist of.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
#: A conversation to tell whether a template is ChatML.
_CHAT = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"))


def write_qwen2_tokenizer(
    source: Path, target: Path, *, is_chat: bool, trained_length: int, allow_other_ranks: bool
) -> EndTokens:
    """Write tokenizer.json and tokenizer_config.json from a Qwen v1 tokenizer.

    Args:
        source: Folder with `qwen.tiktoken`.
        target: Folder to write to.
        is_chat: Whether the tokenizer gets the ChatML template and `<|im_end|>` as its end.
        trained_length: Longest input, in tokens.
        allow_other_ranks: Take another rank file than the published one.

    Raises:
        CheckpointDamaged: The rank file is not the published one.
        CheckpointUnsupported: The written tokenizer does not give the same ids.
    """
    options: dict[str, Any] = {"verify_ranks": False} if allow_other_ranks else {}
    tokenizer = QWenTokenizer.from_pretrained(source, local_files_only=True, **options)
    backend = _RanksConverter(tokenizer).converted()
    backend.normalizer = normalizers.NFC()
    # Not every reader has this shortcut past the merges, so none gets it.
    backend.model.ignore_merges = False
    backend.save(str(target / "tokenizer.json"))
    config = {
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IMEND if is_chat else ENDOFTEXT,
        "model_max_length": trained_length,
        "pad_token": ENDOFTEXT,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if is_chat:
        config["chat_template"] = CHAT_TEMPLATE
    _write_json(target / "tokenizer_config.json", config)
    # Transformers 5 takes vocabulary and merges from the file, others all that it says.
    for reader in (Qwen2Tokenizer, PreTrainedTokenizerFast):
        written = reader.from_pretrained(target, local_files_only=True)
        _check_merges(written, tokenizer)
        _check_same_ids(tokenizer, build_text_tokenizer(written))
    return _end_tokens(tokenizer.control_ids)


class _RanksConverter(TikTokenConverter):
    """Transformers' converter on ranks that are in memory already.

    By itself it reads the file through tiktoken's cache, which knows a file by its path alone and
    answers with what lay there once.
    """

    def __init__(self, tokenizer: QWenTokenizer) -> None:
        init: Any = super().__init__
        init(pattern=PAT_STR, extra_special_tokens=list(SPECIAL_TOKENS))
        self._tokenizer = tokenizer

    def extract_vocab_merges_from_model(self, tiktoken_url: Any) -> Any:
        """Return vocabulary and merges; with extra ranks also the special tokens between."""
        vocab, merges = super().extract_vocab_merges_from_model(tiktoken_url)
        # Without their place in the vocabulary they would be counted on from the extra ranks.
        return vocab | self._tokenizer.special_tokens, merges

    def load_tiktoken_bpe(self, tiktoken_url: Any) -> dict[bytes, int]:  # type: ignore[override]
        """Return the ranks, extra ones included."""
        return self._tokenizer.mergeable_ranks


def keep_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer of another family as it is.

    Raises:
        CheckpointDamaged: It cannot be read.
    """
    _load_fast(source)
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _load_fast(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(
            f"The tokenizer in {source} (tokenizer.json, tokenizer_config.json) cannot be read. "
            "Fetch these files again."
        ) from error


def write_qwen1_tokenizer(
    source: Path, target: Path, *, trained_length: int, allow_other_ranks: bool
) -> tuple[EndTokens, bool, tuple[str, ...]]:
    """Write qwen.tiktoken and tokenizer_config.json from the tokenizer of a Qwen2 layout.

    Args:
        source: Folder with `tokenizer.json`, or `vocab.json` and `merges.txt`.
        target: Folder to write to.
        trained_length: Longest input, in tokens.
        allow_other_ranks: Take another vocabulary than the published one.

    Returns:
        The end tokens; whether it is a chat model's; texts of tokens that lose their names.

    Raises:
        CheckpointDamaged: The vocabulary cannot be read.
        CheckpointUnsupported: Another vocabulary, chat template or way of splitting than Qwen's.
    """
    fast = _load_fast(source)
    is_chat = bool(fast.chat_template)
    if is_chat and not _is_chatml(fast):
        raise CheckpointUnsupported(
            f"The chat template in {source} is not plain ChatML, the only format that Qwen v1 "
            "knows. Choose another checkpoint, or remove the template to convert a base model."
        )
    texts = build_text_tokenizer(fast)
    is_published = _write_ranks(texts, source, target / "qwen.tiktoken", allow_other_ranks)
    config = {"model_max_length": trained_length, "tokenizer_class": "QWenTokenizer"}
    if not is_published:
        config["verify_ranks"] = False
    _write_json(target / "tokenizer_config.json", config)
    written = QWenTokenizer.from_pretrained(target, local_files_only=True)
    _check_merges(fast, written)
    _check_same_ids(texts, written)
    renamed = tuple(text for text in texts.control_ids if text not in written.control_ids)
    return _end_tokens(written.control_ids), is_chat, renamed


def _write_ranks(texts: TextTokenizer, source: Path, path: Path, allow_other_ranks: bool) -> bool:
    """Write a rank file; tell whether it is the published one."""
    controls = texts.control_ids
    first = controls.get(ENDOFTEXT, 0)
    if not first or [controls.get(t) for t in SPECIAL_TOKENS[:3]] != [*range(first, first + 3)]:
        raise CheckpointUnsupported(
            f"The tokenizer in {source} has no {ENDOFTEXT}, {IMSTART} and {IMEND} after its "
            "vocabulary, so it is not Qwen's. Choose a checkpoint of Qwen."
        )
    ranks = {texts.token_bytes(token_id): token_id for token_id in range(first)}
    data = dump_ranks(ranks)
    is_published = hashlib.sha256(data).hexdigest() == PUBLISHED_SHA256
    if len(ranks) != first or b"" in ranks or not (is_published or allow_other_ranks):
        raise CheckpointUnsupported(
            f"The vocabulary in {source} is not the one that was published with Qwen. Choose a "
            "checkpoint of Qwen, or allow other ranks (--allow-other-ranks) if the model was "
            "trained from scratch on this vocabulary."
        )
    path.write_bytes(data)
    return is_published


def _is_chatml(tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    chat = [{"role": role, "content": content} for role, content in _CHAT]
    expected = "".join(f"{IMSTART}{role}\n{content}{IMEND}\n" for role, content in _CHAT)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
    return bool(text == f"{expected}{IMSTART}assistant\n")


def _check_merges(fast: Any, native: QWenTokenizer) -> None:
    """Refuse merges that are not those of the ranks: all tokens reached, in the ranks' order."""
    model = fast.backend_tokenizer.model
    merges = json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]
    made = [model.token_to_id("".join(pair)) for pair in merges]
    if made != sorted(made):
        raise CheckpointUnsupported(
            "The merges of this vocabulary are not in the order of its ids, so Qwen v1 would merge "
            "text in another way. Choose a checkpoint of Qwen."
        )
    for token, token_id in native.mergeable_ranks.items():
        spelled = fast.convert_ids_to_tokens(token_id)
        if [found.id for found in model.tokenize(spelled)] != [token_id]:
            raise CheckpointUnsupported(
                f"No merges of two tokens lead to the token {token!r} of this vocabulary, without "
                "which the Qwen2 tokenizer never gives it. Add the steps on the way to the "
                "vocabulary, or choose the one published with Qwen."
            )


def _check_same_ids(source: TextTokenizer, written: TextTokenizer) -> None:
    for sample in _SAMPLES:
        if source.encode_text(sample) != written.encode_text(sample):
            raise CheckpointUnsupported(
                f"The converted tokenizer gives other ids than the source's for {sample!r}: the "
                "source normalises or splits text in another way than Qwen. Choose a checkpoint "
                "of Qwen."
            )
    for text in SPECIAL_TOKENS[:3]:
        assert source.control_ids[text] == written.control_ids[text]


def _end_tokens(ids: Mapping[str, int]) -> EndTokens:
    return EndTokens(endoftext=ids[ENDOFTEXT], im_start=ids[IMSTART], im_end=ids[IMEND])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
