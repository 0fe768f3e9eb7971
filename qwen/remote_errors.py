"""A remote engine's faults → our errors, each with what to do next, and whether to try again.

Knows the exceptions of the `openai` client. What an engine says is shown to the user where it helps
and never logged: it may quote their text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import openai

from qwen.errors import (
    BackendNotReady,
    EngineBusy,
    EngineFailed,
    EngineRefused,
    EngineUnreachable,
    InvalidRequest,
    MessageTooLong,
    PromptTooLong,
    QwenError,
)

logger = logging.getLogger(__name__)

#: Seconds before the second, third and fourth attempt, unless the engine says how long.
RETRY_SECONDS = (0.5, 1.0, 2.0)
#: An engine that asks for a longer pause is not waited for.
_LONGEST_PAUSE = 20.0
_RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
#: As vLLM, SGLang, llama.cpp and what is built on it, TGI and OpenAI say it. The word "context"
#: alone is not enough: a GPU has one too.
_TOO_LONG = re.compile(
    r"context[ _-]*(size|length|window|limit|overflow|full)|n_ctx|max_model_len|max_total_tokens"
    r"|too long|too large to process|too many tokens|maximum.{0,20}tokens",
    re.IGNORECASE,
)
_QUOTED_CHARACTERS = 300


def to_qwen_error(error: Exception) -> QwenError:
    """Return the error to raise for one of the client's."""
    if isinstance(error, QwenError):
        return error
    if isinstance(error, openai.APIStatusError):
        return _status_error(error.status_code, error.body, error)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return unreachable()
    if isinstance(error, openai.APIConnectionError):
        return unreachable()
    if isinstance(error, json.JSONDecodeError | openai.APIResponseValidationError):
        return EngineFailed(
            "The engine answers with something that is no JSON. Check that --base-url is the "
            "address of its API; a proxy in between may answer in its place."
        )
    if type(error) is openai.APIError:  # an error in the middle of a stream
        code = error.body.get("code") if isinstance(error.body, Mapping) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return _status_error(status, error.body, error)
    if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
        logger.error("An unexpected fault beside the remote engine", exc_info=error)
    return EngineFailed(
        "The engine broke off in the middle of the reply. It may have been stopped: ask again; if "
        "that does not help, look at its log."
    )


def unreachable() -> EngineUnreachable:
    """Return the error for an engine that cannot be reached."""
    return EngineUnreachable(
        "The engine does not answer. It may be starting, overloaded or switched off; your message "
        "is kept: send it again in a moment. If that does not help, check that the engine runs and "
        "that --base-url is its address."
    )


def no_engine() -> EngineUnreachable:
    """Return the error for an engine that does not answer at start."""
    return EngineUnreachable(
        "The engine at --base-url does not answer. Start it or correct the address, then try again."
    )


def silent(seconds: float) -> EngineUnreachable:
    """Return the error for an engine that has stopped talking."""
    return EngineUnreachable(
        f"The engine has said nothing for {seconds:g} seconds and was given up. It may be "
        "overloaded: try again in a moment, or look at its log."
    )


def incomplete(*, said: bool) -> EngineFailed:
    """Return the error for a stream that ended without saying why."""
    return EngineFailed(
        "The engine ended the reply before it was complete. It may have been stopped: ask again; "
        "if that does not help, look at its log."
        if said
        else "The engine answered nothing that is a reply of the OpenAI API. Check that --base-url "
        "is the address of its API, which mostly ends in /v1."
    )


def context_full() -> EngineFailed:
    """Return the error for a context that was full before the reply ended."""
    return EngineFailed(
        "The engine's context is full, so the reply ends here. Begin a new conversation or shorten "
        "the messages; several users may share one context there."
    )


def retry_pause(error: Exception, problem: QwenError, attempt: int) -> float | None:
    """Return the seconds to wait before another attempt; None when there is none.

    Args:
        error: What ended an attempt of which nothing had been streamed.
        problem: What it means here.
        attempt: Its number, from 1.
    """
    # Some engines answer 500 to a prompt that is too long; it would be so again.
    if attempt > len(RETRY_SECONDS) or isinstance(problem, InvalidRequest | EngineRefused):
        return None
    pause = RETRY_SECONDS[attempt - 1]
    if isinstance(error, openai.APIStatusError):
        if error.status_code not in _RETRIED_STATUSES:
            return None
        asked = _retry_after(error.response.headers)
        return pause if asked is None else asked if asked <= _LONGEST_PAUSE else None
    # A timeout is not tried again: the engine may still be at work on the first attempt.
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return None
    if isinstance(error, QwenError):
        return pause if type(error) is EngineFailed else None
    return pause


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(seconds, 0.0) if seconds == seconds else None


def _status_error(status: int, body: object, error: Exception) -> QwenError:
    details: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    inner = details.get("error")
    details = inner if isinstance(inner, Mapping) else details
    said = " ".join(str(details.get("message") or inner or "").split())[:_QUOTED_CHARACTERS]
    if status in (401, 403):
        return EngineRefused(
            f"The engine refuses us (HTTP {status}): it wants another key. Put the right one into "
            "an environment variable, name that with --api-key-env, and start again."
        )
    if status == 413:
        return MessageTooLong("The engine refuses the message for its size. Send it in parts.")
    code = f"{details.get('code')} {details.get('type')}"
    if status in (400, 422, 500) and _TOO_LONG.search(f"{said} {code}"):
        return _too_long(details)
    if status == 404:
        return EngineRefused(
            f"The engine does not know the address or the model (HTTP 404). {said} Check "
            "--base-url, which mostly ends in /v1, and --model."
        )
    if status == 429:
        return EngineBusy("The engine has too many requests at the moment. Try again in a minute.")
    if status == 503 and "load" in said.lower():
        return BackendNotReady("The engine is still loading its model. Try again in a moment.")
    if status >= 500:
        return EngineFailed(
            f"The engine failed (HTTP {status}). Your message is kept: try again; if that does not "
            "help, look at the engine's log."
        )
    reason = f": {said}" if said else ""
    return InvalidRequest(
        f"The engine refuses the request (HTTP {status}){reason}. Change the message or the "
        "settings."
    )


def _too_long(details: Mapping[str, Any]) -> PromptTooLong:
    limit, count = details.get("n_ctx"), details.get("n_prompt_tokens")
    numbers = ""
    if isinstance(limit, int) and isinstance(count, int):
        numbers = f": it has {count:,} tokens of {limit:,}"
    return PromptTooLong(
        f"The prompt is too long for the engine's context{numbers}. Shorten the message or the "
        "system prompt, or begin a new conversation."
    )
