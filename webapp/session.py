"""What the server remembers of one open page; it lives in `gr.State` and is never sent out.

The conversation here is the canonical one. What a browser sends is read once, when the page opens.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakValueDictionary

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
        refusal: Why the last thing that was asked for was not done; shown above the message box.
        completion_note: What stands under a base model's completion, as HTML.
        ended: When its last reply ended, in seconds of the clock; 0 before.
        opened: The conversation that the page was opened with.
        words: The language of this page.
        bubbles: What has been rendered for it.
        turns: Numbers of what a reply changes besides its text (`webapp.page_updates.REPLY_VIEW`).
    """

    def __init__(self, words: Words) -> None:
        self.conversation = self.opened = Conversation()
        self.fork: int | None = None
        self.window = WINDOW
        self.notice = ""
        self.refusal = ""
        self.completion_note = ""
        self.ended = 0.0
        self.words = words
        self.bubbles = Bubbles(words)
        self.turns = itertools.count(1)
        self._lock = threading.Lock()
        self._cancel: threading.Event | None = None
        self._for_box: str | None = None

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
            self.ended = time.time()
            self._cancel = None

    def stop(self) -> None:
        """Stop the running reply, if there is one; its text is kept."""
        cancel = self._cancel
        if cancel is not None:
            cancel.set()

    def put_into_box(self, text: str) -> None:
        """Let the message box be given this text, once."""
        with self._lock:
            self._for_box = text

    def take_for_box(self) -> str | None:
        """Take what the message box is to be given; None leaves it alone."""
        with self._lock:
            text, self._for_box = self._for_box, None
            return text

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


def host_of(request: gr.Request) -> str:
    """Return the address that a page's event came from."""
    client = getattr(request, "client", None)
    return "unknown" if client is None else str(client.host)


class OpenPages:
    """The sessions of a server's open pages, by Gradio's name of each page.

    `gr.State` holds a session from the end of the first event on. A message can be sent while the
    page is still being opened; the events of one page get the same session, whichever is first.
    """

    def __init__(self) -> None:
        self._sessions: WeakValueDictionary[str, PageSession] = WeakValueDictionary()
        self._lock = threading.Lock()

    def session_of(self, request: gr.Request, saved: object) -> PageSession:
        """Return a page's session, made from what its browser stored if there is none yet."""
        page = getattr(request, "session_hash", None)
        if not page:
            return restored_session(request, saved)
        with self._lock:
            known = self._sessions.get(page)
        made = known or restored_session(request, saved)
        with self._lock:
            return self._sessions.setdefault(page, made)


def restored_session(request: gr.Request, saved: object) -> PageSession:
    """Make a page's session from what its browser stored, in the browser's language.

    Used when a page opens, and when a page outlives the server that knew it. A conversation that
    is refused leaves the session empty, with the reason in it.
    """
    session = PageSession(words_for(request.headers.get("accept-language")))
    stored = saved.get("conversation") if isinstance(saved, Mapping) else None
    if stored is None:
        return session
    try:
        session.conversation = parse_conversation(stored)
    except InvalidConversation as error:
        session.refusal = str(error)
    return session
