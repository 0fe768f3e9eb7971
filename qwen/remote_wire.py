"""Our values ↔ the JSON of the OpenAI API, both ways.

Pure functions. What an engine sends is checked: it may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen.errors import EngineFailed, InvalidRequest
from qwen.messages import (
    ChatRequest,
    FinishReason,
    Message,
    SamplingParams,
    TokenLogprobs,
    ToolCallDelta,
    Usage,
)
from qwen.remote_engines import RemoteModel
from qwen.tool_prompt import build_tool_value

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "stop",
    "eos": "stop",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one server-sent event of a reply says."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def says_something(self) -> bool:
        """Whether a reader has seen a part of the reply."""
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs)


def request_path(request: ChatRequest) -> str:
    """Return the address under the base URL that answers a request."""
    return "/completions" if request.raw_prompt is not None else "/chat/completions"


def request_body(request: ChatRequest, model: RemoteModel, *, max_tokens: int) -> dict[str, Any]:
    """Return the JSON of a streamed request.

    Raises:
        InvalidRequest: The engine cannot do what is asked for.
    """
    body: dict[str, Any] = {
        "model": model.id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
        **_sampling(request.params, model, raw=request.raw_prompt is not None),
    }
    if request.raw_prompt is not None:
        if request.messages:
            raise InvalidRequest("Send either messages or a raw prompt, not both.")
        return {**body, "prompt": request.raw_prompt + request.reply_prefix}
    body["messages"] = [message_json(message) for message in request.messages]
    if request.reply_prefix:
        if model.kind.continuing is None:
            raise InvalidRequest(
                "This engine cannot go on with a reply that was begun. Ask it to continue in a "
                "message of your own, or regenerate the reply."
            )
        body["messages"].append({"role": "assistant", "content": request.reply_prefix})
        body |= model.kind.continuing
    if request.tools:
        body["tools"] = [build_tool_value(tool) for tool in request.tools]
        body["tool_choice"] = _tool_choice(request.tool_choice)
    return body


def _sampling(params: SamplingParams, model: RemoteModel, *, raw: bool) -> dict[str, Any]:
    kind = model.kind
    body: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p}
    if kind.no_top_k is not None:
        body["top_k"] = params.top_k or kind.no_top_k
    if kind.penalty:
        body[kind.penalty] = params.repetition_penalty
    if kind.penalty == "repeat_penalty" and model.context_length:
        body["repeat_last_n"] = model.context_length  # over prompt and reply, as ours
    if params.seed is not None:
        body["seed"] = params.seed
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_logprobs is not None:
        body |= (
            {"logprobs": params.top_logprobs}
            if raw
            else {"logprobs": True, "top_logprobs": params.top_logprobs}
        )
    return body


def message_json(message: Message) -> dict[str, Any]:
    """Return a message as the API has it."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        entry["tool_call_id"] = message.tool_call_id
    return entry


def _tool_choice(choice: str) -> str | dict[str, Any]:
    if choice in ("auto", "none", "required"):
        return choice
    return {"type": "function", "function": {"name": choice}}


def parse_chunk(data: object) -> Chunk:
    """Read one event's JSON, of a chat or of a raw completion.

    Raises:
        EngineFailed: It has another form, or names no reason to end that is known.
    """
    if not isinstance(data, Mapping):
        raise _garbage()
    usage = _parse_usage(data.get("usage"))
    choices = _list(data.get("choices"))
    if not choices:
        return Chunk(usage=usage)
    choice = _mapping(choices[0])
    delta = _mapping(choice.get("delta"))
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    return Chunk(
        text=_text(delta.get("content", choice.get("text"))),
        reasoning=_text(reasoning),
        tool_calls=_parse_calls(delta.get("tool_calls")),
        logprobs=_parse_logprobs(choice.get("logprobs")),
        finish_reason=_parse_finish(choice.get("finish_reason")),
        usage=usage,
    )


def _garbage() -> EngineFailed:
    return EngineFailed(
        "The engine answers with something that is no reply of the OpenAI API. Look at its log, "
        "and check that --base-url is the address of its API."
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _garbage()
    # JSON can spell half a surrogate pair, which nothing after this can encode.
    return value.encode("utf-8", "replace").decode() if not value.isascii() else value


def _parse_usage(value: object) -> Usage | None:
    if not isinstance(value, Mapping):
        return None
    counts = [value.get("prompt_tokens"), value.get("completion_tokens") or 0]
    if not all(isinstance(n, int) and n >= 0 for n in counts):
        return None
    return Usage(*counts)  # type: ignore[arg-type]


def _parse_finish(value: object) -> FinishReason | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in _FINISH:
        raise EngineFailed(
            "The engine ended the reply for a reason that is not known here. Look at its log, "
            "then ask again."
        )
    return _FINISH[value]


def _parse_calls(value: object) -> tuple[ToolCallDelta, ...]:
    calls = []
    for place, entry in enumerate(map(_mapping, _list(value))):
        function, index = _mapping(entry.get("function")), entry.get("index", place)
        if not isinstance(index, int):
            raise _garbage()
        calls.append(
            ToolCallDelta(
                index=index,
                id=_text(entry.get("id")),
                name=_text(function.get("name")),
                arguments=_text(function.get("arguments")),
            )
        )
    return tuple(calls)


def _parse_logprobs(value: object) -> tuple[TokenLogprobs, ...]:
    """Read the chat's form, which llama.cpp uses for completions too, or the older one."""
    if not isinstance(value, Mapping):
        return ()
    content = value.get("content")
    if content is not None:
        return tuple(
            TokenLogprobs(*_scored(entry), tuple(map(_scored, _list(entry.get("top_logprobs")))))
            for entry in map(_mapping, _list(content))
        )
    tokens, scores = _list(value.get("tokens")), _list(value.get("token_logprobs"))
    tops = _list(value.get("top_logprobs")) or [None] * len(tokens)
    return tuple(
        TokenLogprobs(
            _text(token).encode(),
            _number(score),
            tuple((_text(key).encode(), _number(n)) for key, n in _mapping(top).items()),
        )
        for token, score, top in zip(tokens, scores, tops, strict=False)
    )


def _list(value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _garbage()
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _garbage()
    return value


def _scored(value: object) -> tuple[bytes, float]:
    entry = _mapping(value)
    data = entry.get("bytes")
    if isinstance(data, list) and all(isinstance(n, int) and 0 <= n < 256 for n in data):
        return bytes(data), _number(entry.get("logprob"))
    return _text(entry.get("token")).encode(), _number(entry.get("logprob"))


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else float("-inf")
    except OverflowError:
        raise _garbage() from None
