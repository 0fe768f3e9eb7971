"""What clients may send to `/v1`: OpenAI's request bodies, as far as they are supported.

A field that is not here is refused by name. Types are strict: a number in quotes is no number.
Knows no model and no web framework. Source: OpenAI's API reference, chat and legacy completions;
`functions` and `name_for_model` as in Qwen's API of 2023.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from qwen.messages import SAMPLING_RANGES

#: Stop strings are looked for after every token, so their number and length are bounded.
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_TOOLS = 128
#: Of a function's JSON schema; deeper ones would exhaust the recursion of whoever renders them.
MAX_SCHEMA_DEPTH = 32
#: Name under which the loaded model can always be asked for, as in the reference.
MODEL_ALIAS = "Qwen"


class Body(BaseModel):
    """A JSON object whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _check_text(value: str) -> str:
    # JSON may escape half of a surrogate pair, which is no character and has no bytes.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return value


def _check_schema(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    level: list[Any] = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        for text in level:
            if isinstance(text, str):
                _check_text(text)
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


JsonSchema = Annotated[dict[str, JsonValue], AfterValidator(_check_schema)]
Text = Annotated[str, AfterValidator(_check_text)]
FunctionName = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def _ranged(name: str) -> Any:
    allowed = SAMPLING_RANGES[name]
    low, high = (
        (int(allowed.low), int(allowed.high)) if allowed.whole else (allowed.low, allowed.high)
    )
    return Field(default=None, ge=low, le=high)


class TextPart(Body):
    """A part of a message; other types than text are not supported."""

    type: Literal["text"]
    text: Text


Content = Text | list[TextPart]


class NamedFunction(Body):
    """Which function is meant."""

    name: FunctionName


class FunctionCall(Body):
    """A call that the assistant made earlier."""

    name: FunctionName
    arguments: Text


class ToolCallIn(Body):
    """A call that the assistant made earlier, with its id; `index` is accepted without effect."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Body):
    """Instructions; only the first message may be one. `name` has no effect."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says. `name` has no effect."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """An earlier reply, as it came from here; what a reply never holds must be null or empty."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCallIn] | None = None
    function_call: FunctionCall | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class ToolMessage(Body):
    """The result of a call. `name` has no effect."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: str | None = None


class FunctionMessage(Body):
    """The result of a call, in the older form."""

    role: Literal["function"]
    name: FunctionName
    content: Content | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]


class FunctionSpec(Body):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: Literal[False] | None = None


class ToolSpec(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class QwenParameter(Body):
    """A function's parameter in Qwen's form of 2023."""

    name: Text
    description: Text = ""
    required: bool = False
    schema_: JsonSchema = Field(default_factory=dict, alias="schema")


class LegacyFunction(Body):
    """A function in OpenAI's older form, or in Qwen's form of 2023 (`name_for_model`)."""

    name: FunctionName | None = None
    description: Text | None = None
    name_for_model: FunctionName | None = None
    name_for_human: str | None = None
    description_for_model: Text | None = None
    parameters: JsonSchema | list[QwenParameter] | None = None

    @model_validator(mode="after")
    def _has_one_name(self) -> LegacyFunction:
        if (self.name is None) == (self.name_for_model is None):
            raise ValueError("a function needs either name or name_for_model")
        return self


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None


class ResponseFormat(Body):
    """Only plain text: output is not constrained to JSON."""

    type: Literal["text"]


class RequestBody(Body):
    """What both kinds of completion share."""

    model: str = MODEL_ALIAS
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = _ranged("temperature")
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=int(SAMPLING_RANGES["top_k"].high))
    repetition_penalty: float | None = _ranged("repetition_penalty")
    seed: int | None = _ranged("seed")
    max_tokens: int | None = _ranged("max_new_tokens")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    # Supported at the value that changes nothing.
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, JsonValue], Field(max_length=0)] | None = None
    # Without effect: clients send them routinely. docs/api.md lists them.
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None


class ChatCompletionRequest(RequestBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = _ranged("max_new_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = _ranged("top_logprobs")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: Annotated[list[LegacyFunction], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    # Without effect.
    parallel_tool_calls: bool | None = None


class CompletionRequest(RequestBody):
    """The body of `POST /v1/completions`: raw text to continue, without a template."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: int | None = _ranged("top_logprobs")
    # Supported at the value that changes nothing.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class Reply(BaseModel):
    """What is sent; only for the published schema."""


class ErrorDetail(Reply):
    """What went wrong, and which field is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """A refusal or failure."""

    error: ErrorDetail


class UsageCounts(Reply):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyFrame(Reply):
    """What replies of both kinds share."""

    id: str
    created: int
    model: str
    usage: UsageCounts


class ChatCompletion(ReplyFrame):
    """A reply; `choices` has one, with `message`, `logprobs` and `finish_reason`."""

    object: Literal["chat.completion"]
    choices: list[dict[str, Any]]


class TextCompletion(ReplyFrame):
    """A continued text; `choices` has one, with `text`, `logprobs` and `finish_reason`."""

    object: Literal["text_completion"]
    choices: list[dict[str, Any]]


class ModelCard(Reply):
    """A model; `context_length` in tokens of prompt and reply together, 0 where it is not known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(Reply):
    """The loaded model, or all of a remote engine's."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Reply):
    """Whether replies can be had."""

    status: Literal["ok", "loading", "failed", "stopping"]
