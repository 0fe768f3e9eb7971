"""Gradio events around the conversation: open, undo, clear, step between versions, save a copy.

None of them runs the model. The browser's copy of a history is read here, once, when a page opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import gradio as gr

from qwen.backend import DeferredBackend
from qwen.messages import Message, SamplingParams
from webapp.controls import Controls, control_values, restored_controls
from webapp.conversation import Conversation
from webapp.export import Transcript, export_html, export_json, export_markdown
from webapp.page_updates import PageUpdates, Updates
from webapp.session import OpenPages, PageSession
from webapp.settings import Settings
from webapp.views import WINDOW, note_text

#: A file for the browser to save: name, media type, text.
Download = list[str]


class HistoryHandlers:
    """What can be done with the conversation of one page."""

    def __init__(
        self, backend: DeferredBackend, page: PageUpdates, settings: Settings, pages: OpenPages
    ) -> None:
        self._backend = backend
        self._pages = pages
        self._page = page
        self._settings = settings

    def default_controls(self) -> Controls:
        """Return the settings that a new visitor starts with: the checkpoint's, once known."""
        params = SamplingParams()
        if self._backend.status.stage == "ready":
            params = self._backend.info.default_params
        return control_values(self._settings.system_prompt, params)

    def open_page(self, request: gr.Request, saved: object) -> tuple[Any, ...]:
        """Restore what this browser stored; returns updates for `VIEW` and `CONTROLS`."""
        session = self._pages.session_of(request, saved)
        session.opened = session.conversation
        stored = saved if isinstance(saved, Mapping) else {}
        controls = restored_controls(stored.get("controls"), self.default_controls())
        return (*self._page.opened(session, controls), *controls)

    def settle_page(self, session: PageSession | None, *controls: Any) -> Updates:
        """Show again what has changed while the page was being opened.

        The answer of `open_page` can reach the browser after those of later events, such as a
        message that was sent meanwhile. A reply that is being written shows itself.
        """
        if session is None or session.is_busy or session.conversation is session.opened:
            return self._page.none()
        return self._page.whole(session, controls)

    def undo(
        self,
        request: gr.Request,
        box: str,
        saved: object,
        session: PageSession | None,
        *controls: Any,
    ) -> Updates:
        """Step back before the last question and put its text into an empty box."""
        session = session or self._pages.session_of(request, saved)
        if session.is_busy:
            return self._page.none()
        session.conversation, text = session.conversation.undo()
        if not box.strip():
            session.put_into_box(text)
        return self._whole(session, controls)

    def clear(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Updates:
        """Begin a new conversation; nothing happens while a reply is being written."""
        session = session or self._pages.session_of(request, saved)
        if session.is_busy:
            return self._page.none()
        session.conversation, session.window = Conversation(), WINDOW
        return self._whole(session, controls)

    def show_earlier(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Updates:
        """Show more of a long conversation."""
        session = session or self._pages.session_of(request, saved)
        session.window += WINDOW
        return self._whole(session, controls, save=False)

    def choose_fork(
        self,
        request: gr.Request,
        node_id: object,
        saved: object,
        session: PageSession | None,
        *controls: Any,
    ) -> Updates:
        """Let the stepper work on another message."""
        session = session or self._pages.session_of(request, saved)
        if node_id not in session.conversation.forks:
            return self._page.none()
        session.fork = node_id if isinstance(node_id, int) else None
        return self._whole(session, controls, save=False)

    def step_back(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Updates:
        """Show the previous version of the stepper's message."""
        return self._step(session or self._pages.session_of(request, saved), controls, -1)

    def step_forward(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Updates:
        """Show the next version of the stepper's message."""
        return self._step(session or self._pages.session_of(request, saved), controls, +1)

    def _step(self, session: PageSession, controls: Controls, offset: int) -> Updates:
        if session.is_busy or session.stepped_fork is None:
            return self._page.none()
        place = [node.id for node in session.conversation.path].index(session.stepped_fork)
        session.conversation = session.conversation.step(session.stepped_fork, offset)
        session.fork = session.conversation.path[place].id
        return self._whole(session, controls)

    def _whole(self, session: PageSession, controls: Controls, *, save: bool = True) -> Updates:
        session.refusal = ""
        return self._page.whole(session, controls, save=save)

    def draft_context(self, draft: str, session: PageSession | None, *controls: Any) -> Any:
        """Return the context bar for what is being typed."""
        return self._page.context(session, controls, draft) if session is not None else gr.skip()

    def export_html(self, session: PageSession | None, *controls: Any) -> Download | None:
        """Return the conversation as one self-contained HTML file."""
        return self._export(session, controls, "html", "text/html", export_html)

    def export_json(self, session: PageSession | None, *controls: Any) -> Download | None:
        """Return the conversation as JSON."""
        return self._export(session, controls, "json", "application/json", export_json)

    def export_markdown(self, session: PageSession | None, *controls: Any) -> Download | None:
        """Return the conversation as Markdown."""
        return self._export(session, controls, "md", "text/markdown", export_markdown)

    def _export(
        self,
        session: PageSession | None,
        controls: Controls,
        suffix: str,
        media_type: str,
        write: Callable[[Transcript], str],
    ) -> Download | None:
        if session is None or not session.conversation.path:
            return None
        now = datetime.now(UTC)
        ready = self._backend.status.stage == "ready"
        transcript = Transcript(
            title=session.words("title"),
            model=self._backend.info.name if ready else "",
            created=now.isoformat(timespec="seconds"),
            system_prompt=str(controls[0]),
            entries=tuple(
                (
                    Message(node.role, node.content),
                    note_text(node.note, session.words) if node.note else "",
                )
                for node in session.conversation.path
            ),
        )
        return [f"qwen-chat-{now:%Y%m%d-%H%M%S}.{suffix}", media_type, write(transcript)]
