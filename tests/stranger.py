"""A client that talks to the page's endpoints without a page, as a stranger's program would."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from qwen.messages import SamplingParams
from webapp.controls import CONTROLS, control_values
from webapp.page_updates import FRAME_VIEW, VIEW

SECONDS = 120.0


class Stranger:
    """A client of Gradio's HTTP API with a session of its own."""

    def __init__(self, url: str) -> None:
        self.session_hash = secrets.token_hex(8)
        self.client = httpx.Client(base_url=url, timeout=SECONDS)
        config = self.client.get("config").json()
        self._events = {event["api_name"]: event for event in config["dependencies"]}

    def _body(self, name: str, data: list[Any], event_data: Any = None) -> dict[str, Any]:
        return {
            "fn_index": self._events[name]["id"],
            "session_hash": self.session_hash,
            "data": data,
            "event_data": event_data,
        }

    def instant(self, name: str, *data: Any) -> httpx.Response:
        """Trigger an event that skips the queue."""
        return self.client.post("gradio_api/run/predict", json=self._body(name, list(data)))

    def open(self, saved: object = None) -> dict[str, Any]:
        """Open the page as a browser with this storage; return what it is shown, by name."""
        answer = self.instant("open_page", saved)
        assert answer.status_code == 200, answer.text
        return dict(zip(VIEW, answer.json()["data"], strict=False))

    def follow(self, **change: Any) -> dict[str, Any]:
        """Ask what a reply has changed around the chat, as a page does; return it by name."""
        answer = self.instant("follow", None, *controls(**change))
        assert answer.status_code == 200, answer.text
        return dict(zip(FRAME_VIEW, answer.json()["data"], strict=True))

    def join(self, name: str, *data: Any, event_data: Any = None) -> None:
        """Trigger a queued event."""
        body = self._body(name, list(data), event_data)
        answer = self.client.post("gradio_api/queue/join", json=body)
        assert answer.status_code == 200, answer.text

    @contextmanager
    def listening(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Receive the server's messages about the triggered event, until its end."""
        parameters = {"session_hash": self.session_hash}
        with self.client.stream("GET", "gradio_api/queue/data", params=parameters) as answer:
            yield self._messages(answer)

    def _messages(self, answer: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                yield message
                if message["msg"] in ("process_completed", "close_stream"):
                    return

    def queued(self, name: str, *data: Any, event_data: Any = None) -> list[dict[str, Any]]:
        """Trigger a queued event and return the server's messages until its end."""
        self.join(name, *data, event_data=event_data)
        with self.listening() as messages:
            return list(messages)

    def send(self, text: Any, **change: Any) -> list[dict[str, Any]]:
        """Send a message with these settings instead of the default ones."""
        return self.queued("send", text, None, None, *controls(**change))

    @contextmanager
    def sending(self, text: Any, **change: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Send a message; the reply is written while the block runs."""
        self.join("send", text, None, None, *controls(**change))
        with self.listening() as messages:
            yield messages


def controls(**change: Any) -> tuple[Any, ...]:
    defaults = control_values("Be brief.", SamplingParams())
    return tuple((dict(zip(CONTROLS, defaults, strict=True)) | change).values())
