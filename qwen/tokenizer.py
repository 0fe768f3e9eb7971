"""A Transformers tokenizer, made safe for text that users write, and its chat format.

Knows byte-level BPE tokenizers (every Qwen has one); knows no model. What is made here is never
changed afterwards, so threads may share it: a fast tokenizer's options are state, and changing
them while another thread encodes is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer, models

from qwen.chat_format import ChatFormat, ChatMLFormat, TextTokenizer
from qwen.chat_template import TemplateFormat
from qwen.errors import CheckpointUnsupported
from qwen.react import ReactFormat

#: System text of Qwen v1's chats that have none of their own, as published.
QWEN_SYSTEM = "You are a helpful assistant."

#: GGUF files fill the vocabulary up to the size of the embedding with such entries.
_FILLER = re.compile(r"\[PAD\d+\]")


def build_text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Build what prompts and replies need from a Transformers tokenizer.

    Qwen v1's `QWenTokenizer` is a `TextTokenizer` by itself and is returned as it is.

    Raises:
        CheckpointUnsupported: It is no fast tokenizer or no byte-level BPE.
    """
    if _is_qwen_v1(tokenizer):
        texts: TextTokenizer = tokenizer
        return texts
    return FastTextTokenizer(tokenizer)


def build_chat_format(tokenizer: Any, *, chat_format: str | None = None) -> ChatFormat | None:
    """Build the chat format of a Transformers tokenizer; None for a base model's.

    Args:
        tokenizer: A base model's has no chat template.
        chat_format: For Qwen v1, which has no templates: the published key of its generation
            config, "chatml" or, for base models, "raw".

    Raises:
        CheckpointUnsupported: The chat format has another name.
    """
    if not _is_qwen_v1(tokenizer):
        if not tokenizer.chat_template:
            return None
        template = TemplateFormat(tokenizer)
        return template if template.knows_tools else ReactFormat(template)
    if chat_format == "raw":
        return None
    if chat_format not in (None, "chatml"):
        raise CheckpointUnsupported(
            f"generation_config.json names the chat format '{chat_format}', which this version "
            "does not know. Set chat_format to chatml, or to raw for a base model."
        )
    return ReactFormat(ChatMLFormat(default_system=QWEN_SYSTEM, joins_text=False))


def _is_qwen_v1(tokenizer: Any) -> bool:
    """Tell whether a tokenizer is Qwen v1's, without importing that class."""
    return hasattr(tokenizer, "mergeable_ranks") and hasattr(tokenizer, "encode_text")


class FastTextTokenizer:
    """A `TextTokenizer` on a fast byte-level BPE tokenizer of Transformers.

    Text is encoded by a copy that shares model and normaliser (Qwen's is NFC) but has no added
    tokens at all, neither special ones nor others such as `<tool_call>`.

    Args:
        tokenizer: A `PreTrainedTokenizerFast`; read once and not kept.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer) or not _is_byte_level(backend):
            raise CheckpointUnsupported(
                "The checkpoint's tokenizer is not a byte-level BPE with a tokenizer.json. Choose "
                "a Qwen checkpoint, or convert the tokenizer to that form."
            )
        added = backend.get_added_tokens_decoder()
        self._control_ids = {token.content: token_id for token_id, token in added.items()}
        self._hidden_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_bytes = {i: token.content.encode() for i, token in added.items()}
        self._plain = Tokenizer(backend.model)
        self._plain.pre_tokenizer = backend.pre_tokenizer
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        self._byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        self._check_no_control_id_from_text()

    def _check_no_control_id_from_text(self) -> None:
        # A tokenizer may hold its control tokens in the BPE vocabulary too. Merges do not lead
        # there, but an option such as `ignore_merges` would.
        ids = set(self._control_ids.values())
        if any(not ids.isdisjoint(self.encode_text(text)) for text in self._control_ids):
            raise CheckpointUnsupported(
                "The checkpoint's tokenizer turns plain text into control tokens, so a message "
                "could forge turns. Choose another checkpoint."
            )

    @property
    def control_ids(self) -> Mapping[str, int]:
        """See `TextTokenizer.control_ids`."""
        return MappingProxyType(self._control_ids)

    @property
    def hidden_ids(self) -> frozenset[int]:
        """See `TextTokenizer.hidden_ids`: the special tokens, not `<tool_call>` or `<think>`."""
        return self._hidden_ids

    def encode_text(self, text: str) -> list[int]:
        """See `TextTokenizer.encode_text`. A lone surrogate is encoded as U+FFFD."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """See `TextTokenizer.token_bytes`; an added token has the bytes of its text."""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        if not 0 <= token_id < 2**32:
            return b""
        token = self._plain.id_to_token(token_id)
        if token is None or _FILLER.fullmatch(token):
            return b""
        # An entry that is no byte-level text can only be an added token that lost its mark.
        return bytes(self._byte_of[c] for c in token if c in self._byte_of)


def _is_byte_level(backend: Tokenizer) -> bool:
    return isinstance(backend.model, models.BPE) and all(
        backend.token_to_id(character) is not None for character in _byte_characters()
    )


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes.

    As published with GPT-2: printable Latin-1 bytes stand for themselves, the others take the
    code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]
