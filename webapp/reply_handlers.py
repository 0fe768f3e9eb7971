"""Gradio events that end in a reply: send, edit, regenerate, continue; and the one that stops it.

A handler takes plain component values and yields updates in the order of `REPLY_VIEW`; what the
page shows around the chat follows in an event of its own, `follow`. The conversation comes from
the page's session, never from the browser. Knows no layout.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from qwen.backend import DeferredBackend
from qwen.errors import BackendNotReady, InvalidRequest, QwenError
from qwen.messages import ChatRequest
from webapp.controls import Controls, sampling_params, system_messages
from webapp.conversation import Conversation
from webapp.page_updates import FRAME_VIEW, PageUpdates, Updates
from webapp.render import restore_text
from webapp.reply_stream import HEARTBEAT_SECONDS, Growth, Pace, Snapshot, stream_snapshots
from webapp.session import OpenPages, PageBusy, PageSession, host_of
from webapp.views import loading_text, queue_text
from webapp.visitors import VisitorBusy, Visitors

logger = logging.getLogger(__name__)

#: Between two copies of a growing reply in the browser's storage.
SAVE_SECONDS = 2.0


class ReplyHandlers:
    """Replies of the one shared backend to one page at a time."""

    def __init__(
        self,
        backend: DeferredBackend,
        page: PageUpdates,
        pages: OpenPages,
        visitors: Visitors,
        pace: Pace,
    ) -> None:
        self._backend = backend
        self._page = page
        self._pages = pages
        self._visitors = visitors
        self._pace = pace

    def send(
        self,
        request: gr.Request,
        text: str,
        saved: object,
        session: PageSession | None,
        *controls: Any,
    ) -> Iterator[Updates]:
        """Send the message box's text and stream the reply."""
        session = session or self._pages.session_of(request, saved)
        text = text if isinstance(text, str) else ""
        yield from self._reply(
            request, session, controls, lambda chat: chat.ask(text), typed=text, from_box=True
        )

    def send_example(
        self,
        request: gr.Request,
        event: gr.SelectData,
        saved: object,
        session: PageSession | None,
        *controls: Any,
    ) -> Iterator[Updates]:
        """Send the example prompt that was clicked."""
        session = session or self._pages.session_of(request, saved)
        text = str(event.value["text"])
        yield from self._reply(request, session, controls, lambda chat: chat.ask(text), typed=text)

    def edit(
        self,
        request: gr.Request,
        event: gr.EditData,
        saved: object,
        session: PageSession | None,
        *controls: Any,
    ) -> Iterator[Updates]:
        """Make another version of an earlier message and stream the reply to it."""
        session = session or self._pages.session_of(request, saved)
        index = event.index if isinstance(event.index, int) else event.index[0]
        shown = session.conversation.path[-session.window :]
        text = restore_text(str(event.value))
        if not 0 <= index < len(shown) or shown[index].role != "user":
            yield self._refused(session, session.words("stale_edit"), typed=text)
            return
        node_id = shown[index].id
        yield from self._reply(
            request, session, controls, lambda chat: chat.edit(node_id, text), typed=text
        )

    def regenerate(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Iterator[Updates]:
        """Stream another version of the last reply; the earlier ones stay."""
        session = session or self._pages.session_of(request, saved)
        asked = session.conversation.last_question
        if asked is None:
            yield self._refused(session, session.words("nothing_to_regenerate"))
            return
        yield from self._reply(request, session, controls, lambda chat: replace(chat, leaf=asked))

    def continue_reply(
        self, request: gr.Request, saved: object, session: PageSession | None, *controls: Any
    ) -> Iterator[Updates]:
        """Go on with a reply that was cut off or stopped."""
        session = session or self._pages.session_of(request, saved)
        if not session.can_continue:
            yield self._refused(session, session.words("nothing_to_continue"))
            return
        yield from self._reply(request, session, controls, lambda chat: chat)

    def _reply(
        self,
        request: gr.Request,
        session: PageSession,
        controls: Controls,
        change: Callable[[Conversation], Conversation],
        *,
        typed: str | None = None,
        from_box: bool = False,
    ) -> Iterator[Updates]:
        """Change the conversation and stream what the model says to it.

        Args:
            request: Whose it is.
            session: The page.
            controls: Values of `CONTROLS`.
            change: Leads to a path that ends with the question, or with the reply to continue.
            typed: The user's text; it goes (back) into the box when the request is refused.
            from_box: The text was typed into the box, which is emptied when the reply begins.
        """
        if typed is not None and not typed.strip():
            # What the box shows stays: typed before the page was ready, it may not have been sent.
            yield self._refused(session, session.words("empty"))
            return
        before = session.conversation
        accepted = False
        try:
            with session.reply() as cancel, self._visitors.reply(host_of(request), session.words):
                base = session.conversation = change(before)
                session.refusal = ""
                if from_box:
                    session.put_into_box("")
                yield self._page.turn(session)
                yield from self._until_loaded(session, cancel)
                asked = self._request(base, controls)
                self._backend.count_tokens(asked)
                accepted = True
                snapshots = stream_snapshots(
                    lambda: self._backend.stream(asked, cancel), cancel, self._pace
                )
                yield from self._grow(session, Growth(base), snapshots)
            session.refusal = ""
            yield self._page.turn(session)
        except (PageBusy, VisitorBusy) as error:
            yield self._refused(session, str(error), typed=typed)
        except Exception as error:
            message = self._message_for(session, error)
            if accepted and not isinstance(error, InvalidRequest):
                session.notice, session.refusal = message, ""
                yield self._page.turn(session)
            else:
                session.conversation, session.notice = before, ""
                yield self._refused(session, message, typed=typed)
        finally:
            if not session.is_busy:  # else it belongs to the reply that goes on
                session.notice = ""

    def _refused(self, session: PageSession, why: str, *, typed: str | None = None) -> Updates:
        """Say why nothing was done; a reply that is being written goes on."""
        session.refusal = why
        if typed is not None:
            session.put_into_box(typed)
        return self._page.turn(session)  # an edit in place has changed what the browser shows

    def _message_for(self, session: PageSession, error: Exception) -> str:
        if isinstance(error, QwenError):
            logger.warning("A request was refused or failed: %s", type(error).__name__)
            return str(error)
        logger.exception("A page event failed")
        return session.words("unexpected")

    def _until_loaded(self, session: PageSession, cancel: threading.Event) -> Iterator[Updates]:
        """Yield pictures of the loading progress until the model is there or cannot be."""
        while self._backend.status.stage == "loading":
            if cancel.is_set():
                raise BackendNotReady(session.words("stopped_while_loading"))
            session.notice = loading_text(self._backend.status, session.words)
            yield self._page.growing(session)
            cancel.wait(HEARTBEAT_SECONDS)
        session.notice = session.words("waiting")

    def _request(self, base: Conversation, controls: Controls) -> ChatRequest:
        path = base.messages
        prefix = path[-1].content if path[-1].role == "assistant" else ""
        params = sampling_params(controls)
        if params.seed is not None:
            # With a fixed seed every version would otherwise be the same text again.
            versions = sum(node.parent == base.last_question for node in base.nodes)
            params = replace(params, seed=(params.seed + versions) % 2**63)
        return ChatRequest(
            messages=(*system_messages(controls), *(path[:-1] if prefix else path)),
            reply_prefix=prefix,
            params=params,
        )

    def _grow(
        self, session: PageSession, growth: Growth, snapshots: Iterator[Snapshot]
    ) -> Iterator[Updates]:
        """Take a reply's pictures into the conversation; yield what the page shows of them."""
        saved_at = time.monotonic()
        for snapshot in snapshots:
            if snapshot.text:
                session.notice = ""
                session.conversation = growth.at(snapshot)
            elif snapshot.queued is not None:
                session.notice = queue_text(snapshot.queued, session.words)
            elif snapshot.final is not None:
                cancelled = snapshot.final.finish_reason == "cancelled"
                session.notice = session.words(
                    "stopped_before_text" if cancelled else "empty_reply"
                )
            elif snapshot.thoughts:
                session.notice = session.words(
                    "thinking", thoughts=" ".join(snapshot.thoughts.split())
                )
            if snapshot.final is not None:
                return
            if snapshot.text and time.monotonic() - saved_at > SAVE_SECONDS:
                saved_at = time.monotonic()
                yield self._page.turn(session)
            else:
                yield self._page.growing(session)

    def follow(self, session: PageSession | None, *controls: Any) -> Updates:
        """Show in the components of `FRAME_VIEW` what a reply has changed there; store it."""
        if session is None:  # the server was started anew
            return (gr.skip(),) * len(FRAME_VIEW)
        return self._page.frame(session, controls)

    def stop(self, session: PageSession | None) -> None:
        """Stop the running reply within one token; its text is kept."""
        if session is not None:
            session.stop()
