"""A page without a browser: its handlers over a backend, and what it shows after each event."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from fake_backend import FakeBackend, ready

from qwen.backend import DeferredBackend
from webapp.controls import CONTROLS
from webapp.history_handlers import HistoryHandlers
from webapp.page_updates import FRAME_VIEW, REPLY_VIEW, VIEW, PageUpdates, Updates
from webapp.render import restore_text
from webapp.reply_handlers import ReplyHandlers
from webapp.reply_stream import Pace
from webapp.session import OpenPages
from webapp.settings import Settings
from webapp.visitors import Visitors

REQUEST: Any = SimpleNamespace(headers={})


class ChatPage:
    """Takes part in events as a browser does; a reply is read to its end unless a test stops.

    Attributes:
        backend: Behind the page.
        session: As the last update left it.
        controls: Component values by name; a test changes them as a user would.
        shown: Component properties by name, as the updates so far left them.
    """

    def __init__(
        self, backend: FakeBackend | DeferredBackend, settings: Settings | None = None
    ) -> None:
        self.backend = backend if isinstance(backend, DeferredBackend) else ready(backend)
        updates, pages = PageUpdates(self.backend), OpenPages()
        visitors = Visitors((settings or Settings()).visitors)
        self.reply = ReplyHandlers(self.backend, updates, pages, visitors, Pace())
        self.history = HistoryHandlers(self.backend, updates, settings or Settings(), pages)
        defaults = self.history.default_controls()
        self.controls: dict[str, Any] = dict(zip(CONTROLS, defaults, strict=True))
        self.session: Any = None
        self.shown: dict[str, dict[str, Any]] = {name: {} for name in (*VIEW, "turn")}
        self.box = ""

    def take(self, updates: Updates, view: Iterable[str] = VIEW) -> None:
        """Apply one round of updates, as Gradio's frontend does."""
        for name, update in zip(view, updates, strict=True):
            is_update = isinstance(update, dict) and update.get("__type__") == "update"
            self.shown[name] |= update if is_update else {"value": update}
        self.session = self.shown["session"].get("value", self.session)

    def take_reply(self, updates: Updates) -> None:
        """Apply one round of a reply; a new turn triggers the event that follows, as it does."""
        before = self.shown["turn"].get("value")
        self.take(updates, REPLY_VIEW)
        if self.shown["turn"].get("value") != before:
            self.take(self.reply.follow(self.session, *self._values), FRAME_VIEW)

    def rounds(self, updates: Iterable[Updates]) -> Iterator[None]:
        """Apply the updates of a reply; what the page shows can be looked at in between."""
        for update in updates:
            self.take_reply(update)
            yield

    def run(self, updates: Iterable[Updates]) -> None:
        for _ in self.rounds(updates):
            pass

    # What a user does.

    def open(self, saved: object = None) -> None:
        opened = self.history.open_page(REQUEST, saved)
        self.take(opened[: len(VIEW)])
        self.controls = dict(zip(CONTROLS, opened[len(VIEW) :], strict=True))

    def settle(self) -> None:
        self.take(self.history.settle_page(self.session, *self._values))

    def sending(self, text: Any) -> Iterator[None]:
        self.box = text
        return self.rounds(
            self.reply.send(REQUEST, self.box, self.saved, self.session, *self._values)
        )

    def send(self, text: Any) -> None:
        for _ in self.sending(text):
            pass

    def edit(self, index: int, text: str) -> None:
        event: Any = SimpleNamespace(index=index, value=text)
        self.run(self.reply.edit(REQUEST, event, self.saved, self.session, *self._values))

    def example(self, text: str) -> None:
        event: Any = SimpleNamespace(value={"text": text})
        self.run(self.reply.send_example(REQUEST, event, self.saved, self.session, *self._values))

    def regenerate(self) -> None:
        self.run(self.reply.regenerate(REQUEST, self.saved, self.session, *self._values))

    def continue_reply(self) -> None:
        self.run(self.reply.continue_reply(REQUEST, self.saved, self.session, *self._values))

    def undo(self) -> None:
        self.do("undo", self.box)

    def do(self, name: str, *inputs: Any) -> None:
        """Press a button of `HistoryHandlers`."""
        event = getattr(self.history, name)
        self.take(event(REQUEST, *inputs, self.saved, self.session, *self._values))

    # What a user sees.

    @property
    def box(self) -> Any:
        return self.shown["box"].get("value", "")

    @box.setter
    def box(self, text: Any) -> None:
        self.shown["box"]["value"] = text

    @property
    def texts(self) -> list[str]:
        """The raw texts of all bubbles, notes left out."""
        return [restore_text(text) for text in self.bubbles]

    @property
    def bubbles(self) -> list[str]:
        """What a reader sees in each bubble."""
        messages = self.shown["chatbot"].get("value", [])
        return [html.unescape(message["content"][0]["text"]) for message in messages]

    @property
    def notice(self) -> str:
        _, _, notice = self.shown["notice"].get("value", "").partition("</i>")
        return html.unescape(notice)

    def visible(self, name: str) -> bool:
        return bool(self.shown[name]["visible"])

    def enabled(self, name: str) -> bool:
        return bool(self.shown[name]["interactive"])

    @property
    def saved(self) -> Any:
        """What the browser has stored."""
        return self.shown["saved"].get("value")

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(self.controls.values())
