"""The section `profile` of `qwen.evals.gpu_run`: which kernels a step's time goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from qwen.evals.gpu_checks import wait_for_compilation
from qwen.evals.gpu_plan import Plan, answer_together, build_engine, build_model, release, timed

_KERNELS_SHOWN = 10


def profile_steps(plan: Plan) -> Iterator[dict[str, Any]]:
    """Say which kernels a step's time goes to, and how long the GPU waits for the next."""
    for weights, users in (("dense", 1), ("dense", plan.profiled_users), ("int4", 1)):
        model = build_model(plan, plan.sizes[0], weights)
        name = f"{plan.sizes[0]} {'bf16' if weights == 'dense' else 'Int4'}, {users} users"
        engine = build_engine(model, 4096)
        steps = plan.profiled
        work = partial(answer_together, engine, [[5 + user] for user in range(users)], steps)
        for _ in range(2):  # the second records the graphs of our kernels
            work()
            wait_for_compilation()
        seconds, _ = timed(work, plan)
        kernels = _kernel_times(work)
        yield {
            "what": f"{name}, a step of {steps}",
            "wall ms": seconds / steps * 1e3,
            "kernels ms": sum(total for total, _ in kernels.values()) / steps * 1e3,
            "kernels": sum(calls for _, calls in kernels.values()) / steps,
        }
        for kernel in sorted(kernels, key=lambda key: -kernels[key][0])[:_KERNELS_SHOWN]:
            total, calls = kernels[kernel]
            row = {"us a step": total / steps * 1e6, "us a call": total / calls * 1e6}
            yield {"what": f"  {kernel[:90]}", **row, "calls": calls / steps}
        engine.close()
        del model, engine, work
        release(plan)


def _kernel_times(work: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Return seconds and calls of each kernel that ran on the GPU; none without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / 1e6, event.count)
        for event in profiler.key_averages()
        if event.self_device_time_total
    }
