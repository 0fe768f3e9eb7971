"""The settings of a reply as component values, and what a browser stores of a page.

Everything that comes from a client is checked here before it becomes a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qwen.errors import InvalidSetting, QwenError
from qwen.messages import Message, SamplingParams, checked_number
from webapp.conversation import Conversation, to_json

#: The settings of a reply, by component name, in the order in which handlers take them.
CONTROLS = (
    "system_prompt",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_new_tokens",
    "seed",
)
#: Characters of a conversation that are kept in a browser; its storage ends at about 5 MB.
STORED_CHARACTERS = 1_000_000
STORED_SYSTEM_CHARACTERS = 100_000

Controls = tuple[Any, ...]


def control_values(system_prompt: str, params: SamplingParams) -> Controls:
    """Return component values, in the order of `CONTROLS`, for these settings."""
    return (system_prompt, *(getattr(params, name) for name in CONTROLS[1:]))


def restored_controls(stored: object, defaults: Controls) -> Controls:
    """Read the settings that a browser stored; what is missing or wrong takes its default."""
    sound = _sound_settings(stored) if isinstance(stored, Mapping) else {}
    return tuple(sound.get(name, old) for name, old in zip(CONTROLS, defaults, strict=True))


def _sound_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that a request could be made with."""
    sound: dict[str, Any] = {}
    system_prompt = settings.get("system_prompt")
    if isinstance(system_prompt, str) and len(system_prompt) <= STORED_SYSTEM_CHARACTERS:
        sound["system_prompt"] = system_prompt
    for name in CONTROLS[1:]:
        with suppress(KeyError, QwenError):
            sound[name] = checked_number(name, settings[name])
    return sound


def system_messages(controls: Controls) -> tuple[Message, ...]:
    """Return the system prompt as a message, or nothing when it is empty.

    Raises:
        InvalidSetting: It is not text (sent straight to the endpoint).
    """
    if not isinstance(controls[0], str):
        raise InvalidSetting("The system prompt must be text.")
    return (Message("system", controls[0]),) if controls[0].strip() else ()


def sampling_params(controls: Controls) -> SamplingParams:
    """Read the sampling settings from component values.

    Raises:
        InvalidSetting: A value is missing, no number or outside its range.
    """
    return SamplingParams(**dict(zip(CONTROLS[1:], controls[1:], strict=True)))


def stored_form(conversation: Conversation, controls: Controls) -> dict[str, Any]:
    """Return what the browser keeps of a page; settings that are wrong are left out."""
    return {
        "conversation": to_json(conversation, max_characters=STORED_CHARACTERS),
        "controls": _sound_settings(dict(zip(CONTROLS, controls, strict=True))),
    }
