"""From a backend's events to OpenAI's replies and chunks, for both kinds of completion.

Pure; knows no web framework and no sending. One object shapes one reply.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen.errors import BackendNotReady
from qwen.messages import FinishReason, StreamEvent, TokenLogprobs, Usage

Json = dict[str, Any]

#: JSON has no infinity; OpenAI's reference names this value for tokens that are all but impossible.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every chunk of a reply repeats; `created` in seconds since 1970."""

    id: str
    model: str
    created: int


class ReplyShape(Protocol):
    """Turns one reply's events into JSON objects."""

    def opening(self) -> Iterator[Json]:
        """Yield the chunks that stand before the first event's."""
        ...

    def chunks(self, event: StreamEvent) -> Iterator[Json]:
        """Yield the chunks of an event, which may be none."""
        ...

    def whole(self, events: Sequence[StreamEvent]) -> Json:
        """Return the body of a reply that was not streamed."""
        ...


class ChatShape:
    """Shapes a chat completion.

    Args:
        head: Of the reply.
        has_logprobs: Whether they were asked for.
        include_usage: Add a last chunk with the token counts.
        legacy_functions: Calls in the older form: one `function_call` instead of `tool_calls`.
    """

    def __init__(
        self,
        head: ReplyHead,
        *,
        has_logprobs: bool = False,
        include_usage: bool = False,
        legacy_functions: bool = False,
    ) -> None:
        self._head = head
        self._has_logprobs = has_logprobs
        self._include_usage = include_usage
        self._legacy = legacy_functions

    def opening(self) -> Iterator[Json]:
        """See `ReplyShape.opening`: the role, with an empty text for clients that print it."""
        yield self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: StreamEvent) -> Iterator[Json]:
        """See `ReplyShape.chunks`."""
        if event.reasoning:
            yield self._chunk({"reasoning_content": event.reasoning, "content": ""})
        if event.text or event.logprobs:
            yield self._chunk({"content": event.text}, event.logprobs)
        for part in event.tool_calls:
            delta = self._call_delta(part.index, part.id, part.name, part.arguments)
            if delta:
                yield self._chunk(delta)
        if event.finish_reason is not None:
            # The text is empty, not missing: scripts of 2023 print it.
            yield self._chunk({"content": ""}, finish=_finish(event.finish_reason, self._legacy))
            if self._include_usage:
                yield self._frame([]) | {"usage": _usage(event.usage)}

    def whole(self, events: Sequence[StreamEvent]) -> Json:
        """See `ReplyShape.whole`."""
        last = events[-1]
        assert last.finish_reason is not None
        text = "".join(event.text for event in events)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        reasoning = "".join(event.reasoning for event in events)
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = _joined_calls(events)
        if calls:
            message["content"] = text or None
            message |= (
                {"function_call": calls[0]["function"]} if self._legacy else {"tool_calls": calls}
            )
        logprobs = [one for event in events for one in event.logprobs]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": [_chat_logprob(one) for one in logprobs], "refusal": None}
            if self._has_logprobs
            else None,
            "finish_reason": _finish(last.finish_reason, self._legacy),
        }
        frame = self._frame([choice]) | {"object": "chat.completion"}
        return frame | {"usage": _usage(last.usage)}

    def _call_delta(self, index: int, call_id: str, name: str, arguments: str) -> Json | None:
        function = ({"name": name} if name else {}) | {"arguments": arguments}
        if self._legacy:
            return {"function_call": function} if index == 0 else None
        begin = {"id": call_id, "type": "function"} if call_id else {}
        return {"tool_calls": [{"index": index, **begin, "function": function}]}

    def _chunk(
        self, delta: Json, logprobs: Sequence[TokenLogprobs] = (), finish: str | None = None
    ) -> Json:
        choice: Json = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        if self._has_logprobs and logprobs:
            content = [_chat_logprob(one) for one in logprobs]
            choice["logprobs"] = {"content": content, "refusal": None}
        return self._frame([choice]) | ({"usage": None} if self._include_usage else {})

    def _frame(self, choices: list[Json]) -> Json:
        return _frame(self._head, "chat.completion.chunk", choices)


class CompletionShape:
    """Shapes a completion of raw text.

    Args:
        head: Of the reply.
        has_logprobs: Whether they were asked for.
        include_usage: Add a last chunk with the token counts.
    """

    def __init__(
        self, head: ReplyHead, *, has_logprobs: bool = False, include_usage: bool = False
    ) -> None:
        self._head = head
        self._has_logprobs = has_logprobs
        self._include_usage = include_usage
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def opening(self) -> Iterator[Json]:
        """See `ReplyShape.opening`."""
        return iter(())

    def chunks(self, event: StreamEvent) -> Iterator[Json]:
        """See `ReplyShape.chunks`."""
        if event.text or event.logprobs:
            yield self._frame([self._choice(event.text, event.logprobs, None)]) | self._no_usage()
        if event.finish_reason is not None:
            finish = _finish(event.finish_reason, False)
            yield self._frame([self._choice("", (), finish)]) | self._no_usage()
            if self._include_usage:
                yield self._frame([]) | {"usage": _usage(event.usage)}

    def whole(self, events: Sequence[StreamEvent]) -> Json:
        """See `ReplyShape.whole`."""
        last = events[-1]
        assert last.finish_reason is not None
        logprobs = [one for event in events for one in event.logprobs]
        text = "".join(event.text for event in events)
        choice = self._choice(text, logprobs, _finish(last.finish_reason, False))
        if self._has_logprobs and choice["logprobs"] is None:
            choice["logprobs"] = self._logprobs(())
        return self._frame([choice]) | {"usage": _usage(last.usage)}

    def _choice(self, text: str, logprobs: Sequence[TokenLogprobs], finish: str | None) -> Json:
        told = self._logprobs(logprobs) if self._has_logprobs and logprobs else None
        return {"index": 0, "text": text, "logprobs": told, "finish_reason": finish}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> Json:
        offsets = []
        for one in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(one.token))
        return {
            "tokens": [_token_text(one.token) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            # Tokens that look alike as text: the likeliest counts, so it is put in last.
            "top_logprobs": [
                {_token_text(token): _finite(logprob) for token, logprob in reversed(one.top)}
                for one in logprobs
            ],
            "text_offset": offsets,
        }

    def _no_usage(self) -> Json:
        return {"usage": None} if self._include_usage else {}

    def _frame(self, choices: list[Json]) -> Json:
        return _frame(self._head, "text_completion", choices)


def _frame(head: ReplyHead, kind: str, choices: list[Json]) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": choices,
    }


def _finish(reason: FinishReason, legacy_functions: bool) -> str:
    if reason == "cancelled":
        # OpenAI has no such reason; the client is still there, so it was the server that stopped.
        raise BackendNotReady("The reply was cut because the server is stopping. Send it again.")
    return "function_call" if reason == "tool_calls" and legacy_functions else reason


def _usage(usage: Usage | None) -> Json:
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _joined_calls(events: Sequence[StreamEvent]) -> list[Json]:
    parts = sorted(
        (part for event in events for part in event.tool_calls), key=lambda part: part.index
    )
    calls = []
    for _, group in itertools.groupby(parts, key=lambda part: part.index):
        of_one = list(group)
        function = {
            "name": "".join(part.name for part in of_one),
            "arguments": "".join(part.arguments for part in of_one),
        }
        call_id = "".join(part.id for part in of_one)
        calls.append({"id": call_id, "type": "function", "function": function})
    return calls


def _chat_logprob(one: TokenLogprobs) -> Json:
    top = [_token_logprob(token, logprob) for token, logprob in one.top]
    return _token_logprob(one.token, one.logprob) | {"top_logprobs": top}


def _token_logprob(token: bytes, logprob: float) -> Json:
    return {"token": _token_text(token), "logprob": _finite(logprob), "bytes": list(token)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _token_text(token: bytes) -> str:
    """Return a token as text; what is no whole character is U+FFFD, and `bytes` tells it."""
    return token.decode("utf-8", errors="replace")
