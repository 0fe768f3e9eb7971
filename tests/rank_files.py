"""Rank files of Qwen v1: a tiny made-up one, and the published one out of the embedded model."""

import json
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen.tokenization_qwen import PUBLISHED_RANKS, QWenTokenizer, dump_ranks

MERGES = [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" w",
    b"\xc3\xa9",
    b"\n\n",
    b"us",
    b"\xe4\xbd",
    b"Human",
]
TINY_RANKS = {token: rank for rank, token in enumerate([*map(bytes, zip(range(256))), *MERGES])}
#: Ids that the tiny tokenizer knows; a model for it wants at least as many rows.
TINY_VOCAB_SIZE = len(TINY_RANKS) + 208


def write_tiny_ranks(folder: Path) -> Path:
    """Write a `qwen.tiktoken` of the tiny ranks."""
    path = folder / "qwen.tiktoken"
    path.write_bytes(dump_ranks(TINY_RANKS))
    return path


def build_tiny_tokenizer(folder: Path, **options: object) -> QWenTokenizer:
    """Build a `QWenTokenizer` on the tiny ranks."""
    return QWenTokenizer(str(write_tiny_ranks(folder)), verify_ranks=False, **options)


def write_published_ranks(embedded_folder: Path, folder: Path) -> Path:
    """Write the published `qwen.tiktoken`: the embedded vocabulary spells the same ranks."""
    vocab = json.loads((embedded_folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = sorted(vocab, key=vocab.__getitem__)[:PUBLISHED_RANKS]
    ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}
    path = folder / "qwen.tiktoken"
    path.write_bytes(dump_ranks(ranks))
    return path
