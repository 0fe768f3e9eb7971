"""`make bench`: the local engine side by side with llama.cpp and with Transformers' `generate`.

Every contestant has its own process and two threads; they take turns, so that a machine that slows
down slows all of them. Ends with a line for each row, and with exit code 1 where one falls short.
A contestant that is missing is an error, not a row less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen.errors import QwenError
from qwen.evals.contestants import (
    Contestant,
    LlamaCpp,
    OurEngine,
    TransformersGenerate,
    embedded_gguf,
    running,
)
from qwen.evals.machine import describe_machine
from qwen.evals.mixed_text import mixed_ids
from qwen.evals.report import Comparison, Samples, write_json, write_plot

#: Tokens that `generate` makes a round: it is slow, and its speed does not depend on how many.
_GENERATE_TOKENS = 24

#: Bytes of a process beside its weights that the memory target allows.
_PROGRAM_BYTES = 600 * 10**6

_FIRST_TOKEN = """
import sys, threading, time
from qwen.load_options import LoadOptions
from qwen.local import load_backend
from qwen.messages import ChatRequest, Message, SamplingParams
backend = load_backend("auto", LoadOptions(device="cpu"))
request = ChatRequest((Message("user", "Hello"),), params=SamplingParams(max_new_tokens=8))
for event in backend.stream(request, threading.Event()):
    if event.text:
        print(time.time(), flush=True)
        break
import os
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What the rows measure with.

    Attributes:
        ids: A long text as token ids; each round takes another place of it as its prompt.
        rounds: How often everything is measured.
    """

    ours: Contestant
    llama: Contestant
    generate: Contestant
    ids: Sequence[int]
    rounds: int

    def prompts(self, length: int) -> Iterator[Sequence[int]]:
        """Yield a prompt for each round after one to warm up with; no two begin alike."""
        step = (len(self.ids) - length) // (self.rounds + 1)
        if step < 1:
            raise ValueError(f"the text is too short for {self.rounds + 1} prompts of {length}")
        for number in range(self.rounds + 1):
            yield self.ids[number * step : number * step + length]


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/bench.png"))
    given = parser.parse_args()
    machine = describe_machine("torch", "transformers", "xllamacpp")
    print(machine, flush=True)
    try:
        comparisons = _measure(given.rows, given.rounds)
    except QwenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, machine, comparisons)
    write_plot(given.plot, machine, comparisons)
    print(f"\n{machine}", *comparisons, sep="\n")
    return 0 if all(row.is_met for row in comparisons) else 1


def _measure(names: Sequence[str], rounds: int) -> list[Comparison]:
    comparisons = []
    with (
        running(OurEngine, "auto") as ours,
        running(LlamaCpp, str(embedded_gguf())) as llama,
        running(TransformersGenerate, "auto") as generate,
    ):
        setup = Setup(ours, llama, generate, mixed_ids("auto"), rounds)
        for name in names:
            for comparison in ROWS[name](setup):
                comparisons.append(comparison)
                print(comparison, flush=True)
    return comparisons


def _decode(setup: Setup, context: int) -> Iterator[Comparison]:
    ours, llama, generate = [], [], []
    for prompt in setup.prompts(context):
        ours.append(setup.ours.reply(prompt, 128).tokens_per_second)
        llama.append(setup.llama.reply(prompt, 128).tokens_per_second)
        generate.append(setup.generate.reply(prompt, _GENERATE_TOKENS).tokens_per_second)
    name = f"CPU decode, 128 tokens after {context:,}"
    mine = _warm(ours, "tok/s")
    yield Comparison(name, mine, "llama.cpp", _warm(llama, "tok/s"), 1.0, "higher")
    yield Comparison(name, mine, "generate bf16", _warm(generate, "tok/s"), 4.0, "higher")


def _prefill(setup: Setup) -> Iterator[Comparison]:
    speeds: dict[str, list[float]] = {"ours": [], "llama": []}
    for prompt in setup.prompts(1024):
        speeds["ours"].append(len(prompt) / setup.ours.reply(prompt, 1).prompt_seconds)
        speeds["llama"].append(len(prompt) / setup.llama.reply(prompt, 1).prompt_seconds)
    yield Comparison(
        "CPU prefill, 1,024 tokens",
        _warm(speeds["ours"], "tok/s"),
        "llama.cpp",
        _warm(speeds["llama"], "tok/s"),
        1.3,
        "higher",
    )


def _later_turn(setup: Setup) -> Iterator[Comparison]:
    first: list[float] = []
    later: list[float] = []
    for prompt in setup.prompts(1920):
        question = list(prompt[:20])
        first.append(
            setup.ours.reply([setup.ids[-1 - len(first)], *question[1:]], 8).prompt_seconds
        )
        answer = setup.ours.reply(prompt, 80).token_ids
        later.append(setup.ours.reply([*prompt, *answer, *question], 8).prompt_seconds)
    yield Comparison(
        "time to first token, 2,000 tokens of history and 20 new",
        _warm([1e3 * t for t in later], "ms"),
        "a first turn of 20",
        _warm([1e3 * t for t in first], "ms"),
        1.3,
        "lower",
    )


def _perplexity(setup: Setup) -> Iterator[Comparison]:
    from qwen.evals.fast_path import fast_path_perplexities

    for form, ours, exact in fast_path_perplexities("auto"):
        yield Comparison(
            f"perplexity of the fast path, {form} form",
            Samples((ours,), ""),
            "float32",
            Samples((exact,), ""),
            1.01,
            "lower",
        )


def _start(setup: Setup) -> Iterator[Comparison]:
    seconds = []
    for _ in range(setup.rounds + 1):
        started = time.time()
        ran = subprocess.run(
            [sys.executable, "-c", _FIRST_TOKEN], capture_output=True, text=True, check=True
        )
        seconds.append(float(ran.stdout.split()[-1]) - started)
    limit = Samples((8.0,), "s")
    yield Comparison(
        "start with cached weights, to first token", _warm(seconds, "s"), "limit", limit, 1, "lower"
    )


def _memory(setup: Setup) -> Iterator[Comparison]:
    facts = setup.ours.facts()
    peak = facts.pop("peak")
    forms = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in facts.items())
    allowed = 1.3 * sum(facts.values()) + _PROGRAM_BYTES
    yield Comparison(
        f"peak memory ({forms})",
        Samples((peak / 1e6,), "MB"),
        "1.3 × weights + 600 MB",
        Samples((allowed / 1e6,), "MB"),
        1.0,
        "lower",
    )


def _warm(values: Sequence[float], unit: str) -> Samples:
    """Leave out the first round, which warmed up."""
    return Samples(tuple(values[1:]), unit)


#: The memory row comes last, so that it sees the peak of all others.
ROWS: dict[str, Callable[[Setup], Iterator[Comparison]]] = {
    "decode-64": lambda setup: _decode(setup, 64),
    "decode-2048": lambda setup: _decode(setup, 2048),
    "prefill": _prefill,
    "later-turn": _later_turn,
    "perplexity": _perplexity,
    "start": _start,
    "memory": _memory,
}

if __name__ == "__main__":
    sys.exit(main())
