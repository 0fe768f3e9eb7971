"""The JSON of a tool call while it is being written: its beginning, the end of its arguments.

Pure. `{"name": "f", "arguments": …}` is what chat templates of Qwen ask for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class JsonValue:
    """Finds the end of a JSON value in a text that grows at its end.

    Attributes:
        is_text: The value is a JSON string.
    """

    def __init__(self) -> None:
        self.is_text = False
        self._first = ""
        self._place = 0
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def has_begun(self) -> bool:
        """Whether anything but white space was seen."""
        return bool(self._first)

    def forget(self, length: int) -> None:
        """Say that so many characters were taken off the front of the text."""
        self._place -= length

    def find_end(self, text: str) -> int | None:
        """Return the place after the value; None while it goes on."""
        while self._place < len(text):
            character = text[self._place]
            if not self._first and not character.isspace():
                self._first = character
                self.is_text = character == '"'
            if self._first and self._first not in '{["' and character in ",}] \t\r\n":
                return self._place
            self._place += 1
            if self._ends_with(character):
                return self._place
        return None

    def _ends_with(self, character: str) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                return self._depth == 0 and self.is_text
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


@dataclass(frozen=True, slots=True)
class CallHeader:
    """The beginning of a call's object up to its arguments; `name` is "" unless it is whole."""

    name: str = ""
    end: int = 0
    is_partial: bool = False


def read_call_header(text: str) -> CallHeader:
    """Read a text that may be the beginning of a call, and may go on."""
    name = ""
    place = 0
    for wanted in (
        ("{",),
        ('"name"',),
        (":",),
        (),
        (",",),
        ('"arguments"', '"parameters"'),
        (":",),
    ):
        place = len(text) - len(text[place:].lstrip())
        rest = text[place:]
        if not wanted:  # the name itself
            found = _STRING.match(rest)
            if found is None:
                return CallHeader(is_partial=rest[:1] in ("", '"'))
            parsed = parse_json(found.group())
            if not isinstance(parsed, str) or not parsed:
                return CallHeader()
            name = parsed
            place += found.end()
            continue
        mark = next((mark for mark in wanted if rest.startswith(mark)), None)
        if mark is None:
            return CallHeader(is_partial=any(mark.startswith(rest) for mark in wanted))
        place += len(mark)
    return CallHeader(name=name, end=len(text) - len(text[place:].lstrip()))


def parse_call(body: str) -> tuple[str, str] | None:
    """Read a whole call's name and arguments, in any order; None if it is no call."""
    call = parse_json(body)
    if not isinstance(call, dict):
        return None
    name = call.get("name")
    if not isinstance(name, str) or not name:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return name, arguments


def parse_json(text: str) -> object:
    """Return the value of a JSON text; None of any other."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
