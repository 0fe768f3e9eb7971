"""What the server is doing: replies under way, figures for Prometheus, a line in the log for each.

Watches a backend from outside, so page and API are counted alike. Knows no web framework and
never keeps or logs a text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from qwen.backend import BackendInfo, ChatBackend
from qwen.errors import BackendNotReady, QwenError
from qwen.messages import ChatRequest, ContextUsage, StreamEvent

logger = logging.getLogger(__name__)

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Activity:
    """Counts replies and their tokens. Every method may be called from any thread.

    Attributes:
        registry: The figures, in a registry of their own.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._changed = threading.Condition()
        self._open = 0
        self._stopping = False
        registry = self.registry
        self._replies = Counter(
            "qwen_replies", "Replies that ended, by how.", ["finish"], registry=registry
        )
        self._waiting = Gauge(
            "qwen_replies_queued", "Replies without a first token yet.", registry=registry
        )
        self._running = Gauge("qwen_replies_running", "Replies being written.", registry=registry)
        self._prompt = Counter("qwen_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._completion = Counter(
            "qwen_completion_tokens", "Tokens of replies.", registry=registry
        )
        self._first_token = Histogram(
            "qwen_time_to_first_token_seconds",
            "From the request to its first token, queue included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._duration = Histogram(
            "qwen_reply_seconds",
            "From the request to the reply's end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._http = Counter(
            "qwen_http_requests", "Requests to the API.", ["path", "status"], registry=registry
        )

    @property
    def is_stopping(self) -> bool:
        """Whether new replies are refused."""
        return self._stopping

    @property
    def num_open(self) -> int:
        """Replies that wait or run."""
        return self._open

    def watch(self, backend: ChatBackend) -> ChatBackend:
        """Return a backend that does the same and is counted."""
        return _WatchedBackend(backend, self)

    def count_http(self, path: str, status: int) -> None:
        """Count an answered request to the API."""
        self._http.labels(path=path, status=str(status)).inc()

    def stop(self) -> None:
        """Refuse new replies from now on; those that are under way go on."""
        with self._changed:
            self._stopping = True

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until no reply is under way; tell whether that came within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout=seconds)

    def begin(self) -> _Watch:
        """Begin to count a reply.

        Raises:
            BackendNotReady: The server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise BackendNotReady("The server is stopping. Send the message again later.")
            self._open += 1
        self._waiting.inc()
        return _Watch(self)

    def end(self, watch: _Watch) -> None:
        """Count the end of a reply and write its line."""
        (self._running if watch.first else self._waiting).dec()
        seconds = time.monotonic() - watch.begun
        self._duration.observe(seconds)
        self._replies.labels(finish=watch.finish).inc()
        self._prompt.inc(watch.prompt_tokens)
        self._completion.inc(watch.completion_tokens)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        logger.info(
            "reply",
            extra={
                "finish": watch.finish,
                "prompt_tokens": watch.prompt_tokens,
                "completion_tokens": watch.completion_tokens,
                "first_token_seconds": round(watch.first, 3),
                "seconds": round(seconds, 3),
            },
        )

    def note_first_token(self, seconds: float) -> None:
        """Count that a reply has got its first token, so many seconds after the request."""
        self._waiting.dec()
        self._running.inc()
        self._first_token.observe(seconds)


class _Watch:
    """What is known of one reply; `first` in seconds since `begun`, 0 before there is a token."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self.begun = time.monotonic()
        self.first = 0.0
        self.finish = "abandoned"
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def note(self, event: StreamEvent) -> None:
        if event.context is not None:
            self.prompt_tokens = event.context.prompt
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.completion_tokens = event.usage.completion_tokens
        else:
            said = event.text or event.reasoning
            self.completion_tokens += len(event.token_ids) or bool(said)
        if event.finish_reason is not None:
            self.finish = event.finish_reason
        says = event.text or event.token_ids or event.tool_calls or event.reasoning
        if not self.first and says:
            self.first = max(time.monotonic() - self.begun, 1e-6)
            self._activity.note_first_token(self.first)


class _WatchedBackend:
    """A backend whose streams are counted, and cut with an error when the server stops."""

    def __init__(self, backend: ChatBackend, activity: Activity) -> None:
        self._backend = backend
        self._activity = activity

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    def stream(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        watch = self._activity.begin()
        try:
            for event in self._backend.stream(request, cancel):
                watch.note(event)
                if event.finish_reason == "cancelled" and not cancel.is_set():
                    # Nobody who asked has stopped it, so the backend was closed.
                    raise BackendNotReady(
                        "The reply was cut because the server is stopping. Send the message "
                        "again when it is back."
                    )
                yield event
        except QwenError as error:
            watch.finish = type(error).__name__
            raise
        finally:
            self._activity.end(watch)

    def count_tokens(self, request: ChatRequest) -> ContextUsage:
        return self._backend.count_tokens(request)

    def close(self) -> None:
        self._backend.close()
