"""A request on its way through the engine, and its steps as its caller takes them.

The loop puts steps in, on its thread; the caller takes them out, on any other. Neither waits for
the other. Knows no model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwen.errors import QwenError
from qwen.messages import FinishReason, QueuePlace, SamplingParams

#: Seconds between two looks of a caller that waits at whether the loop is still there.
_WATCH_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step of a reply: a place in the queue, a token or, as the last step, why it ended.

    The token that ends a sequence (end of turn, end of text) is not part of the reply.

    Attributes:
        token_id: The token.
        logprob: Its natural log-probability by the model's own distribution, before temperature,
            penalty and cuts; None unless `SamplingParams.top_logprobs` asks for it.
        top_logprobs: The likeliest tokens and their log-probabilities, as many as asked for.
        finish_reason: Of the last step.
        queued: The request waits; before any token, again whenever its place changes.
    """

    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    queued: QueuePlace | None = None


class Request:
    """What the loop knows of a request besides its sequence.

    Args:
        ids: The prompt.
        params: How tokens are chosen.
        cancel: See `Engine.submit`.
        max_tokens: Of the reply.
        nbytes: Memory that its keys and values may take.
    """

    def __init__(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        cancel: threading.Event,
        *,
        max_tokens: int,
        nbytes: int,
    ) -> None:
        self.ids, self.params, self.max_tokens, self.nbytes = ids, params, max_tokens, nbytes
        self.num_tokens = 0
        self.asked_at = self.started_at = time.monotonic()
        self.position = 0  # that was told last
        self.is_dropped = False
        self._cancel = cancel
        # Reentrant: the garbage collector may drop an iterator at any allocation.
        self._outbox: queue.SimpleQueue[EngineStep | QwenError] = queue.SimpleQueue()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants more of it."""
        return self.is_dropped or self._cancel.is_set()

    def put(self, step: EngineStep | QwenError) -> None:
        """Hand a step to the caller; an error or a finish reason is the last one."""
        self._outbox.put(step)

    def take(self, timeout: float) -> EngineStep | QwenError | None:
        """Return the next step, or None if none came in so many seconds."""
        try:
            return self._outbox.get(timeout=timeout)
        except queue.Empty:
            return None


class ReplySteps(Iterator[EngineStep]):
    """The steps of a reply, as `Engine.submit` describes them.

    Args:
        request: Whose they are.
        watch: Called now and then while waiting; sees to it that the loop runs.
    """

    def __init__(self, request: Request, watch: Callable[[], None]) -> None:
        self._request, self._watch = request, watch
        self._is_done = False

    def __next__(self) -> EngineStep:
        """Wait for the next step."""
        while not self._is_done:
            if self._request.is_cancelled:
                self.close()
                return EngineStep(finish_reason="cancelled")
            step = self._request.take(_WATCH_SECONDS)
            if step is None:
                self._watch()
            elif isinstance(step, QwenError):
                self.close()
                raise step
            else:
                self._is_done = step.finish_reason is not None
                return step
        raise StopIteration

    def close(self) -> None:
        """Let go of the reply; what runs of it ends within one step."""
        self._is_done = self._request.is_dropped = True

    def __del__(self) -> None:
        self.close()
