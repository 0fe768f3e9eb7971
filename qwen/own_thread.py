"""Runs work on a thread that ends with it.

OpenMP's worker threads belong to the thread that first computed with them, until it ends. Once
there are more of them than cores, all sleep between two computations instead of waiting awake: a
program whose main thread had loaded the model decoded 32 instead of 50 tokens a second (2 cores).
So what computes only once does it here, and the decode loop's threads are the only ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def run_on_own_thread(work: Callable[[], T]) -> T:
    """Do some work on another thread and return its result, or raise its error, here."""
    task = _Task(work)
    # A daemon: Ctrl-C ends the waiting below, and then the program.
    thread = threading.Thread(target=task.run, name="own-thread", daemon=True)
    thread.start()
    thread.join()
    return task.result()


class _Task(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._work is not None
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error
        self._work = None

    def result(self) -> T:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._results.pop()
