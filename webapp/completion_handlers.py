"""The page of a base model, which has no chat format: text in, the same text continued."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr

from qwen.backend import ChatBackend
from qwen.errors import QwenError
from qwen.messages import ChatRequest
from webapp.controls import sampling_params
from webapp.reply_stream import Pace, reply_note, stream_snapshots
from webapp.session import OpenPages, PageSession, host_of
from webapp.views import note_text, notice_html
from webapp.visitors import Visitors

logger = logging.getLogger(__name__)

#: What a completion streams to, and what follows a new number in `completion_turn`; see
#: `webapp.page_updates.REPLY_VIEW`.
COMPLETION_VIEW = ("session", "text", "completion_turn")
COMPLETION_FRAME_VIEW = ("completion_note", "complete", "stop_completion")


class CompletionHandlers:
    """The events of the completion page, over one shared backend."""

    def __init__(
        self, backend: ChatBackend, pages: OpenPages, visitors: Visitors, pace: Pace
    ) -> None:
        self._backend = backend
        self._pages = pages
        self._visitors = visitors
        self._pace = pace

    def complete(
        self, request: gr.Request, text: str, session: PageSession | None, *controls: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Continue the text in place; on an error it stays as it was."""
        session = session or self._pages.session_of(request, None)
        grown, note = text, ""
        try:
            with session.reply() as cancel, self._visitors.reply(host_of(request), session.words):
                session.completion_note = ""
                yield session, text, next(session.turns)
                params = sampling_params(controls)
                asked = ChatRequest(raw_prompt=text, params=params)
                for snapshot in stream_snapshots(
                    lambda: self._backend.stream(asked, cancel), cancel, self._pace
                ):
                    grown = text + snapshot.text
                    yield gr.skip(), grown, gr.skip()
                    figures = reply_note(snapshot)
                    if figures is not None:
                        note = f'<small class="note">{note_text(figures, session.words)}</small>'
        except QwenError as error:
            note = notice_html(str(error))
        except Exception:
            logger.exception("A completion failed")
            note = notice_html(session.words("unexpected"))
        session.completion_note = note
        yield session, grown, next(session.turns)

    def follow_completion(self, session: PageSession | None) -> tuple[Any, ...]:
        """Show in the components of `COMPLETION_FRAME_VIEW` what a completion has changed there."""
        busy = session is not None and session.is_busy
        note = session.completion_note if session is not None else ""
        return note, gr.update(visible=not busy), gr.update(visible=busy)

    def stop(self, session: PageSession | None) -> None:
        """Stop the running completion; its text is kept."""
        if session is not None:
            session.stop()
