"""A server with an OpenAI API that does what a test tells it to, faults included."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[["Handler"], None]


def chunk(text: str = "", *, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """One event's JSON of a chat."""
    content = {"content": text} if text else {}
    return {"choices": [{"index": 0, "delta": content | delta, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 2}}


def says(*events: Any, done: bool = True) -> Act:
    """Answer with these events; without `done`, break off behind them."""

    def act(handler: Handler) -> None:
        handler.begin()
        for event in events:
            handler.event(event)
        if done:
            handler.line("data: [DONE]")

    return act


def fails(status: int, body: Any = "", **headers: str) -> Act:
    """Answer with an HTTP error."""

    def act(handler: Handler) -> None:
        handler.reply(status, body, **headers)

    return act


def hangs(*events: Any) -> Act:
    """Say these events, then nothing until the client is gone; without any, never answer."""

    def act(handler: Handler) -> None:
        if events:
            handler.begin()
        for event in events:
            handler.event(event)
        handler.wait_for_disconnect()

    return act


def trickles(text: str, pause: float) -> Act:
    """Say a word again and again until the client is gone."""

    def act(handler: Handler) -> None:
        handler.begin()
        while not handler.is_gone(pause):
            handler.event(chunk(text))

    return act


HELLO = says(chunk("Hello "), chunk("there"), chunk(finish="stop"), USAGE)


class ScriptedEngine:
    """The server; use as a context.

    Attributes:
        acts: What the next requests for a reply get; `HELLO` when there is none left.
        bodies: JSON of the requests for a reply.
        headers: Headers of every request, their names in lower case.
        models: Entries of the model list.
        counted: JSON of the requests to count.
        tokens: Answer of `/tokenize`; None is 404.
        gone: Set when a client has left a request that hangs.
    """

    def __init__(self, port: int = 0) -> None:
        self.acts: deque[Act] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = [{"id": "scripted", "max_model_len": 4096, "owned_by": "vllm"}]
        self.model_act: Act | None = None
        self.counted: list[dict[str, Any]] = []
        self.tokens: Callable[[str], int] | None = None
        self.gone = threading.Event()
        self._stopping = threading.Event()
        engine = self

        class Bound(Handler):
            pass

        Bound.engine = engine
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Bound)
        self._server.daemon_threads = False  # joined by server_close, so that nothing is left open
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()


class Handler(BaseHTTPRequestHandler):
    engine: ScriptedEngine

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.engine.headers.append({k.lower(): v for k, v in self.headers.items()})
        if self.engine.model_act is not None:
            self.engine.model_act(self)
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": self.engine.models})
        else:
            self.reply(404, {"error": {"message": "no such address"}})

    def do_POST(self) -> None:
        self.engine.headers.append({k.lower(): v for k, v in self.headers.items()})
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            if self.engine.tokens is None:
                self.reply(404, {"detail": "Not Found"})
            else:
                self.engine.counted.append(body)
                self.reply(200, {"count": self.engine.tokens(body["prompt"])})
            return
        self.engine.bodies.append(body)
        act = self.engine.acts.popleft() if self.engine.acts else HELLO
        try:
            act(self)
        except OSError:
            self.engine.gone.set()

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()

    def event(self, data: Any) -> None:
        self.line("data: " + (data if isinstance(data, str) else json.dumps(data)))

    def line(self, text: str) -> None:
        self.wfile.write(f"{text}\n\n".encode())

    def reply(self, status: int, body: Any, **headers: str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header(
            "content-type", "text/html" if isinstance(body, str) else "application/json"
        )
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def is_gone(self, seconds: float) -> bool:
        """Wait so long; tell whether the client has left meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.connection.settimeout(0.01)
            try:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    self.engine.gone.set()
                    return True
            except TimeoutError:
                pass
            except OSError:
                self.engine.gone.set()
                return True
            if self.engine.is_stopping:
                return True
        return False

    def wait_for_disconnect(self) -> None:
        while not self.is_gone(0.05):
            pass
