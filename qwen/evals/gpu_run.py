"""`python -m qwen.evals.gpu_run`: everything that claims a GPU, run on one, in few minutes.

Sections: correctness; speed (decode, prompts, peaks, bf16 and Int4, beside Transformers' `generate`
and the floor that the measured copy bandwidth sets); profile (the kernels that a token's time goes
to); users (1, 8, 32 through the engine); context (32k with dynamic NTK); memory (out of it on
purpose). Random weights: speed does not depend on them. `--dry` runs all of it on tiny shapes, on a
CPU too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen.engine import Engine
from qwen.errors import OutOfMemory, QwenError
from qwen.evals.gpu_checks import reply, run_checks, wait_for_compilation
from qwen.evals.gpu_plan import (
    DRY,
    Plan,
    answer_together,
    build_engine,
    build_model,
    release,
    synchronize,
    timed,
)
from qwen.evals.gpu_profile import profile_steps
from qwen.evals.machine import describe_machine
from qwen.evals.profile import PUBLISHED

SECTIONS = ("correctness", "speed", "profile", "users", "context", "memory")

_GOLDEN = Path("tests/data/golden")


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
        "profile": profile_steps,
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
        release(plan)
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
            model = build_model(plan, size, weights)
            name = f"{size} {'bf16' if weights == 'dense' else 'Int4'}"
            if weights == "dense":
                yield {"what": f"{name}, generate", "tok/s": _peer_speed(model, plan)}
            nbytes = _bytes_per_token(model)
            engine = build_engine(model, max(plan.generated) + plan.prompt + 2)
            yield from _one_model(engine, name, plan, bandwidth / nbytes, (size, weights))
            engine.close()
            del model, engine
            release(plan)


def _one_model(
    engine: Engine, name: str, plan: Plan, floor: float, published_key: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    published = PUBLISHED.get(published_key, ())
    reply(engine, [5], 64)
    wait_for_compilation()
    reply(engine, [5], 300)  # records the graphs of the first buckets with our kernels
    for place, new_tokens in enumerate(plan.generated):
        seconds, peak = timed(partial(reply, engine, [5], new_tokens), plan)
        speed = (new_tokens + 1) / seconds
        row = {"what": f"{name}, generate {new_tokens}", "tok/s": speed, "of floor": speed / floor}
        row |= {"peak GB": peak / 1e9}
        if published:
            row |= {"README, A100 tok/s": published[place]}
        yield row
    prompt = [5 + place % 1000 for place in range(plan.prompt)]
    reply(engine, prompt[:-1], 1)
    seconds, peak = timed(lambda: reply(engine, prompt[::-1], 1), plan)
    yield {"what": f"{name}, prompt of {plan.prompt}", "tok/s": plan.prompt / seconds} | {
        "peak GB": peak / 1e9
    }


def _users(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure the total speed and the first tokens of several users at once."""
    model = build_model(plan, plan.sizes[0], "dense")
    length, new_tokens = plan.user_tokens
    engine = build_engine(model, 4096)
    prompts = [
        [(7 * user + place) % 1000 + 5 for place in range(length)]
        for user in range(max(plan.users))
    ]
    reply(engine, prompts[0], 64)
    wait_for_compilation()
    for users in (*plan.users, *plan.users):  # the first round may move the memory of the second
        answer_together(engine, prompts[:users], new_tokens)  # graphs for this many
    alone = 0.0
    for users in plan.users:
        totals, firsts = [], []
        for number in range(plan.rounds):
            asked = [[5 + number, *prompt[::-1][1:]] for prompt in prompts[:users]]
            started = time.perf_counter()
            firsts += answer_together(engine, asked, new_tokens)
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


def _context(plan: Plan) -> Iterator[dict[str, Any]]:
    """Read a long prompt with dynamic NTK and write behind it."""
    model = build_model(plan, plan.sizes[0], "dense")
    engine = build_engine(model, plan.context)
    new_tokens = min(128, plan.context // 8)
    prompt = [5 + place % 1000 for place in range(plan.context - new_tokens)]
    reply(engine, prompt[: plan.context // 4], 8)
    wait_for_compilation()
    reply(engine, prompt, 8)
    # Two prompts of which nothing is kept: the times differ by the tokens behind the first.
    read, _ = timed(lambda: reply(engine, [1, *prompt[1:]], 1), plan)
    seconds, peak = timed(lambda: reply(engine, [2, *prompt[1:]], new_tokens), plan)
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
    model = build_model(plan, plan.sizes[0], "dense")
    engine = build_engine(model, plan.context)
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
    release(plan)
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
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * nbytes / best


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
    seconds, _ = timed(lambda: run(plan.peer_tokens), plan)
    return plan.peer_tokens / seconds


if __name__ == "__main__":
    sys.exit(main())
