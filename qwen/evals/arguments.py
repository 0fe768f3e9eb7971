"""What the measurements on a text ask for on the command line, and how they load it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.backend import ignore_progress
from qwen.errors import QwenError, StartupError, is_out_of_memory

if TYPE_CHECKING:
    from qwen.evals.corpus import Corpus


#: Exit code of Ctrl-C, by convention.
INTERRUPTED = 130


def run_named(run: Callable[[argparse.Namespace], int], given: argparse.Namespace) -> int:
    """Run a command and turn what a user can mend into a line; return the exit status."""
    try:
        return run(given)
    except QwenError as error:
        message = str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = (
            "Memory ran out. Lower --chunk, measure shorter contexts, or choose a smaller "
            "checkpoint or a dtype of half the size (--dtype bfloat16)."
        )
    print(f"error: {message}", file=sys.stderr)
    return 1


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a checkpoint, a text and where results go."""
    parser.add_argument("-c", "--checkpoint-path", default="auto", metavar="NAME")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text", type=Path, metavar="FILE", help="a UTF-8 text (default: Python's own manual)"
    )
    text.add_argument("--ids", type=Path, metavar="FILE", help="token ids, .json or .npy")
    parser.add_argument(
        "--windows",
        type=parse_count,
        default=4,
        metavar="N",
        help="windows to average; fewer where the text is too short (default: 4)",
    )
    parser.add_argument(
        "--chunk",
        type=parse_count,
        default=512,
        metavar="N",
        help="tokens read at once; bounds the memory (default: 512)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here as they come")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg)")


def parse_count(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_length(text: str) -> int:
    """Read a number of tokens from 2 on; k stands for 1,024."""
    number = text.lower().removesuffix("k")
    length = int(number) * (1024 if number != text.lower() else 1) if number.isdecimal() else 0
    if length < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a window length: at least 2 tokens, of which one is predicted"
        )
    return length


def load_measured(given: argparse.Namespace) -> tuple[Any, Corpus, str]:
    """Load what the command line names.

    Returns:
        The model, the text as its token ids, and the checkpoint's name.

    Raises:
        StartupError: There is no such file.
        InvalidRequest: The text or the ids cannot be used.
        CheckpointError: The checkpoint cannot be had, read or run.
        OutOfMemory: It does not fit.
    """
    for path in (given.text, given.ids):
        if path is not None and not path.is_file():
            raise StartupError(f"There is no file {path}. Check the path's spelling.")
    from qwen.evals.corpus import read_corpus
    from qwen.loading import load_model

    loaded = load_model(
        given.checkpoint_path,
        device="cpu" if given.cpu_only else "auto",
        dtype=given.dtype,
        report=ignore_progress,
    )
    for notice in loaded.notices:
        print(f"Note: {notice}")
    model: Any = loaded.model
    vocabulary = model.get_input_embeddings().weight.shape[0]
    corpus = read_corpus(loaded.tokenizer, text=given.text, ids=given.ids, vocabulary=vocabulary)
    return model, corpus, loaded.name
