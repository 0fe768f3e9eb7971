"""The chat page's updates: which component gets which value, from a session.

Gradio wants one value for each output, in a fixed order: `REPLY_VIEW` while a reply is written,
`FRAME_VIEW` behind it, `VIEW` for everything else.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from qwen.backend import ChatBackend
from qwen.errors import InvalidRequest, QwenError
from qwen.messages import ChatRequest, Message
from webapp.controls import Controls, sampling_params, stored_form, system_messages
from webapp.session import PageSession
from webapp.views import (
    chat_messages,
    context_html,
    ended_html,
    fork_choices,
    notice_html,
    version_text,
)

#: What a reply streams to. Each output costs Gradio half as much as the whole text, skipped or not,
#: unless it is a `gr.State`; so what a reply changes elsewhere is shown by one event that follows
#: a new number in `turn`.
REPLY_VIEW = ("session", "chatbot", "turn")

#: The components around the chat, which show a session, in the order of a handler's values.
FRAME_VIEW = (
    "saved",
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

#: Everything that an event without a reply updates.
VIEW = ("session", "chatbot", *FRAME_VIEW)

#: Prompts that an empty page offers.
EXAMPLES = ("example_1", "example_2", "example_3", "example_4")

Updates = tuple[Any, ...]


class PageUpdates:
    """Makes updates for the components of the views; asks the backend only to count tokens."""

    def __init__(self, backend: ChatBackend) -> None:
        self._backend = backend

    def none(self) -> Updates:
        """Return updates of `VIEW` that change nothing."""
        return (gr.skip(),) * len(VIEW)

    def opened(self, session: PageSession, controls: Controls) -> Updates:
        """Show a session whose page was just opened, with example prompts in its language."""
        words = session.words
        chatbot = gr.update(
            value=self._messages(session),
            placeholder=words("placeholder"),
            examples=[{"text": words(name)} for name in EXAMPLES],
        )
        return (session, chatbot, *self.frame(session, controls, save=False))

    def whole(self, session: PageSession, controls: Controls, *, save: bool = True) -> Updates:
        """Show a session in the components of `VIEW`; `save` keeps it in the browser too."""
        return (session, self._messages(session), *self.frame(session, controls, save=save))

    def growing(self, session: PageSession) -> Updates:
        """Show a reply as far as it is, in the components of `REPLY_VIEW`."""
        return (gr.skip(), self._messages(session), gr.skip())

    def turn(self, session: PageSession) -> Updates:
        """Show the chat in the components of `REPLY_VIEW`, and let the frame follow."""
        return (session, self._messages(session), next(session.turns))

    def frame(self, session: PageSession, controls: Controls, *, save: bool = True) -> Updates:
        """Show a session in the components of `FRAME_VIEW`; `save` keeps it in the browser too."""
        busy, box = session.is_busy, session.take_for_box()
        chat, fork = session.conversation, session.stepped_fork
        has_question = chat.last_question is not None
        shown: dict[str, Any] = {
            "saved": stored_form(chat, controls) if save else gr.skip(),
            "box": gr.skip() if box is None else box,
            "notice": ended_html(session.ended) + notice_html(session.refusal),
            "send": gr.update(visible=not busy),
            "stop": gr.update(visible=busy),
            "regenerate": gr.update(interactive=has_question and not busy),
            "undo": gr.update(interactive=has_question and not busy),
            "continue": gr.update(interactive=session.can_continue and not busy),
            "clear": gr.update(interactive=bool(chat.nodes) and not busy),
            "earlier": gr.update(visible=len(chat.path) > session.window),
            "stepper": gr.update(visible=fork is not None and not busy),
            "fork": gr.update(choices=fork_choices(chat), value=fork, visible=len(chat.forks) > 1),
            "version": version_text(chat, fork, session.words),
            "context": self.context(session, controls, box or ""),
        }
        return tuple(shown[name] for name in FRAME_VIEW)

    def _messages(self, session: PageSession) -> list[dict[str, Any]]:
        return chat_messages(
            session.conversation,
            session.words,
            window=session.window,
            notice=session.notice,
            growing=session.is_busy,
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
