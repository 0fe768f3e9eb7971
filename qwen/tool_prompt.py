"""Tools as a request offers them: checked, and as the values that chat templates read.

Knows the rules of the OpenAI API for tools; renders no prompt and knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen.errors import InvalidConversation, InvalidRequest
from qwen.messages import ChatRequest, Message, Tool, ToolCall

#: A name is put into prompts as it is, so it is one word of letters, in any script.
_NAME = re.compile(r"[\w.-]{1,64}")

_CHOICES = ("auto", "none", "required")


def check_tools(request: ChatRequest) -> None:
    """Check the tools of a request and its choice among them.

    Raises:
        InvalidRequest: A definition or the choice is wrong; the message names the field.
    """
    names: set[str] = set()
    for index, tool in enumerate(request.tools):
        where = f"tools[{index}].function"
        if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{where}.name must be 1 to 64 letters, digits, dots, dashes or underscores."
            )
        if tool.name in names:
            raise InvalidRequest(f"{where}.name '{tool.name}' is there twice. Rename one of them.")
        names.add(tool.name)
        if not isinstance(tool.description, str):
            raise InvalidRequest(f"{where}.description must be a text.")
        _check_parameters(tool, f"{where}.parameters")
    _check_choice(request.tool_choice, names)


def _check_parameters(tool: Tool, where: str) -> None:
    parameters: Any = tool.parameters
    if isinstance(parameters, list | tuple):
        if not all(isinstance(p, Mapping) and isinstance(p.get("name"), str) for p in parameters):
            raise InvalidRequest(f"{where} is a list of which an entry has no name.")
    elif not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{where} must be an object: the JSON schema of the arguments.")
    try:
        json.dumps(parameters)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(f"{where} is not JSON. Send a JSON schema.") from None


def _check_choice(choice: str, names: set[str]) -> None:
    if choice in ("auto", "none"):
        return
    if not names:
        raise InvalidRequest(f"tool_choice is '{choice}', but the request has no tools. Send some.")
    if choice not in _CHOICES and choice not in names:
        raise InvalidRequest(
            f"tool_choice names the tool '{choice}', which is not one of the tools: "
            f"{', '.join(sorted(names))}."
        )


def offered_tools(request: ChatRequest) -> tuple[Tool, ...]:
    """Return the tools that the model is told of: none where it must not call."""
    return () if request.tool_choice == "none" else request.tools


def must_call(request: ChatRequest) -> bool:
    """Tell whether the reply has to be a call."""
    return bool(request.tools) and request.tool_choice not in ("auto", "none")


def wanted_name(request: ChatRequest) -> str | None:
    """Return the name of the tool that has to be called, if only one can be."""
    if not must_call(request):
        return None
    if request.tool_choice != "required":
        return request.tool_choice
    return request.tools[0].name if len(request.tools) == 1 else None


def build_tool_value(tool: Tool) -> dict[str, Any]:
    """Return a tool as the OpenAI API and chat templates have it.

    A list of parameters, the form of Qwen v1's plugins, becomes the JSON schema of an object.
    """
    parameters: Any = tool.parameters
    if not isinstance(parameters, Mapping):
        parameters = _schema_of_list(parameters)
    function = {"name": tool.name, "description": tool.description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def _schema_of_list(parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    properties = {}
    for parameter in parameters:
        schema = parameter.get("schema")
        value = dict(schema) if isinstance(schema, Mapping) else {"type": "string"}
        if parameter.get("description"):
            value["description"] = parameter["description"]
        properties[parameter["name"]] = value
    required = [p["name"] for p in parameters if p.get("required")]
    return {"type": "object", "properties": properties, "required": required}


def build_call_value(call: ToolCall) -> dict[str, Any]:
    """Return a call as chat templates have it: arguments as an object where they are one."""
    arguments: Any = call.arguments
    try:
        parsed = json.loads(call.arguments)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        arguments = parsed
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def pair_results(
    calls: Sequence[ToolCall], results: Sequence[Message]
) -> list[tuple[ToolCall, Message | None]]:
    """Find each call's result: by its id, else in the order they came.

    Raises:
        InvalidConversation: A result belongs to none of the calls.
    """
    left = list(results)
    pairs: list[tuple[ToolCall, Message | None]] = []
    for call in calls:
        by_id = (m for m in left if call.id and m.tool_call_id == call.id)
        in_order = (m for m in left if not call.id or not m.tool_call_id)
        result = next(by_id, None) or next(in_order, None)
        if result is not None:
            left.remove(result)
        pairs.append((call, result))
    if left:
        raise InvalidConversation(
            "A tool message is the result of no call before it. Send it after the assistant "
            "message with that call, with the call's id."
        )
    return pairs
