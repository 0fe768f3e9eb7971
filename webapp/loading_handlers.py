"""The page while the model loads: progress, failure with a way out, and what readiness changes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from qwen.backend import DeferredBackend
from qwen.messages import SamplingParams
from webapp.controls import CONTROLS, control_values
from webapp.history_handlers import HistoryHandlers
from webapp.session import PageSession
from webapp.text import words_for
from webapp.views import status_html

#: The components that tell about the model, by name, in the order of the returned values.
STATUS_VIEW = ("status", "retry", "clock", "chat_page", "completion_page")


class LoadingHandlers:
    """Shows the loading of a backend to every open page."""

    def __init__(self, backend: DeferredBackend, history: HistoryHandlers) -> None:
        self._backend = backend
        self._history = history

    def show_status(
        self, request: gr.Request, session: PageSession | None, *controls: Any
    ) -> tuple[Any, ...]:
        """Return updates for `STATUS_VIEW`, `CONTROLS` and the context bar.

        Called every second until the model is ready or has failed. When it is ready, settings
        that nobody has touched take the checkpoint's own values.
        """
        words = session.words if session else words_for(request.headers.get("accept-language"))
        status = self._backend.status
        info = self._backend.info if status.stage == "ready" else None
        view = (
            status_html(status, info, words),
            gr.update(visible=status.stage == "failed"),
            gr.update(active=status.stage == "loading"),
            gr.update(visible=info is None or info.is_chat),
            gr.update(visible=info is not None and not info.is_chat),
        )
        if info is None:
            return (*view, *(gr.skip(),) * len(CONTROLS), gr.skip())
        fresh = self._history.default_controls()
        untouched = control_values(fresh[0], SamplingParams())
        news = tuple(
            new if given == old else gr.skip()
            for given, old, new in zip(controls, untouched, fresh, strict=True)
        )
        return (*view, *news, self._history.draft_context("", session, *controls))

    def retry(self) -> Any:
        """Load again after a failure."""
        self._backend.start()
        return gr.update(active=True)
