"""English, program code and Chinese as token ids, from what every installation has."""

from __future__ import annotations

import inspect
from importlib.resources import files


def mixed_parts() -> dict[str, str]:
    """Return a text of each kind: Python's manual, its library's source, and our own Chinese."""
    import argparse
    import heapq

    from qwen.evals.corpus import python_manual

    return {
        "English": python_manual(),
        "code": inspect.getsource(heapq) + inspect.getsource(argparse),
        "Chinese": files("qwen.evals").joinpath("chinese.txt").read_text(encoding="utf-8"),
    }


def mixed_texts(checkpoint: str) -> dict[str, list[int]]:
    """Encode each kind of text with a checkpoint's tokenizer.

    Raises:
        CheckpointError: The checkpoint cannot be had or read.
    """
    from transformers import AutoTokenizer

    from qwen.auto import register_qwen
    from qwen.checkpoint import resolve_checkpoint
    from qwen.evals.corpus import encode_text

    register_qwen()
    folder = resolve_checkpoint(checkpoint).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {kind: list(encode_text(tokenizer, text)) for kind, text in mixed_parts().items()}


def mixed_ids(checkpoint: str, *, tokens: int = 24_000) -> list[int]:
    """Return so many tokens: two thirds English, then code, then Chinese."""
    texts = mixed_texts(checkpoint)
    english = texts["English"][: tokens * 2 // 3]
    code = texts["code"][: tokens - len(english) - len(texts["Chinese"])]
    return english + code + texts["Chinese"]
