"""A checkpoint from the Qwen v1 layout to the Qwen2 layout and back, without loss.

`python -m qwen.convert SOURCE TARGET --to qwen1|qwen2`. Up to the trained length both layouts are
the same model, so a converted one gives the same numbers; see docs/conversion.md. Everything that
does not fit is refused before a weight is written, and the target appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.backend import ReportProgress, ignore_progress
from qwen.checkpoint import resolve_checkpoint
from qwen.checkpoint_files import check_weight_files, missing_files
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    InvalidRequest,
    InvalidSetting,
    QwenError,
)
from qwen.weights_cache import disk_full_explained, format_bytes, require_space

if TYPE_CHECKING:
    from qwen.convert_config import EndTokens, SourceModel
    from qwen.convert_map import Layout, PlannedTensor

#: Counts up when the same source gives another target, so that what keeps targets makes new ones.
CONVERTER_VERSION = 1

#: Bytes; also about the memory that a conversion takes, beside the largest tensor.
MAX_SHARD_BYTES = 2 * 10**9

#: Bytes beside the weights: the tokenizer's files, generously.
_EXTRA_BYTES = 32 * 10**6
_ADVICE = "Free some space, or name a target on a larger disk."
#: Files of the source that go along unchanged.
_LEGAL_FILES = ("LICENSE*", "NOTICE*", "Notice*")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion.

    Attributes:
        folder: The target.
        tensors: How many were written.
        size: Bytes of the weights.
        notices: Sentences about what the target cannot do as the source could.
    """

    folder: Path
    tensors: int
    size: int
    notices: tuple[str, ...]


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    to: Layout,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_other_ranks: bool = False,
    report: ReportProgress = ignore_progress,
) -> Conversion:
    """Convert weights, configurations and tokenizer of a checkpoint.

    Args:
        source: Folder of a Qwen v1, Qwen2 or (to "qwen1") Llama checkpoint; only read.
        target: Folder to make; it may exist if it is empty.
        to: Layout of the target, "qwen1" or "qwen2".
        max_shard_bytes: Size of the weight files, about.
        allow_other_ranks: Take a vocabulary that is not the one published with Qwen.
        report: Is told what is being done.

    Raises:
        CheckpointNotFound: There is no checkpoint in the source.
        CheckpointDamaged: Files or tensors of the source are missing or do not fit together.
        CheckpointUnsupported: The target's layout cannot express the source.
        InvalidRequest: The target is not empty, or the source has this layout already.
        DiskFull: There is no room for the target.
    """
    from qwen.convert_config import read_source
    from qwen.convert_map import plan_weights
    from qwen.convert_weights import read_headers, write_weights

    source, target = source.expanduser().absolute(), target.expanduser().absolute()
    _check_target(target)
    _check_source(source)
    if max_shard_bytes < 1:
        raise InvalidSetting("The size of a weight file must be positive.")
    model = read_source(source, to=to)
    stored = read_headers(source)
    plan = plan_weights(stored, model.sizes, to=to)
    size = sum(tensor.size for tensor in plan)

    def write(folder: Path) -> tuple[str, ...]:
        notices = _write_papers(model, plan, source, folder, allow_other_ranks, report)
        write_weights(plan, stored, source, folder, max_shard_bytes=max_shard_bytes, report=report)
        _check_written(folder, plan)
        return notices

    notices = _write_beside(target, size + _EXTRA_BYTES, write)
    return Conversion(folder=target, tensors=len(plan), size=size, notices=notices)


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(
            f"{target} exists and is not empty. Name a folder that does not exist yet."
        )


def _check_source(source: Path) -> None:
    missing = missing_files(source) if source.is_dir() else ("config.json",)
    if "config.json" in missing:
        raise CheckpointNotFound(
            f"{source} holds no checkpoint. Name a folder with config.json, tokenizer and "
            "safetensors files."
        )
    if missing:
        raise CheckpointDamaged(
            f"The checkpoint in {source} is incomplete: it lacks {', '.join(missing)}. Fetch the "
            "missing files again; weights must be in the safetensors format."
        )
    check_weight_files(source)


def _write_beside(
    target: Path, needed: int, write: Callable[[Path], tuple[str, ...]]
) -> tuple[str, ...]:
    """Fill a folder beside the target and rename it when it is whole."""
    beside = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, needed, advice=_ADVICE)
        beside.mkdir()
    except FileExistsError:
        raise InvalidRequest(
            f"{beside} is there: another conversion writes it, or one was cut short. If none is "
            "running, remove it and start again."
        ) from None
    except OSError as error:
        raise InvalidRequest(
            f"{target} cannot be written to: {error.strerror}. Name another folder."
        ) from None
    try:
        with disk_full_explained(target.parent, needed, advice=_ADVICE):
            notices = write(beside)
        if target.exists():
            target.rmdir()  # empty; not every system replaces a folder
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return notices


def _write_papers(
    model: SourceModel,
    plan: Sequence[PlannedTensor],
    source: Path,
    folder: Path,
    allow_other_ranks: bool,
    report: ReportProgress,
) -> tuple[str, ...]:
    """Write all but the weights; return what a user should know."""
    from qwen.convert_config import build_config, build_generation_config
    from qwen.convert_tokenizer import (
        keep_tokenizer,
        write_qwen1_tokenizer,
        write_qwen2_tokenizer,
    )
    from qwen.convert_weights import dtype_name

    report("Converting the tokenizer")
    options: Any = {
        "trained_length": model.trained_length,
        "allow_other_ranks": allow_other_ranks,
    }
    renamed: tuple[str, ...] = ()
    ends: EndTokens | None = None
    is_chat = not model.is_raw
    if model.keeps_tokenizer:
        keep_tokenizer(source, folder)
    elif model.to == "qwen2":
        ends = write_qwen2_tokenizer(source, folder, is_chat=is_chat, **options)
    else:
        ends, is_chat, renamed = write_qwen1_tokenizer(source, folder, **options)
    if ends is not None:
        _check_rows(ends, model)
    papers = {
        "config.json": build_config(model, dtype=dtype_name(plan), ends=ends, is_chat=is_chat),
        "generation_config.json": build_generation_config(model, ends=ends, is_chat=is_chat),
    }
    for name, content in papers.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    for path in {path for pattern in _LEGAL_FILES for path in source.glob(pattern)}:
        shutil.copyfile(path, folder / path.name)
    return _notices(model, renamed)


def _check_rows(ends: EndTokens, model: SourceModel) -> None:
    from qwen.tokenization_qwen import SPECIAL_TOKENS

    tokens = ends.endoftext + len(SPECIAL_TOKENS)
    if tokens > model.sizes.vocabulary:
        raise CheckpointUnsupported(
            f"The Qwen v1 tokenizer has {tokens:,} tokens, but the model's embedding has only "
            f"{model.sizes.vocabulary:,} rows (vocab_size). Choose a checkpoint of Qwen."
        )


def _notices(model: SourceModel, renamed: Sequence[str]) -> tuple[str, ...]:
    notices = []
    if model.to == "qwen2":
        notices.append(
            f"The Qwen2 layout is good for {model.trained_length:,} tokens of prompt and reply "
            "(max_position_embeddings): dynamic NTK and log-n, with which Qwen v1 reads more, are "
            "lost in it."
        )
    if model.keeps_tokenizer:
        notices.append(
            "The tokenizer is the source's own (tokenizer.json), not Qwen v1's: this project and "
            "Transformers read it, programs made for Qwen v1 alone do not."
        )
    if renamed:
        more = "" if len(renamed) == 1 else f" and {len(renamed) - 1} more"
        notices.append(
            f"{renamed[0]}{more} are no tokens of Qwen v1: their ids are called <|extra_N|> there, "
            "and their texts are encoded as ordinary text."
        )
    return tuple(notices)


def _check_written(folder: Path, plan: Sequence[PlannedTensor]) -> None:
    """Refuse a target that is not what was planned: an internal fault, not the user's."""
    from qwen.convert_weights import read_headers

    missing = missing_files(folder)
    check_weight_files(folder)
    written = {name: (t.dtype, t.shape) for name, t in read_headers(folder).items()}
    if missing or written != {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan}:
        raise CheckpointDamaged(
            f"What was written to {folder} is not whole. Check the disk, then convert again."
        )


class _ProgressPrinter:
    """A `ReportProgress` that prints a line for every step, however often it is reported."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        if step != self._last:
            print(step, flush=True)
        self._last = step


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen.convert",
        description="Convert a checkpoint between the layouts of Qwen v1 and Qwen2, without loss.",
    )
    parser.add_argument("source", help="a folder, a .gguf file, OWNER/NAME on a hub, or auto")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument("--to", required=True, choices=("qwen1", "qwen2"), help="its layout")
    parser.add_argument(
        "--max-shard-size",
        type=float,
        default=MAX_SHARD_BYTES / 10**9,
        metavar="GB",
        help="size of a weight file, and about the memory needed (%(default)s)",
    )
    parser.add_argument(
        "--allow-other-ranks",
        action="store_true",
        help="take a vocabulary that is not the one published with Qwen",
    )
    options = parser.parse_args(argv)

    report = _ProgressPrinter()
    try:
        _check_target(options.target)
        resolved = resolve_checkpoint(options.source, report=report)
        done = convert_checkpoint(
            resolved.folder,
            options.target,
            to=options.to,
            max_shard_bytes=int(options.max_shard_size * 10**9),
            allow_other_ranks=options.allow_other_ranks,
            report=report,
        )
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for notice in (*resolved.notices, *done.notices):
        print(f"Note: {notice}")
    print(f"Wrote {done.tensors} tensors ({format_bytes(done.size)}) to {done.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
