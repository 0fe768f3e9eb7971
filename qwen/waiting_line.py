"""`WaitingLine`: requests that wait for their turn, in the order in which they came.

Bounded; those in it are told their place and an estimate. Knows no model. Not for several threads
at once: the scheduler's lock is held.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from qwen.errors import TooManyRequests
from qwen.messages import QueuePlace
from qwen.reply_steps import EngineStep, Request
from qwen.serving_pace import Pace


class WaitingLine:
    """The line.

    Args:
        max_waiting: Requests that may wait.
        pace: Estimates how long they will.
    """

    def __init__(self, max_waiting: int, pace: Pace) -> None:
        self._max_waiting, self._pace = max_waiting, pace
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def join(self, request: Request, *, free: int, num_running: int) -> None:
        """Let a request wait.

        Args:
            request: The last one from now on.
            free: Requests of the line that begin at once.
            num_running: Requests that have their turn.

        Raises:
            TooManyRequests: As many wait as may.
        """
        position = len(self) - free + 1
        if position > self._max_waiting:
            seconds = max(math.ceil(self._pace.wait_seconds(position, num_running)), 1)
            raise TooManyRequests(
                f"The server is busy: {len(self)} requests wait already, and this one would be "
                f"number {position}. Try again in {seconds} seconds.",
                retry_after=seconds,
                position=position,
            )
        self._requests.append(request)

    def leave(self, is_over: Callable[[Request], bool]) -> None:
        """Let go of those that are over, and tell them."""
        for request in [request for request in self._requests if is_over(request)]:
            self._requests.remove(request)
            request.put(EngineStep(finish_reason="cancelled"))

    def call(self, can_begin: Callable[[Request], bool]) -> Request | None:
        """Return the first one, which waits no longer; None if there is none or it cannot begin."""
        if not self._requests or not can_begin(self._requests[0]):
            return None
        return self._requests.popleft()

    def tell_places(self, num_running: int) -> None:
        """Tell those whose place has changed."""
        for position, request in enumerate(self._requests, start=1):
            if position != request.position:
                request.position = position
                seconds = self._pace.wait_seconds(position, num_running)
                request.put(EngineStep(queued=QueuePlace(position, seconds)))
