"""Does a model fit? Pure decisions on its sizes and on what is free.

Knows no name of a checkpoint, no machine and no words; `qwen.preflight_text` says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen.free_memory import FreeMemory
from qwen.memory_model import (
    PROGRAM_BYTES,
    Dtype,
    KvCache,
    MemoryEstimate,
    MemoryItem,
    ModelShape,
    estimate_memory,
    largest_context,
)

#: "tight" fits with less than a tenth to spare; "slow" fits if weights wait in slower places.
Verdict = Literal["fits", "tight", "slow", "too_large"]

_TIGHT = 0.9
#: As `qwen.placement` has it: what a GPU keeps for a conversation, and the part of the computer's
#: memory that may hold weights of a GPU's model.
_MOST_WORKING_ROOM = 2_500_000_000
_PART_OF_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is to be run.

    Attributes:
        chunk: Tokens of a prompt that are read at once.
        packs: Whether weights are packed into 6 bits once they are read.
        num_gpus: Of how many GPUs the user wants to make use; None is as few as needed.
        can_offload: Whether weights may wait on disk.
    """

    dtype: Dtype
    chunk: int
    kv_cache: KvCache = "auto"
    packs: bool = False
    on_gpu: bool = False
    num_gpus: int | None = None
    can_offload: bool = False


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is known before a model is fetched or loaded.

    Attributes:
        name: Of the model, as a user knows it.
        context: Tokens of prompt and reply that the estimate is for.
        room: Bytes that are free for it, in all places that it would use.
        largest_context: Tokens that fit, up to the model's own context; 0 if it never fits.
        further: Rows that are not of the model's sizes.
    """

    name: str
    shape: ModelShape
    plan: Plan
    free: FreeMemory
    context: int
    estimate: MemoryEstimate
    room: int
    verdict: Verdict
    largest_context: int
    further: tuple[MemoryItem, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be loaded and used with this context."""
        return self.verdict != "too_large"


def decide(
    name: str,
    shape: ModelShape,
    *,
    plan: Plan,
    free: FreeMemory,
    context: int | None = None,
    further: tuple[MemoryItem, ...] = (),
) -> Preflight:
    """Compare what a model needs with what is free.

    Args:
        name: Of the model.
        shape: Its sizes.
        plan: How it is to be run.
        free: What is free.
        context: Tokens of prompt and reply; None is the model's whole context, and so is more.
        further: Rows for whatever else is kept.
    """
    context = min(context or shape.context_length, shape.context_length)

    def estimate(tokens: int) -> MemoryEstimate:
        return estimate_memory(
            shape,
            context=tokens,
            dtype=plan.dtype,
            chunk=plan.chunk,
            kv_cache=plan.kv_cache,
            packs=plan.packs,
            on_gpu=plan.on_gpu,
            program=max(free.own, PROGRAM_BYTES),
            further=further,
        )

    needs = estimate(context)
    room, verdict = _judge(needs, plan, free)
    return Preflight(
        name=name,
        shape=shape,
        plan=plan,
        free=free,
        context=context,
        estimate=needs,
        room=room,
        verdict=verdict,
        largest_context=largest_context(
            lambda tokens: _judge(estimate(tokens), plan, free)[1] != "too_large",
            limit=shape.context_length,
        ),
        further=further,
    )


def _judge(needs: MemoryEstimate, plan: Plan, free: FreeMemory) -> tuple[int, Verdict]:
    """Return the room for a model and whether it is enough."""
    if plan.on_gpu:
        return _judge_gpus(needs, plan, free)
    if needs.needed <= free.memory:
        return free.memory, _fits(needs.needed, free.memory)
    without_weights = needs.needed - needs.of_kind("weights")
    if plan.can_offload and without_weights <= free.memory:
        return free.memory, "slow"
    return free.memory, "too_large"


def _judge_gpus(needs: MemoryEstimate, plan: Plan, free: FreeMemory) -> tuple[int, Verdict]:
    weights = needs.of_kind("weights")
    working = min(weights // 4, _MOST_WORKING_ROOM)
    gpus = free.gpus[: plan.num_gpus]
    single = [gpu for gpu in gpus if weights <= gpu - working] if plan.num_gpus in (None, 1) else []
    for_weights = sum(max(gpu - working, 0) for gpu in gpus)
    if single or weights <= for_weights:
        room = single[0] if single else sum(gpus)
        return room, _fits(needs.needed, room) if needs.needed <= room else "too_large"
    in_memory = int(free.memory * _PART_OF_MEMORY)
    has_room = plan.can_offload or weights <= for_weights + in_memory
    if has_room and needs.needed - weights <= working * len(gpus):
        return sum(gpus) + in_memory, "slow"
    return sum(gpus) + in_memory, "too_large"


def _fits(needed: int, room: int) -> Verdict:
    return "tight" if needed > room * _TIGHT else "fits"
