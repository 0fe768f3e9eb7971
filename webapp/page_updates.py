"""The chat page's updates: which component gets which value, from a session.

Gradio wants one value for each output, in a fixed order; that order is `VIEW`.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from qwen.backend import ChatBackend
from qwen.errors import InvalidRequest, QwenError
from qwen.messages import ChatRequest, Message
from webapp.controls import Controls, sampling_params, stored_form, system_messages
from webapp.session import PageSession
from webapp.views import chat_messages, context_html, fork_choices, notice_html, version_text

#: The components that a chat handler updates, by name, in the order of its return values.
VIEW = (
    "session",
    "saved",
    "chatbot",
    "box",
    "notice",
    "send",
    "stop",
    "regenerate",
    "undo",
    "continue",
    "clear",
    "earlier",
    "stepper",
    "fork",
    "version",
    "context",
)

#: Prompts that an empty page offers.
EXAMPLES = ("example_1", "example_2", "example_3", "example_4")

Updates = tuple[Any, ...]


class PageUpdates:
    """Makes updates for the components of `VIEW`; asks the backend only to count tokens."""

    def __init__(self, backend: ChatBackend) -> None:
        self._backend = backend

    def none(self) -> Updates:
        """Return updates that change nothing."""
        return self._named()

    def _named(self, **changed: Any) -> Updates:
        return tuple(changed.get(name, gr.skip()) for name in VIEW)

    def opened(self, session: PageSession, controls: Controls, *, notice: str) -> Updates:
        """Show a session whose page was just opened, with example prompts in its language."""
        shown = dict(
            zip(VIEW, self.whole(session, controls, save=False, notice=notice), strict=True)
        )
        words = session.words
        shown["chatbot"] = gr.update(
            value=shown["chatbot"],
            placeholder=words("placeholder"),
            examples=[{"text": words(name)} for name in EXAMPLES],
        )
        return self._named(**shown)

    def refused(self, session: PageSession, notice: str, *, box: str | None = None) -> Updates:
        """Say why nothing was done; a reply that is being written goes on."""
        changed: dict[str, Any] = {
            "session": session,
            # An edit in place has changed what the browser shows.
            "chatbot": self._messages(session, growing=session.is_busy),
            "notice": notice_html(notice),
        }
        if box is not None:
            changed["box"] = box
        return self._named(**changed)

    def growing(self, session: PageSession, controls: Controls, *, save: bool) -> Updates:
        """Show a reply as far as it is; `save` keeps it in the browser too."""
        changed: dict[str, Any] = {"chatbot": self._messages(session, growing=True)}
        if save:
            changed["saved"] = stored_form(session.conversation, controls)
        return self._named(**changed)

    def whole(
        self,
        session: PageSession,
        controls: Controls,
        *,
        busy: bool | None = None,
        save: bool = True,
        box: str | None = None,
        notice: str = "",
    ) -> Updates:
        """Show a session.

        Args:
            session: The page.
            controls: Values of `CONTROLS`.
            busy: Whether a reply is being written; by default what the session says.
            save: Keep it in the browser too.
            box: New text of the message box; None leaves it alone.
            notice: Why something was refused.
        """
        busy = session.is_busy if busy is None else busy
        chat, fork = session.conversation, session.stepped_fork
        has_question = chat.last_question is not None
        return self._named(
            session=session,
            saved=stored_form(chat, controls) if save else gr.skip(),
            chatbot=self._messages(session, growing=busy),
            box=gr.skip() if box is None else box,
            notice=notice_html(notice),
            send=gr.update(visible=not busy),
            stop=gr.update(visible=busy),
            regenerate=gr.update(interactive=has_question and not busy),
            undo=gr.update(interactive=has_question and not busy),
            clear=gr.update(interactive=bool(chat.nodes) and not busy),
            earlier=gr.update(visible=len(chat.path) > session.window),
            stepper=gr.update(visible=fork is not None and not busy),
            fork=gr.update(choices=fork_choices(chat), value=fork, visible=len(chat.forks) > 1),
            version=version_text(chat, fork, session.words),
            context=self.context(session, controls, box or ""),
            **{"continue": gr.update(interactive=session.can_continue and not busy)},
        )

    def _messages(self, session: PageSession, *, growing: bool) -> list[dict[str, Any]]:
        return chat_messages(
            session.conversation,
            session.words,
            window=session.window,
            notice=session.notice,
            growing=growing,
            bubbles=session.bubbles,
        )

    def context(self, session: PageSession, controls: Controls, draft: str) -> str:
        """Return the context bar for the conversation and what is being typed."""
        try:
            turns = session.conversation.messages
            if not turns or turns[-1].role == "assistant":
                turns = (*turns, Message("user", draft))
            request = ChatRequest(
                messages=(*system_messages(controls), *turns), params=sampling_params(controls)
            )
            return context_html(self._backend.count_tokens(request), session.words)
        except InvalidRequest as error:
            return notice_html(str(error))
        except QwenError:
            return ""  # still loading, or failed: the status strip says so
