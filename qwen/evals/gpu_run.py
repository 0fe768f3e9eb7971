"""`python -m qwen.evals.gpu_run`: everything that claims a GPU, run on one, in few minutes.

Sections: correctness; speed (decode, prompts, peaks, bf16 and Int4, beside Transformers' `generate`
and the floor that the measured copy bandwidth sets); profile (the kernels that a token's time goes
to); users (1, 8, 32 through the engine); context (32k with dynamic NTK); memory (out of it on
purpose). Random weights: speed does not depend on them. `--dry` runs all of it on tiny shapes, on a
CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen.engine import Engine
from qwen.errors import OutOfMemory, QwenError
from qwen.evals.gpu_checks import reply, run_checks, wait_for_compilation
from qwen.evals.machine import describe_machine
from qwen.evals.profile import PUBLISHED
from qwen.evals.random_models import build_random_model
from qwen.fast_decoder import build_decoder
from qwen.messages import SamplingParams

SECTIONS = ("correctness", "speed", "profile", "users", "context", "memory")

_KERNELS_SHOWN = 10

_GOLDEN = Path("tests/data/golden")


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


def main() -> int:
    """Run the sections, print and write; exit code 1 where a check is wrong."""
    given = _parser().parse_args()
    plan = DRY if given.dry else Plan()
    if given.sizes:
        plan = replace(plan, sizes=tuple(given.sizes))
    if given.generated:
        plan = replace(plan, generated=tuple(given.generated))
    if plan.device == "cuda" and not torch.cuda.is_available():
        print("Error: there is no GPU here; --dry runs tiny shapes on a CPU.", file=sys.stderr)
        return 2
    machine = describe_machine("torch", "transformers")
    print(machine, flush=True)
    rows: list[dict[str, Any]] = []
    work: dict[str, Callable[[Plan], Iterator[dict[str, Any]]]] = {
        "correctness": lambda plan: _correctness(plan, given.golden),
        "speed": _speed,
        "profile": _profile,
        "users": _users,
        "context": _context,
        "memory": _memory,
    }
    for section in given.sections:
        started = time.perf_counter()
        print(f"== {section}", flush=True)
        for row in work[section](plan):
            rows.append({"section": section, **row})
            print("  " + _line(row), flush=True)
            if given.json:  # after each row: a call that is cut off leaves what it has
                text = json.dumps({"machine": machine, "rows": rows}, indent=1)
                given.json.write_text(text + "\n", encoding="utf-8")
        _release(plan)
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    return 1 if any(row.get("is_right") is False for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen.evals.gpu_run", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", metavar="SIZE")
    parser.add_argument("--generated", nargs="+", type=int, metavar="N")
    parser.add_argument("--golden", type=Path, default=_GOLDEN, metavar="FOLDER")
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _line(row: dict[str, Any]) -> str:
    parts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "what"
    ]
    return f"{row['what']}: {', '.join(parts)}"


def _correctness(plan: Plan, golden: Path) -> Iterator[dict[str, Any]]:
    for check in run_checks(golden, plan.device):
        yield {
            "what": check.name,
            "error": float(check.error),
            "limit": float(check.limit),
            "is_right": check.is_right,
        }


def _speed(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure each size in bf16 and Int4: decode, prompt, peaks; floors and published figures."""
    bandwidth = copy_bandwidth(plan.device)
    yield {"what": "copy bandwidth, reads and writes", "TB/s": bandwidth / 1e12}
    for size in plan.sizes:
        for weights in ("dense", "int4"):
            model = _model(plan, size, weights)
            name = f"{size} {'bf16' if weights == 'dense' else 'Int4'}"
            if weights == "dense":
                yield {"what": f"{name}, generate", "tok/s": _peer_speed(model, plan)}
            nbytes = _bytes_per_token(model)
            engine = _engine(model, max(plan.generated) + plan.prompt + 2)
            yield from _one_model(engine, name, plan, bandwidth / nbytes, (size, weights))
            engine.close()
            del model, engine
            _release(plan)


def _one_model(
    engine: Engine, name: str, plan: Plan, floor: float, published_key: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    published = PUBLISHED.get(published_key, ())
    reply(engine, [5], 64)
    wait_for_compilation()
    reply(engine, [5], 300)  # records the graphs of the first buckets with our kernels
    for place, new_tokens in enumerate(plan.generated):
        seconds, peak = _timed(partial(reply, engine, [5], new_tokens), plan)
        speed = (new_tokens + 1) / seconds
        row = {"what": f"{name}, generate {new_tokens}", "tok/s": speed, "of floor": speed / floor}
        row |= {"peak GB": peak / 1e9}
        if published:
            row |= {"README, A100 tok/s": published[place]}
        yield row
    prompt = [5 + place % 1000 for place in range(plan.prompt)]
    reply(engine, prompt[:-1], 1)
    seconds, peak = _timed(lambda: reply(engine, prompt[::-1], 1), plan)
    yield {"what": f"{name}, prompt of {plan.prompt}", "tok/s": plan.prompt / seconds} | {
        "peak GB": peak / 1e9
    }


def _profile(plan: Plan) -> Iterator[dict[str, Any]]:
    """Say which kernels a step's time goes to, and how long the GPU waits for the next."""
    for weights, users in (("dense", 1), ("dense", plan.profiled_users), ("int4", 1)):
        model = _model(plan, plan.sizes[0], weights)
        name = f"{plan.sizes[0]} {'bf16' if weights == 'dense' else 'Int4'}, {users} users"
        engine = _engine(model, 4096)
        steps = plan.profiled
        work = partial(_together, engine, [[5 + user] for user in range(users)], steps)
        for _ in range(2):  # the second records the graphs of our kernels
            work()
            wait_for_compilation()
        seconds, _ = _timed(work, plan)
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
        _release(plan)


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


def _users(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure the total speed and the first tokens of several users at once."""
    model = _model(plan, plan.sizes[0], "dense")
    length, new_tokens = plan.user_tokens
    engine = _engine(model, 4096)
    prompts = [
        [(7 * user + place) % 1000 + 5 for place in range(length)]
        for user in range(max(plan.users))
    ]
    reply(engine, prompts[0], 64)
    wait_for_compilation()
    for users in (*plan.users, *plan.users):  # the first round may move the memory of the second
        _together(engine, prompts[:users], new_tokens)  # graphs for this many
    alone = 0.0
    for users in plan.users:
        totals, firsts = [], []
        for number in range(plan.rounds):
            asked = [[5 + number, *prompt[::-1][1:]] for prompt in prompts[:users]]
            started = time.perf_counter()
            firsts += _together(engine, asked, new_tokens)
            totals.append(users * new_tokens / (time.perf_counter() - started))
        total = statistics.median(totals)
        alone = alone or total
        yield {
            "what": f"{plan.sizes[0]} bf16, {users} users, {length} + {new_tokens} tokens",
            "total tok/s": total,
            "of one user": total / alone,
            "first token p50 ms": statistics.median(firsts) * 1e3,
            "first token p95 ms": sorted(firsts)[int(0.95 * (len(firsts) - 1))] * 1e3,
        }
    engine.close()


def _together(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[float]:
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


def _context(plan: Plan) -> Iterator[dict[str, Any]]:
    """Read a long prompt with dynamic NTK and write behind it."""
    model = _model(plan, plan.sizes[0], "dense")
    engine = _engine(model, plan.context)
    new_tokens = min(128, plan.context // 8)
    prompt = [5 + place % 1000 for place in range(plan.context - new_tokens)]
    reply(engine, prompt[: plan.context // 4], 8)
    wait_for_compilation()
    reply(engine, prompt, 8)
    # Two prompts of which nothing is kept: the times differ by the tokens behind the first.
    read, _ = _timed(lambda: reply(engine, [1, *prompt[1:]], 1), plan)
    seconds, peak = _timed(lambda: reply(engine, [2, *prompt[1:]], new_tokens), plan)
    yield {
        "what": f"{plan.sizes[0]} bf16, context {plan.context}, alpha "
        f"{model.config.ntk_alpha(len(prompt))}",
        "prompt tok/s": len(prompt) / read,
        "decode tok/s": (new_tokens - 1) / (seconds - read),
        "peak GB": peak / 1e9,
    }
    engine.close()


def _memory(plan: Plan) -> Iterator[dict[str, Any]]:
    """Run out of memory on purpose: the request fails by name, the next one works."""
    if plan.device != "cuda":
        return
    model = _model(plan, plan.sizes[0], "dense")
    engine = _engine(model, plan.context)
    reply(engine, [5], 16)
    wait_for_compilation()
    before = reply(engine, [5, 6, 7], 16)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - 600 * 2**20, 0), dtype=torch.uint8, device=plan.device)
    prompt = [5 + place % 1000 for place in range(plan.context - 64)]
    try:
        reply(engine, prompt, 8)
        outcome = "answered: there was memory enough"
    except OutOfMemory as error:
        outcome = f"refused: {error}"
    except QwenError as error:
        outcome = f"failed: {error}"
    del ballast
    _release(plan)
    is_as_before = reply(engine, [5, 6, 7], 16) == before
    yield {
        "what": "out of memory on purpose",
        "outcome": outcome,
        "next reply is as before": is_as_before,
        "is_right": outcome.startswith("refused") and is_as_before,
    }
    yield {"what": "the long prompt once there is memory", "tokens": len(reply(engine, prompt, 8))}
    engine.close()


def copy_bandwidth(device: str) -> float:
    """Measure bytes read and written a second by a copy within the device."""
    nbytes = 2**31 if device == "cuda" else 2**26
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        _synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * nbytes / best


def _model(plan: Plan, size: str, weights: Any) -> Any:
    dtype = torch.bfloat16
    return build_random_model(size, device=plan.device, dtype=dtype, weights=weights)


def _engine(model: Any, context_length: int) -> Engine:
    decoder = build_decoder(model)
    return Engine(model, eos_token_ids=(), context_length=context_length, decoder=decoder)


def _bytes_per_token(model: Any) -> int:
    """Return the bytes of weights that one token reads: all but the embedding's other rows."""
    embedding = model.get_input_embeddings().weight
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not embedding)


def _peer_speed(model: Any, plan: Plan) -> float:
    ids = torch.full((1, 64), 5, device=plan.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "repetition_penalty": 1.0,
    }

    def run(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)

    run(4)
    seconds, _ = _timed(lambda: run(plan.peer_tokens), plan)
    return plan.peer_tokens / seconds


def _timed(work: Callable[[], object], plan: Plan) -> tuple[float, int]:
    """Return seconds and the peak of the GPU's memory in bytes (0 on a CPU)."""
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _synchronize(plan.device)
    started = time.perf_counter()
    work()
    _synchronize(plan.device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_reserved() if plan.device == "cuda" else 0


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _release(plan: Plan) -> None:
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
