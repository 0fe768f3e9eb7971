"""What perplexity is measured on: token ids from a text, a file of ids, or Python's own manual.

Knows no model; a tokenizer is only asked for ids.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.errors import CheckpointUnsupported, InvalidRequest
from qwen.tokenizer import build_text_tokenizer


@dataclass(frozen=True, slots=True)
class Corpus:
    """A long text as token ids.

    Attributes:
        name: What it is, as a report names it.
    """

    name: str
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Tell it from others: 16 hexadecimal digits of the ids' sha256."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


def read_corpus(tokenizer: Any, *, text: Path | None, ids: Path | None, vocabulary: int) -> Corpus:
    """Read what a user named, or Python's manual, which every Python has.

    Args:
        tokenizer: Of Transformers, or Qwen v1's.
        text: A UTF-8 file.
        ids: A .json file with a list of token ids, or a .npy file with a row of them.
        vocabulary: Ids that the model knows.

    Raises:
        InvalidRequest: The file cannot be read, or its ids are not the model's.
    """
    if ids is not None:
        return Corpus(ids.name, _checked_ids(_read_ids(ids), vocabulary, ids))
    if text is not None:
        return Corpus(text.name, tuple(encode_text(tokenizer, _read_text(text))))
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return Corpus(name, tuple(encode_text(tokenizer, python_manual())))


def python_manual() -> str:
    """Return the language reference that `help()` shows: half a megabyte of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def encode_text(tokenizer: Any, text: str) -> Sequence[int]:
    """Encode a text without control tokens, whatever it holds, where the tokenizer allows that."""
    try:
        return build_text_tokenizer(tokenizer).encode_text(text)
    except CheckpointUnsupported:  # some vocabularies lack bytes, as SmolLM2's does
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: Sequence[int] = encoded.input_ids
        return ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{path} is not UTF-8 (byte {error.start:,}). Convert it, or name another."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_ids(path: Path) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".npy":
            import numpy

            return numpy.load(path, allow_pickle=False).tolist()
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"{path} is damaged: it is no {path.suffix} file. Write it anew."
        ) from None
    raise InvalidRequest(
        f"{path} is neither .json (a list of token ids) nor .npy (a row of them). Save the ids as "
        "one of these, or name a text with --text."
    )


def _checked_ids(ids: Any, vocabulary: int, path: Path) -> tuple[int, ...]:
    if not isinstance(ids, list) or any(type(token_id) is not int for token_id in ids):
        raise InvalidRequest(f"{path} does not hold one flat list of whole numbers.")
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocabulary]
    if unknown:
        raise InvalidRequest(
            f"{path} holds the token id {unknown[0]}, which is not one of the model's "
            f"{vocabulary:,}. The ids were made with another tokenizer."
        )
    return tuple(ids)


def _unreadable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"{path} cannot be read: {error.strerror}. Check the path.")
