"""The API on a real socket, over a scripted backend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import httpx
from fake_backend import FakeBackend, wait_until

from qwen.backend import ChatBackend, DeferredBackend
from qwen.messages import ChatRequest, StreamEvent
from webapp.activity import Activity
from webapp.server import RunningApi, launch_api
from webapp.settings import ApiOptions, Settings

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class ScriptedBackend(FakeBackend):
    """A fake whose reply is these events, between the first and the last of an ordinary one."""

    def __init__(self, *events: StreamEvent, finish: str = "stop", **options: object) -> None:
        super().__init__("", **options)  # type: ignore[arg-type]
        self.events: Sequence[StreamEvent] = events
        self.finish = finish

    def _events(self, request: ChatRequest, cancel: threading.Event) -> Iterator[StreamEvent]:
        first, *_, last = super()._events(request, cancel)
        yield first
        yield from self.events
        yield replace(last, text="", finish_reason=self.finish)


class ApiServer:
    """The API on a port of this machine.

    Attributes:
        url: Where it is, without `/v1`.
        activity: What it counts.
        client: A plain HTTP client of it.
    """

    def __init__(self, backend: ChatBackend, port: int, settings: Settings) -> None:
        self.activity = Activity()
        self.backend = DeferredBackend(lambda report: self.activity.watch(backend))
        self.backend.start()
        wait_until(lambda: self.backend.status.stage == "ready")
        self.running: RunningApi = launch_api(settings, self.backend, self.activity)
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return self.client.get("/health").is_success
        except httpx.TransportError:
            return False

    def chat(self, **fields: object) -> httpx.Response:
        """Send a chat completion with these fields beside a message."""
        return self.client.post("/v1/chat/completions", json=HELLO | fields)

    def figure(self, name: str) -> float:
        """Return a figure of `/metrics`; of one with labels, the sum."""
        lines = self.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def close(self, *, keep_backend: bool = False) -> None:
        self.client.close()
        if not keep_backend:
            self.backend.close()
        self.running.close()


ServeApi = Callable[..., ApiServer]


def api_settings(port: int, **options: object) -> Settings:
    """Settings of the API alone; `options` are `ApiOptions`' or `Settings`' own."""
    of_api = {k: v for k, v in options.items() if k in ApiOptions.__dataclass_fields__}
    others = {k: v for k, v in options.items() if k not in of_api}
    return Settings(server_port=port, api=ApiOptions(mode="only", **of_api), **others)  # type: ignore[arg-type]
