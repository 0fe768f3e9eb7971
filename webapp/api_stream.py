"""The async edge: where a backend's stream, on worker threads, meets a client's socket.

The only room that knows both threads and the event loop. The backend never waits for a slow
client, and is cancelled as soon as its client is gone.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import JSONResponse, Response

from qwen.backend import DeferredBackend
from qwen.messages import ChatRequest, StreamEvent
from webapp.api_errors import describe_error
from webapp.api_limits import error_response
from webapp.api_replies import ReplyShape

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

#: So long a streamed reply may go without its status line: what fails at once (a prompt that is
#: too long, a full queue) is told by its status and not within the stream.
STATUS_SECONDS = 1.0
#: Between two comments on a stream without news, so that proxies keep it open while it queues.
KEEP_ALIVE_SECONDS = 10.0
#: A client that takes nothing for so long is given up.
SEND_SECONDS = 60.0

_DONE = b"data: [DONE]\n\n"
#: Characters that some clients take for the end of a line, as JSON escapes.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, slots=True)
class _End:
    """The stream is over, maybe by an error."""

    error: Exception | None = None


class _Inbox:
    """Events of a reply that a worker thread produces, until somebody takes them."""

    def __init__(self, stream: Iterator[StreamEvent]) -> None:
        self._stream = stream
        self._items: asyncio.Queue[StreamEvent | _End] = asyncio.Queue()

    async def fill(self) -> None:
        """Take all events of the stream; ends with the stream, which then is closed."""
        end = _End()
        try:
            async for event in iterate_in_threadpool(self._stream):
                self._items.put_nowait(event)
        except Exception as error:
            end = _End(error)
        finally:
            self._items.put_nowait(end)

    async def take(self, seconds: float | None = None) -> StreamEvent | None:
        """Return the next event; None after the last.

        Raises:
            TimeoutError: Nothing came within `seconds`.
            Exception: What the stream raised.
        """
        item = await asyncio.wait_for(self._items.get(), seconds)
        if isinstance(item, StreamEvent):
            return item
        if item.error is not None:
            raise item.error
        return None


class ReplyResponse(Response):
    """A response that generates the reply while it is being sent.

    Args:
        backend: Answers the request.
        request: What it is asked for.
        shape: Makes JSON of the events.
        streams: Send each event at once, or the reply as a whole.
    """

    def __init__(
        self, backend: DeferredBackend, request: ChatRequest, shape: ReplyShape, *, streams: bool
    ) -> None:
        super().__init__()
        self._backend = backend
        self._request = request
        self._shape = shape
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send. Returns early when the client is gone."""
        sender = _Sender(send)
        try:
            async with self._inbox(receive, sender) as inbox:
                if self._streams:
                    await self._send_stream(inbox, sender)
                else:
                    await self._send_whole(inbox, sender, scope, receive)
        except _ClientGone:
            return
        except Exception as error:
            if sender.client_is_gone:
                return
            answer = describe_error(error)
            if not sender.has_begun:
                await error_response(answer)(scope, receive, send)
                return
            with suppress(_ClientGone):
                await sender.write(_as_event(answer.body) + _DONE, more=False)

    @asynccontextmanager
    async def _inbox(self, receive: Receive, sender: _Sender) -> AsyncIterator[_Inbox]:
        """Run the stream; on leaving, whatever the reason, it is cancelled and has ended."""
        cancel = threading.Event()
        stream = await run_in_threadpool(self._backend.stream, self._request, cancel)
        inbox = _Inbox(stream)
        filling = asyncio.create_task(inbox.fill())
        watching = asyncio.create_task(_watch(receive, cancel, sender))
        try:
            yield inbox
        finally:
            cancel.set()
            watching.cancel()
            await asyncio.gather(filling, watching, return_exceptions=True)

    async def _send_whole(
        self, inbox: _Inbox, sender: _Sender, scope: Scope, receive: Receive
    ) -> None:
        events = []
        while (event := await inbox.take()) is not None:
            events.append(event)
        body = await run_in_threadpool(self._shape.whole, events)
        sender.has_begun = True
        await JSONResponse(body)(scope, receive, sender.send)

    async def _send_stream(self, inbox: _Inbox, sender: _Sender) -> None:
        early = await _early_events(inbox)
        await sender.begin()
        await sender.write(b"".join(map(_as_event, self._shape.opening())))
        for event in early:
            await sender.write(b"".join(map(_as_event, self._shape.chunks(event))))
        while True:
            try:
                event_or_end = await inbox.take(KEEP_ALIVE_SECONDS)
            except TimeoutError:
                await sender.write(b": waiting\n\n")
                continue
            if event_or_end is None:
                await sender.write(_DONE, more=False)
                return
            await sender.write(b"".join(map(_as_event, self._shape.chunks(event_or_end))))


async def _early_events(inbox: _Inbox) -> list[StreamEvent]:
    """Return the events up to the first that says something, or what came in time."""
    events: list[StreamEvent] = []
    deadline = time.monotonic() + STATUS_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            event = await inbox.take(left)
        except TimeoutError:
            break
        assert event is not None, "a stream ends with a finish reason"
        events.append(event)
        if event.text or event.tool_calls or event.reasoning or event.finish_reason:
            break
    return events


async def _watch(receive: Receive, cancel: threading.Event, sender: _Sender) -> None:
    """Cancel the reply as soon as its client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    sender.client_is_gone = True
    cancel.set()


class _ClientGone(Exception):
    """Nobody takes what is sent."""


class _Sender:
    """Sends server-sent events to one client, and knows how far that is.

    Attributes:
        has_begun: The status has been sent.
        client_is_gone: Nobody listens any more.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.has_begun = False
        self.client_is_gone = False

    async def begin(self) -> None:
        """Send status and headers of a stream."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
        ]
        self.has_begun = True
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body.

        Raises:
            _ClientGone: The client takes nothing.
        """
        if not data:
            return
        message = {"type": "http.response.body", "body": data, "more_body": more}
        try:
            await asyncio.wait_for(self.send(message), SEND_SECONDS)
        except (TimeoutError, OSError) as error:
            raise _ClientGone from error


def _as_event(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()
