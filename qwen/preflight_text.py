"""A preflight in words: a table, a line, a refusal, and what to choose instead.

Pure functions. Advice is given only after the alternative has been computed; names of checkpoints
only where they are published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen.carriers import EMBEDDED_MODEL
from qwen.preflight_decision import Plan, Preflight, decide

#: Published dense chat checkpoints of the owner Qwen, and what their Int4 siblings add to the name.
_INT4_SUFFIXES = {
    **dict.fromkeys(("Qwen-1_8B-Chat", "Qwen-7B-Chat", "Qwen-14B-Chat", "Qwen-72B-Chat"), "-Int4"),
    **{
        f"Qwen2.5-{size}-Instruct": "-GPTQ-Int4"
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    },
}
_GROUP_SIZE = 128

_VERDICTS = {
    "fits": "fits",
    "tight": "fits, with less than a tenth to spare: close other programs",
    "slow": "fits only with weights in slower places, which are brought for every token",
    "too_large": "does not fit",
}


def gigabytes(size: int) -> str:
    """Return bytes as "15.44 GB" (10^9 bytes)."""
    return f"{size / 1e9:.2f} GB"


def describe_place(preflight: Preflight) -> str:
    """Name where a model would run, as "CPU" or "GPU"."""
    if not preflight.plan.on_gpu:
        return "CPU"
    count = len(preflight.free.gpus[: preflight.plan.num_gpus])
    return "GPU" if count == 1 else f"{count} GPUs"


def summarize(preflight: Preflight) -> str:
    """Return one line for a log."""
    estimate = preflight.estimate
    return (
        f"Memory: {gigabytes(estimate.needed)} of {gigabytes(preflight.room)} for "
        f"{preflight.context:,} tokens (weights {gigabytes(estimate.of_kind('weights'))}, cache "
        f"{gigabytes(estimate.of_kind('cache'))})"
    )


def render_table(preflight: Preflight) -> str:
    """Return the table of the command line: every row, the verdict, what to do."""
    p = preflight
    cache = "" if p.plan.kv_cache == "auto" else f", cache in {p.plan.kv_cache}"
    dtype = "6-bit" if p.plan.packs else p.plan.dtype
    title = f"{p.name} · {describe_place(p)} · {dtype}{cache} · {p.context:,} tokens"
    marks = {"always": "", "loading": "  (while loading)", "running": ""}
    rows = [(row.name, row.size, marks[row.phase]) for row in p.estimate.rows]
    rows += [("needed at most at once", p.estimate.needed, ""), ("free", p.room, _limit(p))]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}}  {gigabytes(size):>10}{mark}" for name, size, mark in rows]
    lines.insert(-2, "")
    verdict = f"{p.context:,} tokens: {_VERDICTS[p.verdict]}."
    largest = (
        f"Largest context that fits: {p.largest_context:,} of {p.shape.context_length:,} tokens."
        if p.largest_context
        else "No context fits."
    )
    return "\n".join([title, "", *lines, "", verdict, largest, *advise(p)])


def _limit(preflight: Preflight) -> str:
    if preflight.plan.on_gpu or preflight.free.limited_by == "computer":
        return ""
    return "  (the container's limit)"


def refusal(preflight: Preflight) -> str:
    """Return why a model is not loaded and what to do, with the figures, in several lines."""
    p = preflight
    kinds = {"weights": "weights", "cache": f"cache for {p.context:,} tokens"}
    kinds |= {"activations": "activations", "program": "program"}
    parts = [f"{words} {gigabytes(p.estimate.of_kind(k))}" for k, words in kinds.items()]  # type: ignore[arg-type]
    return "\n".join(
        [
            f"{p.name} does not fit: it needs {gigabytes(p.estimate.needed)} and "
            f"{gigabytes(p.room)} are free ({describe_place(p)}, {p.plan.dtype}).",
            f"Needed: {', '.join(parts)}.",
            *advise(p),
            "To load it all the same, add --skip-preflight.",
        ]
    )


def context_notice(preflight: Preflight) -> str:
    """Return what a user is told when the context is made shorter so that it fits."""
    p = preflight
    more = _int8_advice(p)
    return (
        f"The context is limited to {p.largest_context:,} of {p.shape.context_length:,} tokens: "
        f"more does not fit in the {gigabytes(p.room)} that are free."
        + (f" {more}" if more else "")
    )


def advise(preflight: Preflight) -> tuple[str, ...]:
    """Return what to choose instead, best first; nothing when the whole context fits."""
    p = preflight
    if p.fits and p.largest_context == p.shape.context_length:
        return ()
    found = []
    if not p.fits and p.largest_context:
        found.append(
            f"Shorter: {p.largest_context:,} tokens of prompt and reply together fit. Lower "
            "--max-input-tokens or the longest reply."
        )
    found += [_int8_advice(p), _dtype_advice(p), _int4_advice(p), _place_advice(p)]
    if not p.fits and not p.largest_context and p.name != EMBEDDED_MODEL.name:
        found.append(
            f"Choose a smaller checkpoint: -c auto --cpu-only is {EMBEDDED_MODEL.name}, which "
            "needs 2.5 GB with --dtype bfloat16."
        )
    return tuple(filter(None, found))


def _int8_advice(p: Preflight) -> str:
    if p.plan.kv_cache == "int8":
        return ""
    other = _otherwise(p, kv_cache="int8")
    if other.largest_context <= p.largest_context:
        return ""
    return f"--kv-cache int8 makes room for {other.largest_context:,} tokens."


def _dtype_advice(p: Preflight) -> str:
    if p.plan.dtype != "float32":
        return ""
    other = _otherwise(p, dtype="bfloat16")
    if other.largest_context <= p.largest_context:
        return ""
    return (
        f"--dtype bfloat16 needs {gigabytes(other.estimate.needed)}"
        f"{_and_fits(other)} (half the size; slow on a CPU without bf16 instructions)."
    )


def _int4_advice(p: Preflight) -> str:
    suffix = _INT4_SUFFIXES.get(p.name)
    if suffix is None or p.shape.bits:
        return ""
    shape = replace(p.shape, bits=4, group_size=_GROUP_SIZE, stored_dtype=None, stored_bytes=0)
    other = decide(p.name, shape, plan=p.plan, free=p.free, context=p.context)
    if other.largest_context <= p.largest_context:
        return ""
    return f"Qwen/{p.name}{suffix} needs {gigabytes(other.estimate.needed)}{_and_fits(other)}."


def _place_advice(p: Preflight) -> str:
    if not p.plan.on_gpu:
        return ""
    other = _otherwise(p, on_gpu=False, can_offload=False)
    if not other.largest_context or other.largest_context <= p.largest_context:
        return ""
    return (
        f"--cpu-only: the computer's own memory has room for {other.largest_context:,} tokens, "
        "and is slower."
    )


def _and_fits(other: Preflight) -> str:
    if other.fits:
        return " and would fit"
    return f" and would fit with {other.largest_context:,} tokens"


def _otherwise(p: Preflight, **changes: Any) -> Preflight:
    plan: Plan = replace(p.plan, **changes)
    return decide(p.name, p.shape, plan=plan, free=p.free, context=p.context, further=p.further)
