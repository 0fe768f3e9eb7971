"""Plain values that travel between the layers: messages, requests, sampling parameters, events.

Knows no tokenizer, no model and no web framework. Everything here is immutable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen.errors import InvalidSetting

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
        name: As the model and the client know it.
        description: What it does.
        parameters: A JSON schema of an object; or a list of parameters, as Qwen v1's plugins had.
        human_name: As people know it (`name_for_human` of Qwen v1's plugins); "" is `name`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    human_name: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's wish to call a tool; `arguments` is JSON as the model wrote it, right or wrong."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn's raw text; `content` is never HTML and never escaped.

    Attributes:
        role: Who speaks.
        content: What they say; of role "tool" the result of a call.
        tool_calls: An assistant's calls.
        tool_call_id: Of role "tool": which call this is the result of.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Range:
    """The closed interval of a numeric setting, and whether it takes whole numbers only."""

    low: float
    high: float
    whole: bool = False


#: What a setting may be, here once for the page's sliders, the API and the terminal.
SAMPLING_RANGES: dict[str, Range] = {
    "temperature": Range(0.0, 2.0),
    "top_p": Range(0.01, 1.0),
    "top_k": Range(0, 1000, whole=True),
    "repetition_penalty": Range(0.5, 2.0),
    "max_new_tokens": Range(1, 1_048_576, whole=True),
    "seed": Range(0, 2**63 - 1, whole=True),
    "top_logprobs": Range(0, 20, whole=True),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a reply ends.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus sampling: the smallest set of tokens with this total probability.
        top_k: Only the k likeliest tokens; 0 switches the limit off.
        repetition_penalty: As in Transformers, over prompt and reply; 1 switches it off.
        seed: Same seed, prompt and settings give the same reply; None draws a fresh one.
        max_new_tokens: Tokens after which a reply is cut with finish reason "length".
        stop: Texts that end the reply and are not shown.
        top_logprobs: Tell each token's log-probability, and those of so many likeliest tokens;
            None tells neither.

    Raises:
        InvalidSetting: A value is not a finite number or lies outside `SAMPLING_RANGES`.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    repetition_penalty: float = 1.05
    seed: int | None = None
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in SAMPLING_RANGES:
            value = getattr(self, name)
            if name in ("seed", "top_logprobs") and value is None:
                continue
            object.__setattr__(self, name, checked_number(name, value))
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise InvalidSetting("stop must be a list of non-empty texts.")


def checked_number(name: str, value: object) -> float | int:
    """Return a setting's value as a number of its kind.

    Raises:
        InvalidSetting: The value is no finite number, no whole one where one is wanted, or
            outside the setting's range.
    """
    allowed = SAMPLING_RANGES[name]
    kind = "a whole number" if allowed.whole else "a number"
    wanted = f"{name} must be {kind} from {allowed.low:g} to {allowed.high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidSetting(f"{wanted}.")
    if allowed.whole and value != int(value):
        raise InvalidSetting(f"{wanted}; {value:g} is not.")
    if not allowed.low <= value <= allowed.high:
        raise InvalidSetting(f"{wanted}; {value:g} is not.")
    return int(value) if allowed.whole else float(value)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a backend is asked for: a conversation, or a raw prompt to complete.

    Attributes:
        messages: An optional system message, then turns; the last one is the user's.
        raw_prompt: Text to complete without any template (base models); excludes `messages`.
        reply_prefix: The beginning of the reply that the model is to continue; it is not
            repeated in the stream.
        tools: What the model may call; a chat's only.
        tool_choice: "auto", "none", "required" (some call) or the name of the tool to call.
        params: Sampling parameters.
        model: One of `BackendInfo.other_models`; empty is the one that answers by default.
    """

    messages: tuple[Message, ...] = ()
    raw_prompt: str | None = None
    reply_prefix: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    params: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""


@dataclass(frozen=True, slots=True)
class ContextUsage:
    """How a request fills the context; all figures in tokens, templates included.

    Attributes:
        system: Tokens of the system message.
        history: Tokens of the kept earlier turns.
        query: Tokens of the newest user message, the opening of the reply and its prefix.
        limit: Budget of the prompt: the context length, or a smaller one that was set; 0 where a
            remote engine does not tell.
        context_length: Of prompt and reply together; 0 is the same as `limit`.
        dropped: The oldest messages, which do not fit and are left out, oldest first.
        is_estimate: The figures are near, not exact: a remote engine counts, or does not even tell.
        ntk_alpha: By how much dynamic NTK stretches a Qwen v1 model's rotary base for this prompt;
            1 is not at all.
    """

    system: int
    history: int
    query: int
    limit: int
    dropped: tuple[Message, ...] = ()
    ntk_alpha: int = 1
    context_length: int = 0
    is_estimate: bool = False

    @property
    def prompt(self) -> int:
        """Tokens of the whole prompt."""
        return self.system + self.history + self.query

    @property
    def left(self) -> int:
        """Tokens that remain for the reply."""
        return max(self.total - self.prompt, 0)

    @property
    def total(self) -> int:
        """Tokens of prompt and reply together."""
        return self.context_length or self.limit


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a finished request, named as in the OpenAI API."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token since the request, and decode speed after it."""

    time_to_first_token: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a request stands that waits for its turn.

    Attributes:
        position: From 1, the next one to begin; 0 once it has begun.
        seconds: Estimated time until it begins.
    """

    position: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's bytes and natural log-probability, and those of the likeliest tokens in its place.

    Computed from the model's own distribution, before temperature, penalty and cuts.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of the reply's `index`-th tool call.

    The first part of a call has `id` and `name`; the joined `arguments` of all are the call's.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One step of a reply. The joined `text` of all events is the whole reply.

    The last event of a stream, and only the last, has `finish_reason`, `usage` and `timing`.
    The first carries `context`, so that dropped turns are known before the reply is read.

    Attributes:
        text: New text; may be empty while bytes or a possible stop string are held back.
        token_ids: The ids behind this step, in order; with log-probabilities, those whose text is
            in this step or shows in none.
        logprobs: One for each of `token_ids`, where they were asked for.
        tool_calls: New parts of calls; their text is not in `text`.
        reasoning: New text of the model's thoughts, where a remote engine tells them apart.
        queued: The request waits for its turn, here; such events come before any text.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""
    queued: QueuePlace | None = None
    context: ContextUsage | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
