"""qwen.tiktoken ↔ tokenizer.json: the same ids, the same prompts."""

from __future__ import annotations

import json
import random

import pytest
from golden_v1 import GOLDEN
from rank_files import TINY_RANKS
from tiny_layouts import (
    ENDOFTEXT,
    IM_END,
    RANKS,
    template_ids,
    to_qwen1,
    to_qwen2,
    write_qwen1,
    write_qwen2,
)
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from qwen.chat import make_context
from qwen.convert import convert_checkpoint
from qwen.convert_tokenizer import write_qwen2_tokenizer
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.tokenization_qwen import PAT_STR, SPECIAL_TOKENS, QWenTokenizer, dump_ranks
from qwen.tokenizer import build_text_tokenizer

TOKENIZER_CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text())["cases"]
#: Texts that make normalising, splitting and merging visible on the tiny ranks.
TEXTS = (
    "hello world hell",
    "Human us\n\n\nhello   us",
    "cafe\u0301 你好 12",
    "<|im_start|>hello<|extra_7|><|endoftext|>",
    "he<|im_end|>\nllo",
)


@pytest.fixture
def qwen1_folder(tmp_path):
    return write_qwen1(tmp_path / "qwen1")


@pytest.fixture
def qwen2_folder(tmp_path):
    return write_qwen2(tmp_path / "qwen2")


def assert_same_ids(native, plain, texts):
    safe = build_text_tokenizer(plain)
    for text in texts:
        ids = native.encode(text)
        assert plain.encode(text) == ids
        assert safe.encode_text(text) == native.encode_text(text)
        assert plain.decode(ids) == native.decode(ids)
        shown = native.decode(ids, skip_special_tokens=True)
        assert plain.decode(ids, skip_special_tokens=True) == shown


def random_texts():
    chooser = random.Random(0)
    pieces = ["he", "ll", "o", " w", "us", "\n", " ", "H", "uman", "1", "你", "é", "e\u0301", "<|"]
    pieces += SPECIAL_TOKENS[:4]
    return ["".join(chooser.choices(pieces, k=12)) for _ in range(100)]


def test_tokenizer_json_gives_the_ids_of_qwen1(qwen1_folder):
    native = AutoTokenizer.from_pretrained(qwen1_folder)
    plain = AutoTokenizer.from_pretrained(to_qwen2(qwen1_folder))
    assert_same_ids(native, plain, [*TEXTS, *random_texts()])
    assert (plain.eos_token, plain.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert plain.model_max_length == 64
    assert [plain.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [
        *range(ENDOFTEXT, ENDOFTEXT + 208)
    ]


def test_tokenizer_json_is_right_by_itself(qwen1_folder):
    native = AutoTokenizer.from_pretrained(qwen1_folder)
    file = to_qwen2(qwen1_folder) / "tokenizer.json"
    assert_same_ids(native, PreTrainedTokenizerFast(tokenizer_file=str(file)), random_texts())
    content = json.loads(file.read_text())
    assert content["model"]["ignore_merges"] is False
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PAT_STR}


def test_qwen_tiktoken_gives_the_ids_of_qwen2(qwen2_folder):
    done = convert_checkpoint(
        qwen2_folder, qwen2_folder.with_name("new"), to="qwen1", allow_other_ranks=True
    )
    native = AutoTokenizer.from_pretrained(done.folder)
    plain = AutoTokenizer.from_pretrained(qwen2_folder)
    assert native.mergeable_ranks == RANKS
    texts = [text for text in (*TEXTS, *random_texts()) if "extra_" not in text]
    assert_same_ids(native, plain, texts)
    assert "<tool_call>" in done.notices[0]


def test_tokenizer_comes_back_byte_for_byte(qwen1_folder):
    back = to_qwen1(to_qwen2(qwen1_folder))
    assert (back / "qwen.tiktoken").read_bytes() == (qwen1_folder / "qwen.tiktoken").read_bytes()


def test_another_rank_file_at_the_same_place_is_read_anew(qwen1_folder):
    to_qwen2(qwen1_folder, "first")
    fewer = {token: rank for token, rank in RANKS.items() if token != b"\xe4\xbd"}
    (qwen1_folder / "qwen.tiktoken").write_bytes(dump_ranks(fewer))
    second = AutoTokenizer.from_pretrained(to_qwen2(qwen1_folder, "second"))
    assert second.encode("us<|endoftext|>") == [RANKS[b"us"], len(fewer)]


def test_extra_ranks_keep_their_ids(qwen1_folder):
    extra = {b"hel": 473, b"helloo": 474}
    (qwen1_folder / "qwen_extra.tiktoken").write_bytes(dump_ranks(extra))
    native = QWenTokenizer.from_pretrained(qwen1_folder)
    plain = AutoTokenizer.from_pretrained(to_qwen2(qwen1_folder))
    assert native.encode("hel<|im_end|>") == [473, IM_END]
    assert_same_ids(native, plain, ["hel", "helloo", "hellooo", *TEXTS])


def test_tokens_that_merges_do_not_lead_to_are_refused(qwen1_folder, qwen2_folder):
    (qwen1_folder / "qwen.tiktoken").write_bytes(dump_ranks(TINY_RANKS))
    with pytest.raises(CheckpointUnsupported, match="Human"):
        to_qwen2(qwen1_folder)
    path = qwen2_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].remove(["u", "s"])
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointUnsupported, match="b'us'"):
        to_qwen1(qwen2_folder)


def test_merges_in_another_order_than_the_ranks_are_refused(qwen2_folder):
    path = qwen2_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].insert(0, content["model"]["merges"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointUnsupported, match="not in the order"):
        to_qwen1(qwen2_folder)


CHATS = (
    [("user", "hello")],
    [("system", "Be us."), ("user", "hello"), ("assistant", "us"), ("user", "hell?\n\nhe")],
    [("system", ""), ("user", "你好\n")],
)


@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_gives_the_prompt_of_qwen1(qwen1_folder, chat):
    native = AutoTokenizer.from_pretrained(qwen1_folder)
    plain = AutoTokenizer.from_pretrained(to_qwen2(qwen1_folder))
    assert template_ids(plain, chat) == context_ids(native, chat)


def context_ids(tokenizer, chat):
    system = dict(chat).get("system", "You are a helpful assistant.")
    turns = [content for role, content in chat if role != "system"]
    history = list(zip(turns[0:-1:2], turns[1:-1:2], strict=True))
    return make_context(tokenizer, turns[-1], history, system)[1]


def test_other_ranks_need_permission(qwen1_folder, qwen2_folder):
    with pytest.raises(CheckpointUnsupported, match="allow-other-ranks"):
        to_qwen1(qwen2_folder, allow_other_ranks=False)
    (qwen1_folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointDamaged, match="not the vocabulary"):
        to_qwen2(qwen1_folder)
    to_qwen2(qwen1_folder, allow_other_ranks=True)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"]
)
def test_other_chat_templates_are_refused(qwen2_folder, template):
    (qwen2_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointUnsupported, match="not plain ChatML"):
        to_qwen1(qwen2_folder)


def test_vocabulary_without_the_controls_of_qwen_is_refused(qwen2_folder):
    path = qwen2_folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    (qwen2_folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointUnsupported, match="not Qwen's"):
        to_qwen1(qwen2_folder)


def test_written_tokenizer_with_other_ids_is_refused(qwen1_folder, monkeypatch):
    monkeypatch.setattr(normalizers, "NFC", normalizers.NFD)
    with pytest.raises(CheckpointUnsupported, match="normalises or splits"):
        to_qwen2(qwen1_folder)


# The published ranks.


@pytest.fixture(scope="module")
def published(embedded_v1_folder):
    return AutoTokenizer.from_pretrained(embedded_v1_folder)


@pytest.fixture(scope="module")
def plain_folder(embedded_v1_folder, tmp_path_factory):
    """The published tokenizer as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_qwen2_tokenizer(
        embedded_v1_folder, folder, is_chat=True, trained_length=32768, allow_other_ranks=False
    )
    return folder


@pytest.fixture(scope="module")
def plain(plain_folder):
    return Qwen2Tokenizer.from_pretrained(plain_folder)


@pytest.fixture(scope="module")
def as_it_stands(plain_folder):
    return Tokenizer.from_file(str(plain_folder / "tokenizer.json"))


@pytest.mark.integration
@pytest.mark.parametrize("case", TOKENIZER_CASES, ids=lambda case: case["name"])
def test_published_ids_and_texts_from_tokenizer_json(plain, as_it_stands, case):
    text, ids = case["text"], case["ids"]
    assert plain.encode(text) == as_it_stands.encode(text).ids == ids
    without = plain.encode(text, split_special_tokens=True)
    assert without == case.get("ids_no_special", ids)
    assert plain.decode(ids) == case["decoded"]
    skipped = case.get("decoded_skip_special_tokens", case["decoded"])
    assert plain.decode(ids, skip_special_tokens=True) == skipped


@pytest.mark.integration
@pytest.mark.parametrize(
    "chat",
    [
        [("system", "Be brief."), ("user", "What is a hash table?")],
        [("user", "你好，今天是2023年9月25日。")],
        [
            ("system", ""),
            ("user", "def f(x):\n    return x\n"),
            ("assistant", "🙂"),
            ("user", " ok "),
        ],
    ],
)
def test_chat_template_gives_the_published_prompts(published, plain, chat):
    assert template_ids(plain, chat) == context_ids(published, chat)
