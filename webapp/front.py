"""What stands in front of page and API: security headers, the size limit, and who gets a request.

Plain ASGI wrappers; knows neither page nor models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from webapp.api import belongs_to_api
from webapp.api_limits import BodyLimit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Nothing from elsewhere is loaded, whatever a reply contains. Gradio needs inline scripts and
#: styles and compiles its components' templates with eval.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    )
)

#: The ends of Gradio's addresses that write to the disk.
WRITING_ADDRESSES = ("upload", "deep_link")


def build_front(
    page: ASGIApp, api: ASGIApp | None, *, frame_ancestors: str | None, max_request_bytes: int
) -> ASGIApp:
    """Put page and API behind one front.

    Args:
        page: Gets what is not the API's.
        api: None where there is none.
        frame_ancestors: See `webapp.settings.Settings`.
        max_request_bytes: The largest body; the API has the same limit of its own.
    """
    limited = BodyLimit(NoFilesLeft(SameOrigin(page)), max_bytes=max_request_bytes)
    app = limited if api is None else ApiBeside(limited, api)
    return SecurityHeaders(app, frame_ancestors=frame_ancestors)


class ApiBeside:
    """Gives the API what is its own, and the page everything else."""

    def __init__(self, page: ASGIApp, api: ASGIApp) -> None:
        self._page = page
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to whom it belongs."""
        is_api = scope["type"] == "http" and belongs_to_api(scope["path"])
        await (self._api if is_api else self._page)(scope, receive, send)


class NoFilesLeft:
    """Refuses what would write a visitor's file, or the state of their page, to the disk.

    Gradio offers both to everybody, used or not; its limit on a file's size lets empty files pass,
    any number of them.
    """

    def __init__(self, page: ASGIApp) -> None:
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on unless it asks for one of these."""
        is_http = scope["type"] == "http"
        if is_http and scope["path"].rstrip("/").rsplit("/", 1)[-1] in WRITING_ADDRESSES:
            answer = JSONResponse({"detail": "Nothing can be stored on this server."}, 403)
            await answer(scope, receive, send)
            return
        await self._page(scope, receive, send)


class SameOrigin:
    """Takes the CORS headers off what the page answers.

    Gradio lets every origin in, with cookies, unless the server is asked for as localhost: any web
    page could read the conversation of somebody who is logged in.
    """

    def __init__(self, page: ASGIApp) -> None:
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and take the headers off its response."""

        async def send_without_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message["headers"] = [
                    (name, value)
                    for name, value in headers
                    if not name.lower().startswith(b"access-control-")
                ]
            await send(message)

        await self._page(scope, receive, send_without_cors if scope["type"] == "http" else send)


class SecurityHeaders:
    """Adds the security headers to every HTTP response.

    Args:
        app: What answers.
        frame_ancestors: Sites that may show it in a frame; None leaves that to the browser.
    """

    def __init__(self, app: ASGIApp, *, frame_ancestors: str | None) -> None:
        self._app = app
        policy = CONTENT_SECURITY_POLICY
        if frame_ancestors is not None:
            policy += f"; frame-ancestors {frame_ancestors}"
        self._headers = (
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and add the headers to the start of its response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
