"""`make bench-users`: the web app with many users, beside llama.cpp's server with as many slots.

The app is a process of its own that is driven over HTTP, as browsers would; the contestants take
turns. Ends with a line for each row, and with exit code 1 where one falls short.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qwen.errors import QwenError
from qwen.evals.contestants import embedded_gguf, running
from qwen.evals.machine import describe_machine
from qwen.evals.many_contestants import LlamaCppSlots, OurBackend
from qwen.evals.page_users import PageUser, ask_at_once, total_speed
from qwen.evals.report import Comparison, Samples, write_json
from qwen.evals.soak import think_and_ask
from qwen.evals.streaming import app_process

USERS = 8
TOKENS = 64

#: Longest pause of a running stream, in seconds.
_PAUSE_SECONDS = 0.3

_TOPICS = ("ship", "clock", "garden", "bridge", "library", "comet", "violin", "desert")


@dataclass(frozen=True, slots=True)
class Setup:
    """What the rows measure with."""

    user: PageUser
    rounds: int
    minutes: float


def questions(number: int, count: int = USERS) -> list[str]:
    """Return questions whose replies are long; no two, and none of another round, begin alike."""
    return [
        f"{_TOPICS[i % len(_TOPICS)].title()} number {number}-{i}: write a long and detailed story "
        "about it, with several characters and a surprising end."
        for i in range(count)
    ]


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-users", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--minutes", type=float, default=10, help="of the 32 users (default: 10)")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--json", type=Path, default=Path("build/bench-users.json"))
    given = parser.parse_args()
    machine = describe_machine("torch", "transformers", "gradio", "xllamacpp")
    print(machine, flush=True)
    comparisons = []
    try:
        with app_process(given.port, "auto") as (url, _):
            setup = Setup(PageUser(url), given.rounds, given.minutes)
            ask_at_once(setup.user, questions(0, 2), 16)  # warms up
            for name in given.rows:
                for comparison in ROWS[name](setup):
                    comparisons.append(comparison)
                    print(comparison, flush=True)
    except QwenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, machine, comparisons)
    print(f"\n{machine}", *comparisons, sep="\n")
    return 0 if all(row.is_met for row in comparisons) else 1


def _total(setup: Setup) -> Iterator[Comparison]:
    ours, llama, dense = [], [], []
    with (
        running(LlamaCppSlots, str(embedded_gguf())) as peer,
        running(OurBackend, "bfloat16") as single,
    ):
        peer.call("total_speed", questions(1), 8)
        single.call("speed", questions(1)[0], 8)
        for number in range(2, 2 + setup.rounds):
            asked = questions(number)
            ours.append(total_speed(ask_at_once(setup.user, asked, TOKENS)))
            llama.append(peer.call("total_speed", asked, TOKENS))
            dense.append(single.call("speed", asked[0], TOKENS // 2))
    name, mine = f"{USERS} users at once, in total", _samples(ours, "tok/s")
    yield Comparison(name, mine, "llama.cpp, 8 slots", _samples(llama, "tok/s"), 1.8, "higher")
    yield Comparison(name, mine, "ours in bf16, 1 user", _samples(dense, "tok/s"), 3.0, "higher")


def _first(setup: Setup) -> Iterator[Comparison]:
    alone, last = [], []
    for number in range(20, 20 + setup.rounds):
        alone.append(setup.user.ask(questions(number + 50)[0], 4).first)
        last.append(max(r.first for r in ask_at_once(setup.user, questions(number), TOKENS)))
    fair = Samples(tuple(USERS * seconds for seconds in alone), "s")
    yield Comparison(
        f"slowest first token of {USERS} at once",
        _samples(last, "s"),
        f"fair share, {USERS} × one alone",
        fair,
        2.0,
        "lower",
    )


def _pause(setup: Setup) -> Iterator[Comparison]:
    for streams in (1, USERS - 1):
        pauses = []
        for number in range(100 * streams, 100 * streams + setup.rounds):
            # About 2,000 tokens, and none that are kept from another round.
            text = " ".join(f"{word} {number} {i}" for i in range(125) for word in _TOPICS[:3])
            with ThreadPoolExecutor(streams) as pool:
                asked = questions(number, streams)
                replies = [pool.submit(setup.user.ask, question, 400) for question in asked]
                time.sleep(2)
                long = setup.user.ask(f"{text}\nSummarise this.", 4)
                span = long.asked, long.asked + long.first
                pauses.append(max(stream.result().pause(*span) for stream in replies))
        yield Comparison(
            f"longest pause of {streams} stream{'s' * (streams > 1)} while 2,000 tokens are read",
            _samples([1e3 * pause for pause in pauses], "ms"),
            "limit",
            Samples((1e3 * _PAUSE_SECONDS,), "ms"),
            1.0,
            "lower",
        )


def _page(setup: Setup) -> Iterator[Comparison]:
    for users, target in ((1, 0.90), (USERS, 0.85)):
        page, alone = [], []
        with running(OurBackend, "auto") as backend:
            backend.call("total_speed", questions(59, users), 8)
            for number in range(60, 60 + setup.rounds):
                asked = questions(10 * users + number, users)
                page.append(total_speed(ask_at_once(setup.user, asked, 2 * TOKENS)))
                alone.append(backend.call("total_speed", asked, 2 * TOKENS))
        yield Comparison(
            f"through the page, {users} user{'s' * (users > 1)}",
            _samples(page, "tok/s"),
            "backend alone",
            _samples(alone, "tok/s"),
            target,
            "higher",
        )


def _crowd(setup: Setup) -> Iterator[Comparison]:
    result = think_and_ask(setup.user, users=32, seconds=60 * setup.minutes)
    print(*result.errors[:5], sep="\n", flush=True)
    yield Comparison(
        f"32 users for {setup.minutes:g} minutes, {result}: errors",
        Samples((float(len(result.errors)),), ""),
        "one",
        Samples((1.0,), ""),
        0.0,
        "lower",
    )


def _samples(values: list[float], unit: str) -> Samples:
    return Samples(tuple(values), unit)


ROWS: dict[str, Callable[[Setup], Iterator[Comparison]]] = {
    "total": _total,
    "first": _first,
    "pause": _pause,
    "page": _page,
    "crowd": _crowd,
}

if __name__ == "__main__":
    sys.exit(main())
