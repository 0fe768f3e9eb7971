"""What the server remembers of one open page; it lives in `gr.State` and is never sent out.

The conversation here is the canonical one. What a browser sends is read once, when the page opens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import gradio as gr

from qwen.errors import InvalidConversation, InvalidRequest
from webapp.conversation import Conversation, parse_conversation
from webapp.text import Words, words_for
from webapp.views import WINDOW, Bubbles


class PageBusy(InvalidRequest):
    """A page writes one reply at a time."""


class PageSession:
    """One page's conversation and its running reply.

    Attributes:
        conversation: What was said; replaced, never changed in place.
        fork: The message that the version stepper works on; None for the last one.
        window: How many messages are displayed.
        notice: The sentence under the last message, such as an error; not part of the history.
        words: The language of this page.
        bubbles: What has been rendered for it.
    """

    def __init__(self, words: Words) -> None:
        self.conversation = Conversation()
        self.fork: int | None = None
        self.window = WINDOW
        self.notice = ""
        self.words = words
        self.bubbles = Bubbles(words)
        self._lock = threading.Lock()
        self._cancel: threading.Event | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a reply is being written."""
        return self._cancel is not None

    @contextmanager
    def reply(self) -> Iterator[threading.Event]:
        """Hold the page's one place for a running reply; yields the event that stops it.

        Raises:
            PageBusy: Another reply is being written.
        """
        with self._lock:
            if self._cancel is not None:
                raise PageBusy(self.words("busy"))
            cancel = self._cancel = threading.Event()
        try:
            yield cancel
        finally:
            cancel.set()
            self._cancel = None

    def stop(self) -> None:
        """Stop the running reply, if there is one; its text is kept."""
        cancel = self._cancel
        if cancel is not None:
            cancel.set()

    @property
    def stepped_fork(self) -> int | None:
        """The message that the stepper works on: the chosen one while shown, else the last."""
        forks = self.conversation.forks
        if self.fork in forks:
            return self.fork
        return forks[-1] if forks else None

    @property
    def can_continue(self) -> bool:
        """Whether the last shown reply was cut off, stopped or interrupted."""
        path = self.conversation.path
        if not path or path[-1].role != "assistant":
            return False
        note = path[-1].note
        return note is None or note.finish_reason in ("length", "cancelled")


def restored_session(request: gr.Request, saved: object) -> tuple[PageSession, str]:
    """Make a page's session from what its browser stored, in the browser's language.

    Used when a page opens, and when a page outlives the server that knew it.

    Returns:
        The session, and a notice when the stored conversation was refused.
    """
    session = PageSession(words_for(request.headers.get("accept-language")))
    stored = saved.get("conversation") if isinstance(saved, Mapping) else None
    if stored is None:
        return session, ""
    try:
        session.conversation = parse_conversation(stored)
    except InvalidConversation as error:
        return session, str(error)
    return session, ""
