"""`QWenTokenizer`: the tokenizer of the Qwen v1 checkpoints, on tiktoken ranks.

Knows the rank file, the 208 special tokens and Transformers' tokenizer interface; knows no model
and no chat format. A text is normalised to NFC, cut by the split pattern, and every piece becomes
bytes that are merged by rank, so a token is bytes and may hold only a part of a character.
Source: the published checkpoints' file and answers; see docs/tokenization.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

from qwen.errors import CheckpointDamaged, CheckpointUnsupported

logger = logging.getLogger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken", "extra_vocab_file": "qwen_extra.tiktoken"}

#: As cl100k_base's, but every digit is a piece of its own; the same as Qwen2's in Transformers.
PAT_STR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ENDOFTEXT = "<|endoftext|>"
IMSTART = "<|im_start|>"
IMEND = "<|im_end|>"
EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))
#: In the order of their ids, of which the first follows the last rank.
SPECIAL_TOKENS = (ENDOFTEXT, IMSTART, IMEND, *EXTRAS)

#: The one rank file that was published with every Qwen v1 checkpoint.
PUBLISHED_RANKS = 151_643
PUBLISHED_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

AllowedSpecial = Literal["all"] | AbstractSet[str]
DisallowedSpecial = Literal["all"] | Collection[str]


class QWenTokenizer(PreTrainedTokenizer):
    """Tokenizer of Qwen v1; tokens are `bytes`, special tokens are `str`.

    Encoding and decoding change nothing here, so threads may share an instance. It also is the
    `qwen.prompt.TextTokenizer` of its checkpoint.

    Args:
        vocab_file: The rank file, `qwen.tiktoken`.
        errors: What `decode` does with bytes that are no UTF-8: as in `bytes.decode`.
        extra_vocab_file: More ranks in the same form, from the id after the special tokens on.
        verify_ranks: Refuse any rank file but the published one. Without it the special tokens
            follow the ranks that are there, so their ids differ.
        **kwargs: Of Transformers' tokenizers, such as `pad_token="<|endoftext|>"`.

    Attributes:
        tokenizer: The `tiktoken.Encoding`, built once.
        mergeable_ranks: Id of every token that is no special one.
        special_tokens: Id of every special token.
        decoder: Token of every id.
        eod_id: Id of `<|endoftext|>`.
        im_start_id: Id of `<|im_start|>`.
        im_end_id: Id of `<|im_end|>`.

    Raises:
        CheckpointDamaged: A rank file is missing, cut short or altered.
        CheckpointUnsupported: The checkpoint adds tokens that this tokenizer does not have.
    """

    vocab_files_names = VOCAB_FILES_NAMES

    def __init__(
        self,
        vocab_file: str | None,
        errors: str = "replace",
        extra_vocab_file: str | None = None,
        verify_ranks: bool = True,
        **kwargs: Any,
    ) -> None:
        self.errors = errors
        ranks = load_ranks(vocab_file, verify=verify_ranks)
        self.special_tokens = {text: len(ranks) + i for i, text in enumerate(SPECIAL_TOKENS)}
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IMSTART]
        self.im_end_id = self.special_tokens[IMEND]
        if extra_vocab_file is not None:
            ranks |= _load_extra_ranks(extra_vocab_file, ranks, len(ranks) + len(SPECIAL_TOKENS))
        self.mergeable_ranks = ranks
        self.decoder: dict[int, bytes | str] = {rank: token for token, rank in ranks.items()}
        self.decoder |= {token_id: text for text, token_id in self.special_tokens.items()}
        self._special_ids = frozenset(self.special_tokens.values())
        self.tokenizer = tiktoken.Encoding(
            "Qwen",
            pat_str=PAT_STR,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self._check_saved_tokens(kwargs.pop("added_tokens_decoder", {}))
        if not verify_ranks:
            kwargs["verify_ranks"] = self.verify_ranks = False
        super().__init__(errors=errors, **kwargs)  # type: ignore[no-untyped-call]

    def _check_saved_tokens(self, added: Mapping[int, AddedToken]) -> None:
        """Refuse tokens in a tokenizer_config.json that would get no id or another one."""
        for token_id, token in added.items():
            if self.special_tokens.get(str(token)) != token_id:
                raise CheckpointUnsupported(
                    f"tokenizer_config.json adds the token {token} with id {token_id}, which the "
                    "Qwen v1 tokenizer does not have. Remove it from added_tokens_decoder, or "
                    f"use one of {EXTRAS[0]} to {EXTRAS[-1]} in its place."
                )

    # What prompts and replies need: qwen.prompt.TextTokenizer.

    @property
    def control_ids(self) -> Mapping[str, int]:
        """See `TextTokenizer.control_ids`."""
        return MappingProxyType(self.special_tokens)

    @property
    def hidden_ids(self) -> frozenset[int]:
        """See `TextTokenizer.hidden_ids`: all special tokens."""
        return self._special_ids

    def encode_text(self, text: str) -> list[int]:
        """See `TextTokenizer.encode_text`. A lone surrogate is encoded as U+FFFD."""
        ids: list[int] = self.tokenizer.encode_ordinary(unicodedata.normalize("NFC", text))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """See `TextTokenizer.token_bytes`; a special token has the bytes of its text."""
        token = self.decoder.get(token_id, b"")
        return token.encode() if isinstance(token, str) else token

    # Text to ids. Published tokens are bytes, where Transformers says str: hence the overrides.

    def tokenize(  # type: ignore[override]
        self,
        text: str,
        allowed_special: AllowedSpecial = "all",  # type: ignore[override]
        disallowed_special: DisallowedSpecial = (),  # type: ignore[override]
        **kwargs: Any,
    ) -> list[bytes | str]:
        """Split a text into tokens.

        Calling the tokenizer and `encode` take the same keywords.

        Args:
            text: Any text; it is normalised to NFC first.
            allowed_special: Texts that become special tokens: "all", as published, or a set.
                Use `allowed_special=()` for text that you did not write yourself.
            disallowed_special: Texts that raise an error unless they are allowed.
            **kwargs: Of Transformers. `split_special_tokens=True` is `allowed_special=()`.

        Raises:
            ValueError: The text holds a disallowed special token.
        """
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError(
                "The Qwen v1 tokenizer has no offsets: a token may hold a part of a character."
            )
        if kwargs.get("split_special_tokens"):
            allowed_special = frozenset()
        if allowed_special != "all":
            allowed_special = frozenset(allowed_special)
        ids = self.tokenizer.encode(
            unicodedata.normalize("NFC", text),
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
        )
        return [self.decoder[token_id] for token_id in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or a list of the ids of several; None for what is no token.

        Args:
            tokens: `bytes`, or `str` for special tokens, or a sequence of these.
        """
        if tokens is None or isinstance(tokens, bytes | str):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_token_to_id(self, token: Any) -> int | None:
        ids: Mapping[Any, int]
        ids = self.special_tokens if isinstance(token, str) else self.mergeable_ranks
        return ids.get(token)

    # Ids to text.

    def _decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Decode ids; one without a token, such as a label of -100, adds nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden: Collection[int] = self._special_ids if skip_special_tokens else ()
        data = b"".join(self.token_bytes(i) for i in ids if i not in hidden)
        return data.decode("utf-8", errors or self.errors)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or a list of the tokens of several; `b""` without a token."""
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        hidden: Collection[int] = self._special_ids if skip_special_tokens else ()
        return [self._convert_id_to_token(int(i)) for i in ids if int(i) not in hidden]

    def _convert_id_to_token(self, index: int) -> bytes | str:  # type: ignore[override]
        return self.decoder.get(index, b"")

    def convert_tokens_to_string(self, tokens: Sequence[bytes | str]) -> str:
        """Join tokens and decode them."""
        data = b"".join(t.encode() if isinstance(t, str) else t for t in tokens)
        return data.decode("utf-8", self.errors)

    # The vocabulary.

    @property
    def vocab_size(self) -> int:
        """Ids from 0 on that the tokenizer knows; the model's embedding has more rows."""
        return int(self.tokenizer.n_vocab)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[bytes, int]:  # type: ignore[override]
        """Return the ranks, without the special tokens, as published."""
        return dict(self.mergeable_ranks)

    def _add_tokens(
        self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        if new_tokens and not special_tokens:
            raise ValueError(
                "Adding regular tokens is not supported: the ranks are fixed. Give new tokens "
                "the place of unused special ones, or load with extra_vocab_file=…; see "
                "docs/tokenization.md."
            )
        for token in new_tokens:
            self._check_special(str(token))
        return 0

    def _check_special(self, token: str) -> None:
        if token not in self.special_tokens:
            raise ValueError(
                f"Adding unknown special tokens is not supported: {token}. Use {ENDOFTEXT} for "
                f"padding, or one of {EXTRAS[0]} to {EXTRAS[-1]}."
            )

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            self._check_special(str(value))  # else `pad_token_id` would be None without a word
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the rank file, and that of the extra ranks if there are some."""
        base = {token: rank for token, rank in self.mergeable_ranks.items() if rank < self.eod_id}
        extra = {token: rank for token, rank in self.mergeable_ranks.items() if token not in base}
        written = []
        for name, ranks in zip(VOCAB_FILES_NAMES.values(), (base, extra), strict=True):
            if not ranks:
                continue
            path = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
            path.write_bytes(dump_ranks(ranks))
            written.append(str(path))
        return tuple(written)


def load_ranks(path: str | Path | None, *, verify: bool = True) -> dict[bytes, int]:
    """Read a rank file.

    Args:
        path: A `qwen.tiktoken`.
        verify: Refuse any file but the published one; other line ends are let pass.

    Raises:
        CheckpointDamaged: The file is missing, cut short or altered.
    """
    if path is None:
        raise CheckpointDamaged(
            "The checkpoint has no qwen.tiktoken, the vocabulary of Qwen v1. Fetch it again."
        )
    data = _read(path).replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
    if not verify:
        return parse_ranks(data, path)
    if hashlib.sha256(data).hexdigest() == PUBLISHED_SHA256:
        return parse_ranks(data, path)
    lines = data.count(b"\n")
    found = "it has other content"
    if lines != PUBLISHED_RANKS:
        found = f"it has {lines:,} entries, where {PUBLISHED_RANKS:,} belong"
    raise CheckpointDamaged(
        f"{path} is not the vocabulary of Qwen v1: {found}. Fetch this file again, or, if the "
        "model was trained from scratch on these ranks, load it with verify_ranks=False."
    )


def parse_ranks(data: bytes, path: str | Path) -> dict[bytes, int]:
    """Parse a whole rank file, whose ranks run from 0 on and begin with single bytes.

    Raises:
        CheckpointDamaged: A line cannot be read, is there twice, or one is missing.
    """
    ranks: dict[bytes, int] = {}
    for number, (token, rank) in enumerate(_parse_lines(data, path), start=1):
        if rank != number - 1 or token in ranks:
            raise _damaged(path, number)
        ranks[token] = rank
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointDamaged(
            f"{path} is damaged: it lacks some of the 256 single bytes. Fetch this file again."
        )
    return ranks


def dump_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a rank file."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _load_extra_ranks(path: str | Path, known: Mapping[bytes, int], first: int) -> dict[bytes, int]:
    extra: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, (token, rank) in enumerate(_parse_lines(_read(path), path), start=1):
        if token in known:
            logger.info("%s: the token %r is in the vocabulary already", path, token)
            continue
        if token in extra or rank in taken or rank < first:
            raise CheckpointDamaged(
                f"{path} is not fit for this vocabulary: line {number} repeats a token or takes "
                f"the id {rank}, which has another token. Number its ranks from {first} on."
            )
        extra[token] = rank
        taken.add(rank)
    return extra


def _parse_lines(data: bytes, path: str | Path) -> Iterable[tuple[bytes, int]]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            pair = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise _damaged(path, number) from error
        if not pair[0]:
            raise _damaged(path, number)
        yield pair


def _damaged(path: str | Path, line: int) -> CheckpointDamaged:
    return CheckpointDamaged(f"{path} is damaged at line {line}. Fetch this file again.")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointDamaged(f"{path} cannot be read: {reason}. Fetch it again.") from error
