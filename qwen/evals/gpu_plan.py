"""What `qwen.evals.gpu_run` runs, and what its sections share: models, engines, clocks."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwen.engine import Engine
from qwen.evals.random_models import build_random_model
from qwen.fast_decoder import build_decoder
from qwen.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        device: As torch spells it.
        sizes: Of `qwen.evals.random_models`.
        generated: Tokens of a reply whose speed is measured, one measurement each.
        peer_tokens: Tokens that Transformers' `generate` makes.
        prompt: Tokens of the long prompt; the README's is 2,048.
        users: Numbers of users.
        rounds: How often they ask; the medians count.
        user_tokens: Tokens of each user's prompt and reply.
        profiled: Tokens of the replies whose kernels are timed; within a graph's first bucket.
        profiled_users: Users whose steps are timed, besides one.
        context: Tokens of the long context.
    """

    device: str = "cuda"
    sizes: tuple[str, ...] = ("7b", "14b")
    generated: tuple[int, ...] = (2048, 8192)
    peer_tokens: int = 64
    prompt: int = 2048
    users: tuple[int, ...] = (1, 8, 32)
    rounds: int = 5
    user_tokens: tuple[int, int] = (200, 128)
    profiled: int = 250
    profiled_users: int = 8
    context: int = 32768


DRY = Plan(
    device="cuda" if torch.cuda.is_available() else "cpu",
    sizes=("tiny",),
    generated=(32, 64),
    peer_tokens=8,
    prompt=128,
    users=(1, 3),
    rounds=2,
    user_tokens=(20, 8),
    profiled=16,
    profiled_users=3,
    context=4096,
)


def build_model(plan: Plan, size: str, weights: Any) -> Any:
    """Build a model of random weights, "dense" or "int4"."""
    dtype = torch.bfloat16
    return build_random_model(size, device=plan.device, dtype=dtype, weights=weights)


def build_engine(model: Any, context_length: int) -> Engine:
    """Build an engine whose replies never end by themselves."""
    decoder = build_decoder(model)
    return Engine(model, eos_token_ids=(), context_length=context_length, decoder=decoder)


def answer_together(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Answer prompts at once; return the seconds to each one's first token."""
    firsts = [0.0] * len(prompts)

    def answer(place: int) -> None:
        started = time.perf_counter()
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=new_tokens)
        for step in engine.submit(prompts[place], params, cancel=threading.Event()):
            if step.token_id is not None and not firsts[place]:
                firsts[place] = time.perf_counter() - started

    threads = [threading.Thread(target=answer, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return firsts


def timed(work: Callable[[], object], plan: Plan) -> tuple[float, int]:
    """Return seconds and the peak of the GPU's memory in bytes (0 on a CPU)."""
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(plan.device)
    started = time.perf_counter()
    work()
    synchronize(plan.device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_reserved() if plan.device == "cuda" else 0


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(plan: Plan) -> None:
    """Give back the memory of what nobody holds."""
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
