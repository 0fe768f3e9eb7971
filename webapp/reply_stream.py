"""A backend's stream, taken on a thread of its own and handed over at a pace a browser can follow.

The model thread never waits for the page, and the page's generator never blocks for long, so that
a closed tab is noticed within `HEARTBEAT_SECONDS` even while a long prompt is being read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from qwen.errors import BackendFailed, QwenError
from qwen.messages import ContextUsage, QueuePlace, StreamEvent
from webapp.conversation import Conversation, ReplyNote

logger = logging.getLogger(__name__)

#: Between two pictures of a growing reply; more often only saturates the browser.
PACE_SECONDS = 0.1
#: Replies that stream at once at that pace; each picture of one costs the server about 2 ms.
UNHURRIED_STREAMS = 2
#: Between two pictures, however many replies stream; a pause of 0.3 s is felt.
SLOWEST_PACE_SECONDS = 0.25
#: Characters of a model's thoughts that are shown.
THOUGHT_CHARACTERS = 200
#: Between two pictures while nothing new came; whatever comes is shown at once.
HEARTBEAT_SECONDS = 1.0


class Pace:
    """How often pages are updated: the less often, the more replies stream to them at once.

    One for all pages; may be used from any thread.

    Attributes:
        streams: Replies that produce text now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.streams = 0

    @property
    def seconds(self) -> float:
        """Seconds between two pictures of a reply."""
        crowd = max(self.streams / UNHURRIED_STREAMS, 1)
        return min(PACE_SECONDS * crowd, SLOWEST_PACE_SECONDS)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Count a reply while it produces text."""
        with self._lock:
            self.streams += 1
        try:
            yield
        finally:
            with self._lock:
                self.streams -= 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A reply so far: all text, the context's use once known, the last event at the end.

    Attributes:
        queued: Where it stands while it waits for its turn.
        thoughts: The end of what a remote engine's model has thought, before there is text.
    """

    text: str = ""
    context: ContextUsage | None = None
    final: StreamEvent | None = None
    queued: QueuePlace | None = None
    thoughts: str = ""


class _Collector:
    """What the model thread has produced and the page has not taken yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self.context: ContextUsage | None = None
        self.thoughts = ""
        self.final: StreamEvent | None = None
        self.queued: QueuePlace | None = None
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self, open_stream: Callable[[], Iterator[StreamEvent]]) -> None:
        try:
            for event in open_stream():
                with self._changed:
                    self._pieces.append(event.text)
                    self.context = event.context or self.context
                    self.queued = event.queued
                    self.thoughts = (self.thoughts + event.reasoning)[-THOUGHT_CHARACTERS:]
                    if event.finish_reason is not None:
                        self.final = event
                    self._changed.notify_all()
        except Exception as error:
            self.error = error
        finally:
            with self._changed:
                self.done.set()
                self._changed.notify_all()

    def take(self) -> tuple[str, bool]:
        """Wait a heartbeat for news; return the new text and whether the stream had ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.done.is_set() or self._pieces, HEARTBEAT_SECONDS)
            new, self._pieces = "".join(self._pieces), []
            return new, self.done.is_set()


def stream_snapshots(
    open_stream: Callable[[], Iterator[StreamEvent]], cancel: threading.Event, pace: Pace
) -> Iterator[Snapshot]:
    """Yield pictures of a growing reply, at least one every `HEARTBEAT_SECONDS`.

    Args:
        open_stream: Begins the backend's stream; called on the thread that then reads it.
        cancel: The event that the stream obeys; set when this iterator is closed.
        pace: Says how long to wait between two pictures that have new text.

    Raises:
        QwenError: Whatever the backend raised, after a last picture of the text before it;
            unexpected faults are logged and become `BackendFailed`.
    """
    collector = _Collector()
    threading.Thread(
        target=collector.run, args=(open_stream,), name="reply-stream", daemon=True
    ).start()
    text, done = "", False
    try:
        with ExitStack() as speaking:
            while not done:
                new, done = collector.take()
                if new and not text:
                    speaking.enter_context(pace.streaming())
                text += new
                final = collector.final if done else None
                yield Snapshot(text, collector.context, final, collector.queued, collector.thoughts)
                if new:
                    collector.done.wait(pace.seconds)
        if collector.error is not None:
            raise _as_qwen_error(collector.error)
    finally:
        cancel.set()


def _as_qwen_error(error: Exception) -> QwenError:
    if isinstance(error, QwenError):
        return error
    logger.error("The reply failed", exc_info=error)
    return BackendFailed(
        "The reply failed because of an unexpected fault; the server's log has the details. "
        "Your message is kept: try again."
    )


@dataclass(frozen=True, slots=True)
class Growth:
    """How a growing reply changes the conversation that it began from."""

    base: Conversation

    def at(self, snapshot: Snapshot) -> Conversation:
        """Return the conversation with the reply as far as it is."""
        note, last = reply_note(snapshot), self.base.path[-1]
        if last.role == "user":
            return self.base.answer(snapshot.text, note)
        if note is not None and last.note is not None:
            note = replace(note, tokens=note.tokens + last.note.tokens)
        return self.base.extend(last.content + snapshot.text, note)


def reply_note(snapshot: Snapshot) -> ReplyNote | None:
    """Return the figures of a finished reply; None while it grows."""
    final = snapshot.final
    if final is None or final.finish_reason is None:
        return None
    assert final.usage is not None and final.timing is not None
    return ReplyNote(
        tokens=final.usage.completion_tokens,
        tokens_per_second=final.timing.tokens_per_second,
        time_to_first_token=final.timing.time_to_first_token,
        finish_reason=final.finish_reason,
        dropped=len(snapshot.context.dropped) if snapshot.context is not None else 0,
    )
