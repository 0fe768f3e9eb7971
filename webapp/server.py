"""Starts and stops the server: the page through Gradio's `launch`, which also does share links.

Shut-down: the first Ctrl-C or SIGTERM cancels running replies and ends the process in well under
three seconds.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from qwen.backend import DeferredBackend, LoadStatus
from qwen.errors import StartupError
from webapp.settings import Settings

logger = logging.getLogger(__name__)

#: Threads for handlers; a running reply holds one for at most a heartbeat at a time.
HANDLER_THREADS = 100
#: Nothing from elsewhere is loaded, whatever a reply contains. Gradio needs inline scripts and
#: styles and compiles its components' templates with eval. No frame-ancestors: Hugging Face and
#: ModelScope show the page in a frame.
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


def serve(settings: Settings, backend: DeferredBackend) -> int:
    """Load the model behind the page, serve until told to stop, and clean up.

    Returns:
        The process's exit code: 0 after an ordinary stop, 1 when the server cannot start.
    """
    for warning in settings.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    stopped = _stop_on_signals()
    backend.start()
    try:
        launch_page(settings, backend)
    except StartupError as error:
        print(f"Error: {error}", file=sys.stderr)
        backend.close()
        return 1
    try:
        stopped.wait()
        print("Stopping …", flush=True)
    finally:
        backend.close()
    return 0


def end_process(code: int) -> NoReturn:
    """End the process now, whatever its threads are doing.

    An ordinary exit waits for every open page, then for the collection of all of torch's objects,
    and aborts when a thread is still loading or computing in torch.
    """
    atexit._run_exitfuncs()  # ends the helper program of a share link
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop_on_signals() -> threading.Event:
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)  # a second Ctrl-C does not wait for anything
        stopped.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return stopped


def launch_page(settings: Settings, backend: DeferredBackend) -> Any:
    """Build the page and start serving it on threads of its own.

    Returns:
        The running Gradio Blocks; its `close` ends it.

    Raises:
        StartupError: The port is taken.
    """
    # Before the import: Gradio reads it there, and otherwise asks its makers' server at start.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.pop("GRADIO_SERVER_PORT", None)  # is in the settings, unless it was overruled
    from starlette.middleware import Middleware

    from webapp.ui import launch_options

    demo = _build(settings, backend)
    try:
        _, local_url, share_url = demo.launch(
            prevent_thread_lock=True,
            quiet=True,
            share=settings.share,
            inbrowser=settings.inbrowser,
            server_name=settings.server_name,
            server_port=settings.server_port,
            auth=settings.auth,
            max_threads=HANDLER_THREADS,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(SecurityHeaders)]},
            **launch_options(),
        )
    except OSError as error:
        raise StartupError(
            f"Port {settings.server_port} on {settings.server_name} cannot be used: another "
            "program may be listening there. Stop it, or choose another port with --server-port; "
            "with --server-name, name an address of this machine."
        ) from error
    _announce(local_url, share_failed=settings.share and not share_url)
    return demo


def _build(settings: Settings, backend: DeferredBackend) -> Any:
    """Build the page's Blocks with its handlers."""
    from webapp.completion_handlers import CompletionHandlers
    from webapp.history_handlers import HistoryHandlers
    from webapp.loading_handlers import LoadingHandlers
    from webapp.page_updates import PageUpdates
    from webapp.reply_handlers import ReplyHandlers
    from webapp.ui import Handlers, build_page

    page = PageUpdates(backend)
    history = HistoryHandlers(backend, page, settings)
    handlers = Handlers(
        reply=ReplyHandlers(backend, page),
        history=history,
        completion=CompletionHandlers(backend),
        loading=LoadingHandlers(backend, history),
    )
    return build_page(handlers).queue(api_open=False)


def _announce(local_url: str, *, share_failed: bool) -> None:
    from tqdm import tqdm

    tqdm.write(f"Open {local_url}")  # on a line of its own, beside a bar that is being drawn
    sys.stdout.flush()
    if share_failed:
        print(
            "Warning: no public link could be made, since Gradio's share service did not answer. "
            "The local address works.",
            file=sys.stderr,
        )


class SecurityHeaders:
    """ASGI middleware that adds the security headers to every HTTP response."""

    HEADERS = (
        (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on and add the headers to the start of its response."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class TerminalProgress:
    """Prints the loading of the model on a terminal: a bar for bytes, a line for other steps."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._step = ""

    def __call__(self, status: LoadStatus) -> None:
        """Show a change of status."""
        if status.step != self._step:
            self._close_bar()
            self._step = status.step
            self._begin(status)
        if self._bar is not None:
            self._bar.total = status.total
            self._bar.update(status.done - self._bar.n)

    def _begin(self, status: LoadStatus) -> None:
        if status.unit == "bytes" and status.total:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=status.step, total=status.total, unit="B", unit_scale=True, leave=True
            )
        elif status.stage == "ready":
            print(f"The model is ready after {status.seconds:.1f} s.", flush=True)
        elif status.error is not None:
            print(f"Error: {status.error}", file=sys.stderr, flush=True)
        else:
            print(f"{status.step} …", flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
