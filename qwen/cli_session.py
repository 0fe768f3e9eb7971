"""One conversation of the terminal chat: its turns, its settings, its replies.

Knows the backend and no terminal. Not for use from several threads at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

from qwen.backend import ChatBackend
from qwen.errors import InvalidRequest
from qwen.messages import ChatRequest, ContextUsage, Message, SamplingParams, StreamEvent
from qwen.transcript import Transcript

_ENDS = {
    "stop": "complete",
    "length": "cut at max_new_tokens or the context's end",
    "cancelled": "stopped",
    "tool_calls": "asks for a tool",
}
_INTERRUPTED = "interrupted"


class ChatSession:
    """A conversation with a backend.

    Attributes:
        params: Sampling settings of the next reply.
        system_prompt: Empty sends none.
        entries: Questions and replies in turn, each with the note under it.
    """

    def __init__(
        self, backend: ChatBackend, *, system_prompt: str = "", seed: int | None = None
    ) -> None:
        self._backend = backend
        self.info = backend.info
        self.default_params = replace(self.info.default_params, seed=seed)
        self.params: SamplingParams = self.default_params
        self.system_prompt = system_prompt
        self.entries: list[tuple[Message, str]] = []
        self._versions = 0

    def ask(self, text: str, cancel: threading.Event) -> Iterator[StreamEvent]:
        """Stream the reply to a question.

        Question and reply are kept as soon as there is text, also if it is stopped or fails
        midway; otherwise the conversation stays as it was.

        Raises:
            QwenError: As `ChatBackend.stream`.
        """
        self._versions = 0
        yield from self._reply(self.entries, text, cancel)

    def regenerate(self, cancel: threading.Event) -> Iterator[StreamEvent]:
        """Stream another reply to the last question; the old one stays until there is text.

        Raises:
            InvalidRequest: There is no question yet.
            QwenError: As `ChatBackend.stream`.
        """
        if len(self.entries) < 2:
            raise InvalidRequest("There is no reply yet that could be made anew. Ask something.")
        self._versions += 1
        yield from self._reply(self.entries[:-2], self.entries[-2][0].content, cancel)

    def _reply(
        self, earlier: list[tuple[Message, str]], text: str, cancel: threading.Event
    ) -> Iterator[StreamEvent]:
        question = Message("user", text)
        pieces: list[str] = []
        note = _INTERRUPTED
        try:
            for event in self._backend.stream(self._request(earlier, question), cancel):
                pieces.append(event.text)
                if event.finish_reason is not None:
                    note = reply_note(event)
                yield event
        finally:
            reply = "".join(pieces)
            if reply.strip():
                self.entries = [*earlier, (question, ""), (Message("assistant", reply), note)]

    def _request(self, earlier: list[tuple[Message, str]], question: Message) -> ChatRequest:
        params = self.params
        if params.seed is not None:
            # With a fixed seed, a reply made anew would be the same text again.
            params = replace(params, seed=(params.seed + self._versions) % 2**63)
        if not self.info.is_chat:
            return ChatRequest(raw_prompt=question.content, params=params)
        system = (Message("system", self.system_prompt),) if self.system_prompt.strip() else ()
        turns = tuple(message for message, _ in earlier)
        return ChatRequest(messages=(*system, *turns, question), params=params)

    def usage(self) -> ContextUsage:
        """Tell how the conversation fills the context, before the next question."""
        return self._backend.count_tokens(self._request(self.entries, Message("user", "")))

    def undo(self) -> str:
        """Take the last question and its reply back; returns the question.

        Raises:
            InvalidRequest: There is none.
        """
        if not self.entries:
            raise InvalidRequest("There is nothing to take back: the conversation is empty.")
        question = self.entries[-2][0].content
        self.entries = self.entries[:-2]
        return question

    def clear(self) -> None:
        """Begin a new conversation; the settings stay."""
        self.entries = []

    def transcript(self) -> Transcript:
        """Return the conversation as it is saved."""
        return Transcript(
            title="Qwen Chat",
            model=self.info.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            system_prompt=self.system_prompt,
            entries=tuple(self.entries),
        )

    def restore(self, transcript: Transcript) -> None:
        """Go on with a saved conversation; a last question without a reply is left out."""
        whole = len(transcript.entries) // 2 * 2
        self.entries = list(transcript.entries[:whole])
        self.system_prompt = transcript.system_prompt
        self._versions = 0


def reply_note(final: StreamEvent) -> str:
    """Return the line under a finished reply: tokens, speed, first token, why it ended."""
    parts = []
    if final.usage is not None:
        count = final.usage.completion_tokens
        parts.append(f"{count:,} token{'' if count == 1 else 's'}")
    if final.timing is not None:
        if final.timing.tokens_per_second > 0:
            parts.append(f"{final.timing.tokens_per_second:.1f} tok/s")
        parts.append(f"first after {final.timing.time_to_first_token:.1f} s")
    return " · ".join([*parts, _ENDS.get(final.finish_reason or "", "")])
