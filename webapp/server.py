"""Starts and stops the server: page and API through Gradio's `launch`, or the API alone.

Shut-down: after the first Ctrl-C or SIGTERM nothing new is begun; running replies may go on for
`Settings.stop_seconds`, then they are cut with a notice. The second one ends the process at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any, NoReturn

from qwen.backend import DeferredBackend, LoadStatus
from qwen.errors import StartupError
from webapp.activity import Activity
from webapp.logs import set_up_logs
from webapp.settings import DEFAULT_HOST, DEFAULT_PORT, Settings

logger = logging.getLogger(__name__)

#: Threads for handlers; a running reply holds one for at most a heartbeat at a time.
HANDLER_THREADS = 100
#: Tabs whose state is kept, open or not, the last ones that did something: 80 kB each or more. One
#: that was forgotten takes its conversation from its browser, as after a restart.
SESSIONS_KEPT = 500
#: Seconds between Gradio's looks for a new event, and for a handler's progress, of which we show
#: none. Its own, a thousand and a hundred looks a second, took a tenth of the decode loop's speed.
QUEUE_LOOK_SECONDS, PROGRESS_LOOK_SECONDS = 0.01, 0.5
#: Seconds that replies which are cut get for their end, and then the network for the last words.
CUT_SECONDS, FLUSH_SECONDS = 0.5, 0.3


def serve(settings: Settings, backend: DeferredBackend, activity: Activity) -> int:
    """Load the model behind the page, serve until told to stop, and clean up.

    Args:
        settings: What was asked for.
        backend: Answers the requests.
        activity: What watches the real backend, so that its replies can be waited for.

    Returns:
        The process's exit code: 0 after an ordinary stop, 1 when the server cannot start.
    """
    set_up_logs(settings.log_format)
    for warning in settings.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    stopped = _stop_on_signals()
    backend.start()
    launch = launch_api if settings.api.mode == "only" else launch_page
    try:
        launch(settings, backend, activity)
    except StartupError as error:
        print(f"Error: {error}", file=sys.stderr)
        backend.close()
        return 1
    try:
        stopped.wait()
        print("Stopping …", flush=True)
        _let_replies_end(settings, backend, activity)
    finally:
        backend.close()
    return 0


def _let_replies_end(settings: Settings, backend: DeferredBackend, activity: Activity) -> None:
    """Give running replies their time, then cut them; begin no new ones."""
    activity.stop()
    if not activity.num_open:
        return
    if not activity.wait_until_idle(settings.stop_seconds):
        print("Cutting the replies that still run.", flush=True)
        backend.close()
        activity.wait_until_idle(CUT_SECONDS)
    time.sleep(FLUSH_SECONDS)


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


def launch_page(
    settings: Settings, backend: DeferredBackend, activity: Activity | None = None
) -> Any:
    """Build the page, and the API beside it, and start serving them on threads of their own.

    Returns:
        The running Gradio Blocks; its `close` ends it.

    Raises:
        StartupError: The port is taken.
    """
    # Before the import: Gradio reads it there, and otherwise asks its makers' server at start.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.pop("GRADIO_SERVER_PORT", None)  # is in the settings, unless it was overruled
    from webapp.ui import launch_options

    demo = _build(settings, backend)
    api = None
    if settings.api.mode == "beside":
        api = _build_api(settings, backend, activity or Activity())
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
            state_session_capacity=SESSIONS_KEPT,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=1,  # the page takes no files, so nobody may leave any here
            app_kwargs={"lifespan": _in_front(settings, api)},
            **launch_options(),
        )
    except OSError as error:
        raise _port_taken(settings.server_name, settings.server_port) from error
    _announce(f"Open {local_url}")
    if settings.share and not share_url:
        print(
            "Warning: no public link could be made, since Gradio's share service did not answer. "
            "The local address works.",
            file=sys.stderr,
        )
    return demo


def launch_api(settings: Settings, backend: DeferredBackend, activity: Activity) -> RunningApi:
    """Start serving the API alone, on a thread of its own.

    Raises:
        StartupError: The port is taken.
    """
    import uvicorn

    from webapp.front import SecurityHeaders

    host, port = settings.server_name or DEFAULT_HOST, settings.server_port or DEFAULT_PORT
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise _port_taken(host, port) from error
    app = SecurityHeaders(_build_api(settings, backend, activity), frame_ancestors="'none'")
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off"
    )
    running = RunningApi(uvicorn.Server(config), listener)
    _announce(f"The API is at http://{host}:{port}/v1")
    return running


class RunningApi:
    """The API's server on a thread of its own; `close` ends it."""

    def __init__(self, server: Any, listener: socket.socket) -> None:
        self._server = server
        self._listener = listener
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="api-server", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the server, and with it the replies that are still being sent."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._listener.close()


def _port_taken(host: str | None, port: int | None) -> StartupError:
    return StartupError(
        f"Port {port} on {host} cannot be used: another program may be listening there. Stop it, "
        "or choose another port with --server-port; with --server-name, name an address of this "
        "machine."
    )


def _build_api(settings: Settings, backend: DeferredBackend, activity: Activity) -> Any:
    """Build the API; the page's login opens it where no other key was set."""
    from webapp.api import build_api
    from webapp.api_auth import AccessControl

    options = settings.api
    logins = [login for login in (options.login,) if login]
    if settings.auth and not options.keys and not logins:
        logins = [settings.auth]
    access = AccessControl(keys=options.keys, logins=logins)
    return build_api(
        backend, options, access, activity, max_request_bytes=settings.max_request_bytes
    )


def _in_front(settings: Settings, api: Any) -> Callable[[Any], Any]:
    """Return a lifespan that puts headers, limits and the API in front of Gradio's application.

    As ordinary middleware they would stand behind Gradio's own, which compresses event streams and
    lets every web page in that asks a server with a public name.
    """
    from webapp.front import build_front

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = build_front(
            app.middleware_stack,
            api,
            frame_ancestors=settings.frame_ancestors,
            max_request_bytes=settings.max_request_bytes,
        )
        yield

    return lifespan


def _build(settings: Settings, backend: DeferredBackend) -> Any:
    """Build the page's Blocks with its handlers."""
    from webapp.completion_handlers import CompletionHandlers
    from webapp.history_handlers import HistoryHandlers
    from webapp.loading_handlers import LoadingHandlers
    from webapp.page_updates import PageUpdates
    from webapp.reply_handlers import ReplyHandlers
    from webapp.reply_stream import Pace
    from webapp.session import OpenPages
    from webapp.ui import Handlers, build_page
    from webapp.visitors import Visitors

    page, pages = PageUpdates(backend), OpenPages()
    visitors, pace = Visitors(settings.visitors), Pace()
    history = HistoryHandlers(backend, page, settings, pages)
    handlers = Handlers(
        reply=ReplyHandlers(backend, page, pages, visitors, pace),
        history=history,
        completion=CompletionHandlers(backend, pages, visitors, pace),
        loading=LoadingHandlers(backend, history),
    )
    page = build_page(handlers).queue(api_open=False)
    page._queue.sleep_when_free = QUEUE_LOOK_SECONDS
    page._queue.progress_update_sleep_when_free = PROGRESS_LOOK_SECONDS
    return page


def _announce(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)  # on a line of its own, beside a bar that is being drawn
    sys.stdout.flush()


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
