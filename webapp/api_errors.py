"""Errors as OpenAI's clients expect them: a status code and a JSON body with type, param and code.

Pure; knows no web framework. A message may name a field that the client sent, never its value.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen.errors import (
    BackendNotReady,
    CheckpointError,
    EngineBusy,
    EngineFailed,
    InvalidRequest,
    MessageTooLong,
    OutOfMemory,
    PromptTooLong,
    QwenError,
)

logger = logging.getLogger(__name__)

#: Seconds after which asking a loading or stopping server again makes sense.
NOT_READY_SECONDS = 5
#: A field's name comes from the client: no more of it than this is said back.
MAX_NAME_CHARACTERS = 100
_SEE = "docs/api.md lists what is supported."
_HINTS = {
    "response_format.type": "Replies are not constrained to JSON. Ask for JSON in a message "
    "instead, or leave response_format out.",
    "n": "One reply at a time: send the request again for another.",
    "best_of": "One reply at a time: send the request again for another.",
    "presence_penalty": "Only 0 is supported; repetition_penalty has a similar effect.",
    "frequency_penalty": "Only 0 is supported; repetition_penalty has a similar effect.",
    "logit_bias": "It is not supported; leave it out.",
}


class ApiError(Exception):
    """A refusal of the API itself, with all that its answer says."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if param and param not in message:
            message = f"Invalid value for '{param}': {message}"
        super().__init__(message)
        self.answer = ErrorAnswer(status, message, kind, param, code, dict(headers or {}))


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """Status, body and headers of a refusal or failure."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def describe_error(error: BaseException) -> ErrorAnswer:
    """Return the answer to an error of any kind; unexpected ones are logged."""
    if isinstance(error, ApiError):
        return error.answer
    if not isinstance(error, QwenError):
        logger.error("A request failed", exc_info=error)
        return ErrorAnswer(
            500,
            "The request failed because of an unexpected fault; the server's log has the details. "
            "Try again.",
            "server_error",
            code="internal_error",
        )
    return _describe_ours(error)


def _describe_ours(error: QwenError) -> ErrorAnswer:
    message = str(error)
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return too_many(message, seconds=float(retry_after))
    if isinstance(error, PromptTooLong | MessageTooLong):
        code = "context_length_exceeded"
        return ErrorAnswer(400, message, "invalid_request_error", code=code)
    if isinstance(error, InvalidRequest):
        return ErrorAnswer(400, message, "invalid_request_error")
    if isinstance(error, BackendNotReady):
        headers = {"Retry-After": str(NOT_READY_SECONDS)}
        return ErrorAnswer(503, message, "server_error", code="not_ready", headers=headers)
    if isinstance(error, EngineBusy):
        return too_many(message, seconds=NOT_READY_SECONDS)
    if isinstance(error, EngineFailed):
        return ErrorAnswer(502, message, "server_error", code="engine_failed")
    # What follows does not mend itself: clients should not try again on their own.
    headers = {"X-Should-Retry": "false"}
    if isinstance(error, OutOfMemory):
        return ErrorAnswer(503, message, "server_error", code="out_of_memory", headers=headers)
    if isinstance(error, CheckpointError):
        return ErrorAnswer(503, message, "server_error", code="model_failed", headers=headers)
    return ErrorAnswer(500, message, "server_error", code="internal_error")


def too_many(message: str, *, seconds: float) -> ErrorAnswer:
    """Return the answer to one request too many; `seconds` until another try makes sense."""
    headers = {"Retry-After": str(max(math.ceil(seconds), 1))}
    return ErrorAnswer(429, message, "rate_limit_error", None, "rate_limit_exceeded", headers)


def describe_http_error(status: int, detail: str) -> ErrorAnswer:
    """Return the answer to what the web framework refuses: unknown paths, wrong methods."""
    if status == 404:
        message = f"There is nothing at this path. {_SEE}"
        return ErrorAnswer(404, message, "invalid_request_error", code="not_found")
    if status == 405:
        message = f"This path does not take this method. {_SEE}"
        return ErrorAnswer(405, message, "invalid_request_error", code="method_not_allowed")
    if status == 400:  # JSON that is sound, but no program here reads it
        message = "The body is nested too deeply or has a number too long. Send plainer JSON."
        return ErrorAnswer(400, message, "invalid_request_error")
    return ErrorAnswer(status, detail, "invalid_request_error")


def describe_invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ErrorAnswer:
    """Return the answer to a body that is not as the schema wants it.

    Args:
        errors: As pydantic lists them, each with `type`, `loc` and `msg`.
        body: What was sent, to tell fields in `loc` from branches of the schema.
    """
    # Of a union all branches complain; the one that got furthest knows best.
    error = max(errors, key=lambda error: len(error["loc"]))
    kind, message = str(error["type"]), str(error["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        text = "The body is not valid JSON. Send one JSON object."
        return ErrorAnswer(400, text, "invalid_request_error")
    param = _param(error, body)
    if kind in ("union_tag_invalid", "union_tag_not_found"):  # a message of no known role
        param = f"{param}.{error['ctx']['discriminator'].strip(chr(39))}"
        message = f"Input should be one of {error['ctx'].get('expected_tags')}"
        kind = "missing" if kind == "union_tag_not_found" else kind
    if kind == "extra_forbidden":
        text = f"Unrecognized request argument supplied: {param}. Leave it out; {_SEE}"
    elif kind == "missing" and param:
        text = f"Missing required parameter: '{param}'. Add it."
    elif not param:
        text = "The body must be a JSON object, sent with Content-Type: application/json."
    else:
        text = f"Invalid value for '{param}': {message}. {_HINTS.get(param, _SEE)}"
    return ErrorAnswer(400, text, "invalid_request_error", param or None)


def _param(error: Mapping[str, Any], body: Any) -> str:
    """Return the path of a field as OpenAI writes it: `messages[0].content`."""
    path, value, parts = "", body, error["loc"][1:]
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (
            part in value or (is_last and error["type"] == "missing")
        ):
            name = str(part)[:MAX_NAME_CHARACTERS]
            path, value = f"{path}.{name}" if path else name, value.get(part)
    return path
