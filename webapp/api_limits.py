"""What stands before the routes: size of a request, requests at once, keys, foreign pages, the log.

Plain ASGI wrappers. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from webapp.api_auth import AccessControl
from webapp.api_errors import ErrorAnswer, too_many
from webapp.visitors import client_name

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: Within which a whole request body must have come, in seconds.
BODY_SECONDS = 60.0
#: Keys that may be under check or wait for it at once; each takes some 30 ms.
WAITING_KEYS = 64
#: Methods that the log names; others are a client's own words.
KNOWN_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
#: How the log names a request whose client left before it was answered, as nginx does.
CLIENT_GONE = 499


def error_response(answer: ErrorAnswer) -> JSONResponse:
    """Return an error as a response in OpenAI's shape."""
    return JSONResponse(answer.body, answer.status, dict(answer.headers))


class BodyLimit:
    """Reads a whole body before anybody works on it; refuses what is too large or too slow.

    Args:
        app: What gets the request.
        max_bytes: The largest body.
        seconds: Within which it must have come.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body in one piece."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            await self._answer(408, "The request came too slowly. Send it again.", scope, send)
            return
        if body is None:
            await self._refuse(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body; None when it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"The request is larger than {self._max_bytes:,} bytes. Send less text."
        await self._answer(413, text, scope, send)

    async def _answer(self, status: int, text: str, scope: Scope, send: Send) -> None:
        answer = ErrorAnswer(status, text, "invalid_request_error", headers={"Connection": "close"})
        await error_response(answer)(scope, _nothing, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


class RequestGate:
    """Refuses requests beyond so many at once, of one client and of all.

    Args:
        app: What gets the request.
        max_requests: At once, of all clients.
        max_per_client: At once, of one address (of one /64 network with IPv6).
    """

    def __init__(self, app: ASGIApp, *, max_requests: int, max_per_client: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self._max_per_client = max_per_client
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if there is room for it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        client = client_of(scope)
        if self._running[client] >= self._max_per_client:
            text = (
                f"At most {self._max_per_client} requests of one client are served at once. "
                "Wait for one of yours to end."
            )
            await error_response(too_many(text, seconds=1))(scope, receive, send)
            return
        if self._running.total() >= self._max_requests:
            text = "The server is busy with other clients' requests. Try again in a moment."
            await error_response(too_many(text, seconds=2))(scope, receive, send)
            return
        self._running[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]


def client_of(scope: Scope) -> str:
    """Return whom a request counts for."""
    return client_name(str((scope.get("client") or ("unknown",))[0]))


class KeyCheck:
    """Lets only those in whose Authorization header is right.

    A check takes milliseconds and holds a thread. All of them share one, apart from the threads
    that replies need: a crowd with wrong keys would stop every reply otherwise.

    Args:
        app: What gets the request.
        access: Who may.
        open_paths: Paths that need no key.
    """

    def __init__(self, app: ASGIApp, *, access: AccessControl, open_paths: Collection[str]) -> None:
        self._app = app
        self._access = access
        self._open_paths = frozenset(open_paths)
        self._turn = anyio.CapacityLimiter(1)
        self._checking = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may pass."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        header = Headers(scope=scope).get("authorization")
        if self._access.remembers(header):
            await self._app(scope, receive, send)
            return
        if self._checking >= WAITING_KEYS:
            text = "Too many keys are being checked. Try again in a moment."
            await error_response(too_many(text, seconds=2))(scope, receive, send)
            return
        self._checking += 1
        try:
            is_right = await anyio.to_thread.run_sync(
                self._access.allows, header, limiter=self._turn
            )
        finally:
            self._checking -= 1
        if is_right:
            await self._app(scope, receive, send)
            return
        answer = ErrorAnswer(
            401,
            "A key is needed, and this request has none or a wrong one. Send the key that the "
            "server was started with (--api-key, --api-auth, or the page's login).",
            "invalid_request_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": self._access.challenge},
        )
        await error_response(answer)(scope, receive, send)


class OriginCheck:
    """Refuses requests that pages of other sites make a visitor's browser send.

    Without it, any web page could use the model of whoever runs this server on their own machine.

    Args:
        app: What gets the request.
        allowed: Origins that may; "*" is all.
    """

    def __init__(self, app: ASGIApp, *, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on unless it comes from a page elsewhere."""
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or "*" in self._allowed or origin in self._allowed:
            await self._app(scope, receive, send)
            return
        answer = ErrorAnswer(
            403,
            "Web pages may not use this API unless the server was started with --cors-origin and "
            "their address.",
            "invalid_request_error",
            code="origin_not_allowed",
        )
        await error_response(answer)(scope, receive, send)


class AccessLog:
    """Writes a line for each request, without its query, headers or body, and counts it.

    Args:
        app: What gets the request.
        count: Called with the path's name and the status.
        known_paths: Other paths are all written as "other": a path, too, may hold a text.
    """

    def __init__(
        self, app: ASGIApp, *, count: Callable[[str, int], None], known_paths: Collection[str]
    ) -> None:
        self._app = app
        self._count = count
        self._known_paths = frozenset(known_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note how it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        status = CLIENT_GONE

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            self._count(path, status)
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "other"
            client = (scope.get("client") or ("unknown",))[0]
            logger.info(
                "request",
                extra={
                    "method": method,
                    "path": path,
                    "status": status,
                    "client": client,
                    "seconds": round(time.monotonic() - begun, 3),
                },
            )
