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


def mixed_ids(checkpoint: str, *, tokens: int = 24_000) -> list[int]:
    """Encode the mixture with a checkpoint's tokenizer, half English and a third code.

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
    encoded = {kind: encode_text(tokenizer, text) for kind, text in mixed_parts().items()}
    chinese = list(encoded["Chinese"])
    english = list(encoded["English"])[: tokens * 2 // 3]
    code = list(encoded["code"])[: tokens - len(english) - len(chinese)]
    return english + code + chinese
