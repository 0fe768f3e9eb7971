"""A dense checkpoint → a GPTQ Int4 one, in the format of the published Qwen-*-Chat-Int4.

`python -m qwen.quantize SOURCE TARGET`. Linear layers of the blocks get 4-bit codes; embedding,
head and norms stay dense. By default the codes are those that change the layers' outputs least on
calibration text (`qwen.gptq_solver`), with `--rtn` each weight is rounded by itself. Holds one
layer in memory at a time, and a run that was cut short goes on at the layer that it was at.
Format: AutoGPTQ, version 1; see docs/quantisation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen.backend import ReportProgress, ignore_progress
from qwen.checkpoint import resolve_checkpoint
from qwen.checkpoint_files import check_weight_files, missing_files
from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    InvalidRequest,
    InvalidSetting,
    QwenError,
)
from qwen.quantize_options import (
    GROUP_SIZES,
    QuantizeOptions,
    build_papers,
    build_recipe,
    check_options,
)
from qwen.weights_cache import disk_full_explained, format_bytes, require_space

if TYPE_CHECKING:
    from qwen.calibration import Calibration
    from qwen.quantize_layout import DenseCheckpoint
    from qwen.quantize_run import DeviceChoice

MAX_SHARD_BYTES = 2 * 10**9
_ADVICE = "Free some space, or name a target on a larger disk."


@dataclass(frozen=True, slots=True)
class Quantization:
    """A finished quantisation.

    Attributes:
        folder: The target.
        tensors: How many were written.
        size: Bytes of the weights.
    """

    folder: Path
    tensors: int
    size: int


def quantize_checkpoint(
    source: Path,
    target: Path,
    options: QuantizeOptions | None = None,
    *,
    device: DeviceChoice = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: ReportProgress = ignore_progress,
) -> Quantization:
    """Quantise the weights of a checkpoint; go on with an earlier run that did not end.

    Args:
        source: Folder of a dense checkpoint; only read.
        target: Folder to make; it may exist if it is empty.
        options: How; the default ones if None.
        device: "auto" is the first GPU if CUDA finds one.
        max_shard_bytes: Size of the weight files, about.
        report: Is told what is being done.

    Raises:
        CheckpointError: The source cannot be read or is of a kind that is not quantised.
        InvalidRequest: The target is not empty, or the calibration text is of no use.
        InvalidSetting: An option outside its range.
        DiskFull: There is no room for the target.
        OutOfMemory: A layer does not fit into memory.
    """
    options = options or QuantizeOptions()
    source, target = source.expanduser().absolute(), target.expanduser().absolute()
    _check_target(target)
    _check_source(source)
    check_options(options)
    from qwen.quantize_layout import DenseCheckpoint
    from qwen.quantize_run import linear_shapes

    dense = DenseCheckpoint(source)
    linear_shapes(dense, options.group_size)
    calibration = None if options.rtn else _read_calibration(dense, options)
    tuned = options.tune_tokens != 0 and not (options.rtn and options.tune_tokens is None)
    tokenizer = load_tokenizer(source) if tuned else None
    try:
        tensors, size = _fill(
            target, dense, options, calibration, tokenizer, device, max_shard_bytes, report
        )
    except OSError as error:
        raise InvalidRequest(
            f"{target} cannot be written to: {error.strerror}. Name another folder."
        ) from error
    return Quantization(folder=target, tensors=tensors, size=size)


def _fill(
    target: Path,
    dense: DenseCheckpoint,
    options: QuantizeOptions,
    calibration: Calibration | None,
    tokenizer: Any,
    device: DeviceChoice,
    max_shard_bytes: int,
    report: ReportProgress,
) -> tuple[int, int]:
    """Work in a folder beside the target, which stays when the work is cut short."""
    from qwen.quantize_files import WorkFolder, fingerprint, only_one, write_papers
    from qwen.quantize_run import QuantizationRun, bytes_needed
    from qwen.sensitivity import build_rules
    from qwen.tuning_run import tune_checkpoint

    part = target.with_name(target.name + ".part")
    needed = bytes_needed(dense, options)
    text = calibration.fingerprint if calibration else None
    key = fingerprint(dense.folder, build_recipe(options, calibration=text))
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(part), disk_full_explained(target.parent, needed, advice=_ADVICE):
        work = WorkFolder(part, key=key)
        if not work.layers_done():
            require_space(target.parent, needed, advice=_ADVICE)
        run = QuantizationRun(dense, options, calibration, work, report, device=device)
        run.quantize_layers()
        tune_checkpoint(dense, options, work, report, tokenizer=tokenizer, device=run.device)
        rules = build_rules(dense.layout, run.in_8_bits, group_size=options.group_size)
        write_papers(dense.folder, part, build_papers(dense.raw_config, options, rules=rules))
        written = work.assemble(layers=dense.count, max_shard_bytes=max_shard_bytes, report=report)
    work.finish(target)
    return written


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


def _read_calibration(dense: DenseCheckpoint, options: QuantizeOptions) -> Calibration:
    from qwen.calibration import build_calibration
    from qwen.tokenizer import build_chat_format, build_text_tokenizer

    if options.sequence_length > dense.context_length:
        raise InvalidSetting(
            f"A row of {options.sequence_length:,} tokens is longer than the model's context of "
            f"{dense.context_length:,}. Choose a shorter --sequence-length."
        )
    tokenizer = load_tokenizer(dense.folder)
    return build_calibration(
        build_text_tokenizer(tokenizer),
        build_chat_format(tokenizer),
        file=options.calibration,
        vocabulary=dense.vocabulary,
        samples=options.samples,
        sequence_length=options.sequence_length,
    )


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        CheckpointDamaged: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointDamaged(
            f"The tokenizer in {folder} cannot be read. Fetch its files again."
        ) from error


class _ProgressPrinter:
    """A `ReportProgress` that prints a line for every step, however often it is reported."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        if total:
            return  # the line that follows a layer says more
        if step != self._last:
            print(step, flush=True)
        self._last = step


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the command line says; return the exit status."""
    options = _build_parser().parse_args(argv)
    report = _ProgressPrinter()
    try:
        _check_target(options.target)
        chosen = QuantizeOptions(
            group_size=options.group_size,
            rtn=options.rtn,
            calibration=options.calibration,
            samples=options.samples,
            sequence_length=options.sequence_length,
            dtype=options.dtype,
            damp_percent=options.damp_percent,
            rounds=options.rounds,
            max_loss=options.max_loss,
            tune_tokens=options.tune_tokens,
            tune_codes=options.tune_codes,
        )
        check_options(chosen)
        resolved = resolve_checkpoint(options.source, report=report)
        done = quantize_checkpoint(
            resolved.folder, options.target, chosen, device=options.device, report=report
        )
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on after the last finished layer.", file=sys.stderr)
        return 130
    for notice in resolved.notices:
        print(f"Note: {notice}")
    print(f"Wrote {done.tensors} tensors ({format_bytes(done.size)}) to {done.folder}")
    return 0


def _loss(text: str) -> float | None:
    try:
        return None if text == "off" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor off") from None


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwen.quantize",
        description="Make a GPTQ Int4 checkpoint from a dense one. A run that was cut short goes "
        "on when the same command is given again.",
    )
    parser.add_argument("source", help="a folder, a .gguf file, OWNER/NAME on a hub, or auto")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="where to compute; auto is a GPU if there is one",
    )
    defaults = QuantizeOptions()
    _add_precision(parser.add_argument_group("what is made"), defaults)
    _add_calibration(parser.add_argument_group("how layers are calibrated"), defaults)
    _add_tuning(parser.add_argument_group("how the whole model is tuned after its layers"))
    return parser


def _add_precision(group: argparse._ArgumentGroup, defaults: QuantizeOptions) -> None:
    group.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=defaults.group_size,
        help="inputs that share a scale; smaller is more exact and larger on disk (%(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        default=defaults.dtype,
        help="of embedding, head and norms (%(default)s, as published)",
    )
    group.add_argument(
        "--max-loss",
        type=_loss,
        default=defaults.max_loss,
        metavar="NATS",
        help="what 4 bits may cost a token by an estimate; layers that cost most get 8 bits until "
        "that is met, many in a small model (%(default)s); off: 4 bits everywhere, for readers of "
        "GPTQ that know nothing else",
    )


def _add_calibration(group: argparse._ArgumentGroup, defaults: QuantizeOptions) -> None:
    group.add_argument(
        "--rtn",
        action="store_true",
        help="round to nearest, in 4 bits everywhere: fast, and loses much more",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a UTF-8 text like what the model will read; by default text that comes with Python "
        "and with this project",
    )
    group.add_argument(
        "--samples", type=int, default=defaults.samples, help="rows of it (%(default)s)"
    )
    group.add_argument(
        "--sequence-length",
        type=int,
        default=defaults.sequence_length,
        metavar="TOKENS",
        help="length of a row (%(default)s)",
    )
    group.add_argument(
        "--damp-percent",
        type=float,
        default=defaults.damp_percent,
        metavar="FRACTION",
        help="how little the calibration text is trusted (%(default)s)",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=defaults.rounds,
        help="how often scales and codes are improved after the first pass (%(default)s)",
    )


def _add_tuning(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tune-tokens",
        type=int,
        metavar="N",
        help="tokens that the whole model is tuned on after its layers; 0 is none (by default "
        "2,000,000 on a GPU, which takes minutes, and none on a CPU, where it takes hours)",
    )
    group.add_argument(
        "--tune-codes",
        action="store_true",
        help="tune the codes too, not only scales, norms and biases: 16 more bytes of memory for "
        "every weight",
    )


if __name__ == "__main__":
    sys.exit(main())
