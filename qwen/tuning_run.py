"""The tuning of one quantisation, after its layers: models, text, and what is written at the end.

Knows how long it may take: on a GPU it is minutes and on by default, on a CPU hours and off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen.backend import ReportProgress
from qwen.calibration import ordinary_ids, read_texts
from qwen.errors import OutOfMemory, is_out_of_memory
from qwen.gptq_format import pack_codes
from qwen.quantize_files import WorkFolder
from qwen.quantize_layout import DenseCheckpoint
from qwen.quantize_options import QuantizeOptions
from qwen.quantize_tuning import Distillation, Tuned, TuningOptions, build_student
from qwen.tuning_prompts import build_prompts
from qwen.tuning_text import (
    HELD_OUT,
    OWN_ROWS,
    TuningText,
    build_openings,
    collect_rows,
    mix_rows,
    sample_rows,
)

#: Tokens to tune on where a GPU does it, unless another number is asked for.
GPU_TOKENS = 2_000_000
_SEQUENCE_LENGTH = 512
#: Counts up when the same options give other weights.
_VERSION = 2


def tune_tokens(options: QuantizeOptions, *, device: str) -> int:
    """Return on how many tokens a checkpoint is tuned: as asked for, or the device's default."""
    if options.tune_tokens is not None:
        return options.tune_tokens
    return GPU_TOKENS if device != "cpu" and not options.rtn else 0


def tune_checkpoint(
    dense: DenseCheckpoint,
    options: QuantizeOptions,
    work: WorkFolder,
    report: ReportProgress,
    *,
    tokenizer: Any,
    device: str,
) -> None:
    """Tune the layers in a work folder, if that is asked for and not done yet.

    Args:
        dense: What they were made from.
        options: How.
        work: Holds all layers; what is tuned is written there beside them.
        report: Is told what is being done.
        tokenizer: The checkpoint's, as Transformers loads it.
        device: Where to compute.

    Raises:
        OutOfMemory: Both models do not fit.
        InvalidRequest: The text cannot be read.
    """
    tokens = tune_tokens(options, device=device)
    key = repr((tokens, options.tune_codes, str(options.calibration), _VERSION))
    if work.tuned_done(key):
        report("The tuning is done already")
        return
    if not tokens:
        if device == "cpu" and not options.rtn and options.tune_tokens is None:
            report("Not tuned: on a CPU that takes hours. --tune-tokens N does it all the same")
        return

    def read(name: str) -> Tensor | None:
        return work.read(name, layer=dense.layer_of(name))

    try:
        tuned = tune(
            dense,
            read,
            options=TuningOptions(codes=options.tune_codes),
            tokens=tokens,
            tokenizer=tokenizer,
            file=options.calibration,
            device=device,
            report=report,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_memory_advice(device)) from error
    stored = stored_tensors(tuned.values, dtype=getattr(torch, options.dtype))
    if not all(t.isfinite().all() for t in stored.values() if t.is_floating_point()):
        stored = {}
        report("Warning: the tuned values are too large for float16; the checkpoint stays untuned")
    if tuned.problem:
        report(f"Warning: {tuned.problem}")
    work.write_tuned(stored, key=key)


def tune(
    dense: DenseCheckpoint,
    read: Any,
    *,
    options: TuningOptions,
    tokens: int,
    tokenizer: Any,
    file: Path | None,
    device: str,
    report: ReportProgress,
    text: TuningText | None = None,
) -> Tuned:
    """Tune a quantised checkpoint; see `Distillation`.

    Args:
        dense: What it was made from.
        read: Gives its tensors by their names, None for those that it has not.
        options: How.
        tokens: To read.
        tokenizer: The checkpoint's.
        file: A user's text, instead of the default text.
        device: Where to compute.
        report: Is told what is being done.
        text: What to read, where it is known already.
    """
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    report("Loading the dense model")
    teacher = dense.build_model(dense.read, dtype=dtype, device=device)
    text = text or build_text(
        teacher, dense, tokens=tokens, tokenizer=tokenizer, file=file, report=report
    )
    student = build_student(dense, read, teacher, device=device, dtype=dtype)
    return Distillation(teacher, student, dense.layout, options, dense.read).run(text, report)


def build_text(
    teacher: Any,
    dense: DenseCheckpoint,
    *,
    tokens: int,
    tokenizer: Any,
    file: Path | None,
    report: ReportProgress,
) -> TuningText:
    """Collect the text to tune on; most of it is written by the dense model."""
    from qwen.tokenizer import build_chat_format, build_text_tokenizer

    length = min(_SEQUENCE_LENGTH, dense.context_length)
    rows = max(1, tokens // length)
    ours = build_text_tokenizer(tokenizer)
    chat_format = build_chat_format(tokenizer)
    texts = read_texts(ours, chat_format, file=file)
    real = rows // (OWN_ROWS + 1)
    kinds = [collect_rows(kind, length=length, most=real + 2) for kind in texts]
    ordinary = ordinary_ids(ours, vocabulary=dense.vocabulary)
    count = rows - real + HELD_OUT
    prompts = build_prompts(ours, chat_format, count=0 if file else count // 2)
    prompts = [prompt[: length // 2] for prompt in prompts]
    openings = build_openings(kinds, ordinary, count=count, prompts=prompts)
    report(f"The dense model writes {len(openings) * length:,} tokens to tune on")
    written = sample_rows(teacher, openings, length=length, report=report)
    return mix_rows(kinds, written, count=rows)


def stored_tensors(values: dict[str, Tensor], *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tuned values as a checkpoint stores them, by its names.

    Args:
        values: See `Tuned`.
        dtype: Of norms and biases.
    """
    stored = {}
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        if attribute == "scales":
            stored[name] = value.half().t().contiguous()
        elif attribute == "codes":
            stored[f"{owner}.qweight"] = pack_codes(value.t())
        else:
            stored[name] = value.to(dtype)
    return stored


def _memory_advice(device: str) -> str:
    place = "The GPU's memory does" if device != "cpu" else "Memory does"
    return (
        f"{place} not hold the dense model and the quantised one beside it, which tuning needs. "
        "The layers are done and kept: the same command with --tune-tokens 0 finishes without "
        "tuning."
    )
