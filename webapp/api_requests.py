"""From OpenAI's request bodies to `ChatRequest`: what is left out is the checkpoint's own setting.

Pure; what a schema cannot say (fields that contradict each other) is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen.backend import BackendInfo, ListedModel
from qwen.messages import ChatRequest, Message, SamplingParams, Tool, ToolCall
from webapp.api_errors import ApiError
from webapp.api_schemas import (
    MODEL_ALIAS,
    AssistantMessage,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    Content,
    FunctionMessage,
    FunctionSpec,
    LegacyFunction,
    NamedFunction,
    NamedTool,
    RequestBody,
    ToolMessage,
)

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def find_model(name: str, info: BackendInfo) -> ListedModel:
    """Return the model that is asked for: the one that answers, also as "Qwen", or another.

    Raises:
        ApiError: 404, there is none of this name.
    """
    loaded = info.models[0]
    for model in info.models:
        if name == model.name:
            return model
    if name == MODEL_ALIAS:
        return loaded
    raise ApiError(
        f"This server does not have the model that was asked for. Use {loaded.name!r} or "
        f"{MODEL_ALIAS!r}; GET /v1/models has the list.",
        status=404,
        param="model",
        code="model_not_found",
    )


def build_chat_request(
    body: ChatCompletionRequest, defaults: SamplingParams, *, model: str = ""
) -> ChatRequest:
    """Build what a backend is asked for.

    Args:
        body: The request.
        defaults: Sampling settings where the request has none.
        model: As `ChatRequest.model`.

    Raises:
        ApiError: Fields that contradict each other.
        InvalidSetting: A value that a client may not set.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    tools, choice = _tools(body)
    messages, prefix = _messages(body.messages), ""
    if messages[-1].role == "assistant" and not messages[-1].tool_calls:
        # As the reference does: the model goes on with the reply that was begun.
        messages, prefix = messages[:-1], messages[-1].content
    return ChatRequest(
        messages=messages,
        reply_prefix=prefix,
        tools=tools,
        tool_choice=choice,
        params=replace(
            _params(body, defaults, max_tokens=_max_tokens(body)),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        model=model,
    )


def build_completion_request(
    body: CompletionRequest, defaults: SamplingParams, *, model: str = ""
) -> ChatRequest:
    """Build what a backend is asked for: text to continue. Raises as `build_chat_request`."""
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    params = _params(body, defaults, max_tokens=body.max_tokens)
    params = replace(params, top_logprobs=body.logprobs)
    return ChatRequest(raw_prompt=prompt, params=params, model=model)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            "max_tokens and max_completion_tokens mean the same. Leave one out.", param="max_tokens"
        )
    return body.max_tokens if body.max_tokens is not None else body.max_completion_tokens


def _params(
    body: RequestBody, defaults: SamplingParams, *, max_tokens: int | None
) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options needs stream to be true.", param="stream_options")
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "max_new_tokens": max_tokens,
        "top_p": body.top_p,
        "top_k": body.top_k,
    }
    if body.top_k == -1:  # how other servers write "no limit"
        given["top_k"] = 0
    if body.top_p == 0:  # only the likeliest token remains
        given |= {"top_p": 1.0, "top_k": 1}
    elif body.top_p is not None:
        given["top_p"] = max(body.top_p, 0.01)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    values = {name: value for name, value in given.items() if value is not None}
    return replace(defaults, **values, stop=stop or defaults.stop)


def _tools(body: ChatCompletionRequest) -> tuple[tuple[Tool, ...], str]:
    """Return the tools and the choice among them, whichever form they were sent in."""
    if body.tools and body.functions:
        raise ApiError("functions is the older form of tools. Leave one out.", param="functions")
    tools = tuple(_tool(tool.function) for tool in body.tools or ())
    tools += tuple(_legacy_tool(function) for function in body.functions or ())
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        field = "tools" if body.tools else "functions"
        raise ApiError("Two functions have the same name. Rename one.", param=field)
    for field, choice in (("tool_choice", body.tool_choice), ("function_call", body.function_call)):
        if choice is not None:
            return tools, _choice(field, choice, names)
    return tools, "auto"


def _choice(field: str, choice: str | NamedTool | NamedFunction, names: Sequence[str]) -> str:
    if isinstance(choice, str):
        if choice == "required" and not names:
            raise ApiError("A call is required, but there are no tools. Add tools.", param=field)
        return choice
    name = choice.function.name if isinstance(choice, NamedTool) else choice.name
    if name not in names:
        raise ApiError("The function to call is not among those sent. Add it.", param=field)
    return name


def _tool(spec: FunctionSpec) -> Tool:
    parameters = _NO_PARAMETERS if spec.parameters is None else spec.parameters
    return Tool(spec.name, spec.description or "", parameters)


def _legacy_tool(spec: LegacyFunction) -> Tool:
    parameters: Any = spec.parameters
    if parameters is None:
        parameters = _NO_PARAMETERS
    elif isinstance(parameters, list):
        parameters = [one.model_dump(by_alias=True) for one in parameters]
    name = spec.name or spec.name_for_model or ""
    description = spec.description or spec.description_for_model or ""
    return Tool(name, description, parameters, human_name=spec.name_for_human or "")


def _messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    read: list[Message] = []
    for place, message in enumerate(messages):
        read.append(_message(message, place, read))
    return tuple(read)


def _message(message: ChatMessage, place: int, earlier: Sequence[Message]) -> Message:
    text = _text(message.content)
    if isinstance(message, AssistantMessage):
        return Message("assistant", text, tool_calls=_calls(message, place))
    if isinstance(message, ToolMessage):
        return Message("tool", text, tool_call_id=message.tool_call_id)
    if isinstance(message, FunctionMessage):
        return Message("tool", text, tool_call_id=_call_id(message.name, place, earlier))
    return Message("user" if message.role == "user" else "system", text)


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _calls(message: AssistantMessage, place: int) -> tuple[ToolCall, ...]:
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    if message.function_call is None:
        return calls
    if calls:
        raise ApiError(
            "A message has tool_calls or function_call, not both. Leave one out.",
            param=f"messages[{place}].function_call",
        )
    # The older form has no ids; one made of the place is the same in every later request.
    call = message.function_call
    return (ToolCall(f"call_{place}", call.name, call.arguments),)


def _call_id(name: str, place: int, earlier: Sequence[Message]) -> str:
    """Return the id of the call that a message of role "function" is the result of."""
    last = earlier[-1] if earlier else None
    for call in last.tool_calls if last is not None else ():
        if call.name == name:
            return call.id
    raise ApiError(
        "A function's result must follow the assistant's message that calls this function.",
        param=f"messages[{place}].name",
    )
