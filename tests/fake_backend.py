"""A scripted backend: it says what a test tells it to, at a pace that a test chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from qwen.backend import BackendInfo, DeferredBackend
from qwen.errors import EmptyMessage, PromptTooLong
from qwen.messages import ChatRequest, ContextUsage, StreamEvent, Timing, Usage
from qwen.prompt import check_conversation


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition that another thread or process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class FakeBackend:
    """Answers every request with `reply`, word by word; a word is a token.

    Attributes:
        reply: A text, or a function of the request.
        pause: Seconds before each word.
        fault: Raised after `fault_after` words.
        requests: Every request that was streamed.
        active: Streams that are open now.
        gate: While cleared, streams wait before each word.
    """

    def __init__(
        self,
        reply: str | Callable[[ChatRequest], str] = "one two three",
        *,
        pause: float = 0.0,
        fault: Exception | None = None,
        fault_after: int = 0,
        info: BackendInfo | None = None,
        limit: int = 1000,
    ) -> None:
        self.reply = reply
        self.pause = pause
        self.fault = fault
        self.fault_after = fault_after
        self.info = info or BackendInfo(name="Fake", context_length=limit)
        self.limit = limit
        self.requests: list[ChatRequest] = []
        self.active = 0
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        self.requests.append(request)
        self.active += 1
        try:
            yield from self._events(request, cancel)
        finally:
            self.active -= 1

    def _events(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        if request.raw_prompt is None:
            check_conversation(request.messages)
        if request.raw_prompt is None and not request.messages[-1].content.strip():
            raise EmptyMessage("The message is empty. Write something first.")
        context = self.count_tokens(request)
        yield StreamEvent(context=context)
        reply = self.reply if isinstance(self.reply, str) else self.reply(request)
        words = reply.split(" ")
        said, finish = 0, "stop"
        for place, word in enumerate(words):
            while not self.gate.wait(0.01) and not cancel.is_set():
                pass
            cancel.wait(self.pause)
            if cancel.is_set():
                finish = "cancelled"
                break
            if said >= request.params.max_new_tokens:
                finish = "length"
                break
            if self.fault is not None and said >= self.fault_after:
                raise self.fault
            said += 1
            yield StreamEvent(text=word + (" " if place < len(words) - 1 else ""))
        yield StreamEvent(
            finish_reason=finish,  # type: ignore[arg-type]
            usage=Usage(context.prompt, said),
            timing=Timing(0.1, 10.0),
        )

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        if request.raw_prompt is not None:
            return ContextUsage(0, 0, len(request.raw_prompt.split()), self.limit)
        *earlier, last = request.messages
        system = sum(len(m.content.split()) for m in earlier if m.role == "system")
        turns = [m for m in earlier if m.role != "system"]
        query = len(last.content.split()) + len(request.reply_prefix.split())
        dropped = []
        while turns and system + query + sum(len(m.content.split()) for m in turns) > self.limit:
            dropped += turns[:2]
            turns = turns[2:]
        if system + query > self.limit:
            raise PromptTooLong("The prompt is too long. Shorten the message.")
        history = sum(len(m.content.split()) for m in turns)
        return ContextUsage(system, history, query, self.limit, tuple(dropped))

    def close(self) -> None:
        self.closed = True


def ready(backend: FakeBackend) -> DeferredBackend:
    """Wrap a fake as the loaded backend of a server."""
    deferred = DeferredBackend(lambda report: backend)
    deferred.start()
    wait_until(lambda: deferred.status.stage == "ready")
    return deferred
