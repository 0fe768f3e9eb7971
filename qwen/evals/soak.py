"""`make soak`: 32 users with think time for half an hour; nothing may grow, nothing be left over.

Users differ: short and long messages, tabs that are closed. One of them is hostile: prompts of
thousands of tokens, of which it reads the reply slowly or not at all. The app's process is watched
from outside: its memory, threads and open files.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from qwen.evals.machine import describe_machine
from qwen.evals.page_users import PageUser
from qwen.evals.report import Comparison, Samples, write_json
from qwen.evals.streaming import app_process

#: Seconds that a user thinks on average.
_THINK_SECONDS = 30.0
#: Share of users that close their tab while the reply is being written.
_LEAVING = 0.1
#: Numbers in the hostile user's messages, some 3,000 tokens, and seconds between its looks.
_HOSTILE_WORDS, _HOSTILE_PAUSE = 600, 1.0

#: Seconds between two looks at the process, and those it gets to come to rest.
_LOOK_SECONDS, _REST_SECONDS = 5.0, 20.0


@dataclass(slots=True)
class Crowd:
    """What many users saw: seconds to each first token, and what went wrong.

    Attributes:
        first: Of all but the hostile one.
        errors: Of all.
        hostile: Replies to the hostile one.
    """

    first: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hostile: int = 0

    def __str__(self) -> str:
        """Say how many replies came, and when they began."""
        first = self.first if len(self.first) > 1 else [0.0, *self.first, 0.0]
        p50, p95 = statistics.median(first), statistics.quantiles(first, n=20)[-1]
        return (
            f"{len(self.first)} replies, {self.hostile} to a hostile user, "
            f"first token p50 {p50:.1f} s, p95 {p95:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    memory: int
    threads: int
    files: int


def main() -> int:
    """Let users come and go, compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--port", type=int, default=8767)
    parser.add_argument("--json", type=Path, default=Path("build/soak.json"))
    given = parser.parse_args()
    machine = describe_machine("torch", "transformers", "gradio")
    print(machine, flush=True)
    with app_process(given.port, "auto") as (url, process):
        user = PageUser(url)
        # What is set up lazily and what the caches hold at their fullest is no growth.
        think_and_ask(user, users=given.users, seconds=60 * given.minutes / 4)
        time.sleep(_REST_SECONDS)
        before = read_footprint(process)
        looks: list[Footprint] = []
        crowd = _watched(user, process, looks, given.users, 60 * given.minutes * 3 / 4)
        time.sleep(_REST_SECONDS)
        after = read_footprint(process)
        unfinished = read_unfinished(url)
    comparisons = [
        *_compare(crowd, looks, before, after, given.users),
        _none_of("replies that run or wait at rest", unfinished),
    ]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, machine, comparisons)
    print(*crowd.errors[:10], *comparisons, sep="\n")
    return 0 if all(row.is_met for row in comparisons) else 1


def think_and_ask(user: PageUser, *, users: int, seconds: float) -> Crowd:
    """Let users think and ask for so many seconds; waits for the last replies."""
    crowd, end = Crowd(), time.monotonic() + seconds
    with ThreadPoolExecutor(users) as pool:
        for number in range(users):
            pool.submit(_live, user, number, end, crowd)
    return crowd


def _live(user: PageUser, number: int, end: float, crowd: Crowd) -> None:
    chance, is_hostile = random.Random(number), number == 0
    time.sleep(chance.uniform(0, min(_THINK_SECONDS, max(end - time.monotonic(), 0))))
    while time.monotonic() < end:
        words = _HOSTILE_WORDS if is_hostile else chance.choice([5, 5, 20, 20, 60, 200])
        text = " ".join(str(chance.randrange(10_000)) for _ in range(words))
        leaves = chance.random() < (0.5 if is_hostile else _LEAVING)
        try:
            reply = user.ask(
                f"Write a story with these numbers: {text}",
                chance.choice([16, 64, 128]),
                seed=chance.randrange(1000),
                leave_after=1 if leaves else 0,
                pause=_HOSTILE_PAUSE if is_hostile else 0.0,
            )
            if is_hostile:
                crowd.hostile += 1
            else:
                crowd.first.append(reply.first)
        except Exception as error:
            crowd.errors.append(f"{type(error).__name__}: {error}")
        time.sleep(min(chance.expovariate(1 / _THINK_SECONDS), max(end - time.monotonic(), 0)))


def _watched(
    user: PageUser, process: int, looks: list[Footprint], users: int, seconds: float
) -> Crowd:
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            looks.append(read_footprint(process))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        return think_and_ask(user, users=users, seconds=seconds)
    finally:
        done.set()
        watcher.join()


def read_footprint(process: int) -> Footprint:
    """Read what a process holds now (Linux)."""
    folder = Path("/proc", str(process))
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text("utf-8").splitlines()
    )
    return Footprint(
        memory=int(status["VmRSS"].split()[0]) * 1024,
        threads=int(status["Threads"]),
        files=len(list((folder / "fd").iterdir())),
    )


def read_unfinished(url: str) -> int:
    """Return how many replies run or wait, as the app at a URL counts them."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(httpx.get(url + "metrics").raise_for_status().text)
    gauges = {family.name: family.samples[0].value for family in families if family.samples}
    return int(gauges["qwen_replies_running"] + gauges["qwen_replies_queued"])


def _none_of(name: str, count: int) -> Comparison:
    one = Samples((1.0,), "")
    return Comparison(name, Samples((float(count),), ""), "one", one, 0.0, "lower")


def _compare(
    crowd: Crowd, looks: list[Footprint], before: Footprint, after: Footprint, users: int
) -> list[Comparison]:
    third = max(len(looks) // 3, 1)
    memory = [look.memory / 1e6 for look in looks]
    rows = [
        _none_of(f"{users} users, {crowd}: errors", len(crowd.errors)),
        Comparison(
            "memory in the last third",
            Samples((statistics.median(memory[-third:]),), "MB"),
            "in the first third",
            Samples((statistics.median(memory[:third]),), "MB"),
            1.05,
            "lower",
        ),
    ]
    # Python keeps the threads of its default pool, each from when it is first of use.
    pool = min(32, (os.cpu_count() or 1) + 4)
    for name, allowed in (("threads", pool), ("files", 2)):
        rows.append(
            Comparison(
                f"{name} at rest",
                Samples((float(getattr(after, name)),), ""),
                f"before and {allowed}",
                Samples((float(getattr(before, name) + allowed),), ""),
                1.0,
                "lower",
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
