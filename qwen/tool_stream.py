"""From a reply's streamed text to text and tool calls: the form that Qwen2 and later write.

Pure: knows no tokenizer and no model. What a reader returns does not depend on where the text is
cut. Source of the form: the chat templates of Qwen2.5, `<tool_call>{"name": …, "arguments":
…}</tool_call>`. Small models leave the tags out, so a reply that begins with such an object, bare
or in a ```json fence, is read too if it names a tool that was offered.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from qwen.messages import ToolCallDelta

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

#: What else models put around a call; read only where a reply begins or after a call.
_OTHER_FORMS = {"```json": "```", "<tools>": "</tools>"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """A piece of a reply: new text to show and new parts of calls."""

    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class CallReader(Protocol):
    """Tells text and calls apart. Has state: one reader for one reply."""

    def feed(self, text: str) -> ReplyPart:
        """Take the next piece of the reply; hold back what may become a call."""
        ...

    def end(self) -> ReplyPart:
        """Return what was held back, as the call or the text that it turned out to be."""
        ...


def new_call_id() -> str:
    """Return an unguessable id of a call."""
    return f"call_{secrets.token_hex(12)}"


def read_calls(
    texts: Iterable[str], reader: CallReader | None, *, heard: str = ""
) -> Iterator[ReplyPart]:
    """Read calls out of a streamed reply.

    Args:
        texts: Consecutive pieces of the reply.
        reader: None passes the text on as it is.
        heard: The beginning of the reply that the model was given and does not write itself.

    Yields:
        What `heard` has, if anything; one part (maybe empty) for each piece; at the end, if
        anything was held back, one more.
    """
    if reader is None:
        for text in texts:
            yield ReplyPart(text)
        return
    first = reader.feed(heard)
    if first != ReplyPart():
        yield first
    for text in texts:
        yield reader.feed(text)
    last = reader.end()
    if last != ReplyPart():
        yield last


class CallWriter:
    """Collects a reader's output: texts, and calls that get an index and an id.

    Args:
        new_id: Makes the id of a call.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._texts: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self.num_calls = 0

    def text(self, text: str) -> None:
        """Add text to show."""
        self._texts.append(text)

    def call(self, name: str) -> None:
        """Begin the next call."""
        self._deltas.append(ToolCallDelta(index=self.num_calls, id=self._new_id(), name=name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if text:
            self._deltas.append(ToolCallDelta(index=self.num_calls - 1, arguments=text))

    def take(self) -> ReplyPart:
        """Return what was collected since the last time."""
        part = ReplyPart("".join(self._texts), tuple(self._deltas))
        self._texts, self._deltas = [], []
        return part


def possible_start(text: str, mark: str) -> int:
    """Return the length in characters of the longest end of `text` that begins `mark`."""
    longest = min(len(mark) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


class TaggedCallReader:
    """Reads `<tool_call>` calls.

    Text before a call is given out at once, less a beginning of a tag and the white space before
    it. A call's arguments are given out as they come, right JSON or not; the closing tag ends
    them wherever it stands. A tag around no call, and one that is never closed, are text.

    Args:
        names: The tools that were offered.
        new_id: Makes the id of a call.
    """

    def __init__(self, names: Collection[str], *, new_id: Callable[[], str] = new_call_id) -> None:
        self._names = frozenset(names)
        self._out = CallWriter(new_id)
        self._read: Callable[[], bool] = self._read_text
        self._buffer = ""
        self._at_start = True
        self._opener = self._closer = ""
        self._value = _JsonValue()

    def feed(self, text: str) -> ReplyPart:
        """See `CallReader.feed`."""
        self._buffer += text
        self._advance()
        return self._out.take()

    def end(self) -> ReplyPart:
        """See `CallReader.end`."""
        while self._read == self._read_header:  # a refused one may have another one in it
            self._finish_whole_call(len(self._buffer), closer="")
            self._advance()
        rest, self._buffer = self._buffer, ""
        if self._read == self._read_arguments:
            self._give_arguments(rest.rstrip())
        elif self._read == self._read_text and (rest.strip() or not self._out.num_calls):
            self._out.text(rest)
        return self._out.take()

    def _advance(self) -> None:
        while self._read():
            pass

    # Each `_read_…` takes from the buffer what it can, and tells whether to look again.

    def _read_text(self) -> bool:
        if self._at_start:
            decided = self._read_untagged_opening()
            if decided is not None:
                return decided
        start = self._buffer.find(OPEN_TAG)
        if start >= 0:
            before = len(self._buffer[:start].rstrip())
            self._give_text(before)
            self._open(self._buffer[: start - before + len(OPEN_TAG)], closer=CLOSE_TAG)
            return True
        certain = self._buffer[: len(self._buffer) - possible_start(self._buffer, OPEN_TAG)]
        self._give_text(len(certain.rstrip()))
        return False

    def _read_untagged_opening(self) -> bool | None:
        """Look for a call without its tags; None when there is none here."""
        begun = self._buffer.lstrip()
        if not begun:
            return False
        if begun[0] == "{":
            self._open(self._buffer[: -len(begun)], closer="")
            return True
        for opener, closer in _OTHER_FORMS.items():
            inner = begun.removeprefix(opener).lstrip()
            if opener.startswith(begun) or (begun.startswith(opener) and not inner):
                return False
            if begun.startswith(opener) and inner[0] == "{":
                self._open(self._buffer[: -len(inner)], closer=closer)
                return True
        return None

    def _open(self, opener: str, *, closer: str) -> None:
        self._buffer = self._buffer[len(opener) :]
        self._opener, self._closer = opener, closer
        self._read = self._read_header

    def _read_header(self) -> bool:
        tagged = self._closer == CLOSE_TAG
        close = self._buffer.find(CLOSE_TAG) if tagged else -1
        header = _read_call_header(self._buffer if close < 0 else self._buffer[:close])
        if header.name and (tagged or header.name in self._names):
            self._out.call(header.name)
            self._buffer = self._buffer[header.end :]
            self._value = _JsonValue()
            self._read = self._read_arguments
            return True
        if close >= 0:
            self._finish_whole_call(close, closer=CLOSE_TAG)
            return True
        if tagged or header.is_partial:
            return False
        self._refuse()
        return True

    def _finish_whole_call(self, length: int, *, closer: str) -> None:
        """Read a body that did not begin as usual: a call, or else text."""
        call = _parse_call(self._buffer[:length]) if self._closer == CLOSE_TAG else None
        if call is None:
            self._refuse()
            return
        self._buffer = self._buffer[length + len(closer) :]
        self._out.call(call[0])
        self._out.arguments(call[1])
        self._close()

    def _refuse(self) -> None:
        """Go back to text: the opening was none."""
        self._buffer = self._opener + self._buffer
        self._give_text(len(self._opener))
        self._at_start = False
        self._read = self._read_text

    def _read_arguments(self) -> bool:
        if not self._value.has_begun:
            self._buffer = self._buffer.lstrip()
        close, limit = -1, len(self._buffer)
        if self._closer.startswith("<"):
            close = self._buffer.find(self._closer)
            limit = close if close >= 0 else limit - possible_start(self._buffer, self._closer)
        end = self._value.find_end(self._buffer[:limit])
        if end is not None:
            self._give_arguments(self._buffer[:end])
            self._buffer = self._buffer[end:]
            self._read = self._read_tail
            return True
        if close >= 0:
            self._give_arguments(self._buffer[:close].rstrip())
            self._buffer = self._buffer[close + len(self._closer) :]
            self._close()
            return True
        if not self._value.is_text:
            certain = self._buffer[:limit].rstrip()
            self._out.arguments(certain)
            self._buffer = self._buffer[len(certain) :]
            self._value.forget(len(certain))
        return False

    def _read_tail(self) -> bool:
        """Pass over what closes a call after its arguments."""
        self._buffer = self._buffer.lstrip("} \t\r\n")
        if not self._buffer:
            return False
        if self._closer:
            if self._closer.startswith(self._buffer[: len(self._closer)]):
                if len(self._buffer) < len(self._closer):
                    return False
                self._buffer = self._buffer[len(self._closer) :]
            elif self._buffer[0] == ",":  # members that nobody asked for
                close = self._buffer.find(self._closer)
                if close < 0:
                    return False
                self._buffer = self._buffer[close + len(self._closer) :]
        self._close()
        return True

    def _close(self) -> None:
        self._at_start = True
        self._read = self._read_text

    def _give_arguments(self, text: str) -> None:
        """Give out the last part; arguments that are JSON within a string are taken out of it."""
        if self._value.is_text:
            inner = _parse_json(text)
            text = inner if isinstance(inner, str) else text
        self._out.arguments(text)

    def _give_text(self, length: int) -> None:
        if length:
            self._at_start = False
            self._out.text(self._buffer[:length])
            self._buffer = self._buffer[length:]


class _JsonValue:
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
class _Header:
    """The beginning of a call's object up to its arguments; `name` is "" unless it is whole."""

    name: str = ""
    end: int = 0
    is_partial: bool = False


def _read_call_header(text: str) -> _Header:
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
                return _Header(is_partial=rest[:1] in ("", '"'))
            parsed = _parse_json(found.group())
            if not isinstance(parsed, str) or not parsed:
                return _Header()
            name = parsed
            place += found.end()
            continue
        mark = next((mark for mark in wanted if rest.startswith(mark)), None)
        if mark is None:
            return _Header(is_partial=any(mark.startswith(rest) for mark in wanted))
        place += len(mark)
    return _Header(name=name, end=len(text) - len(text[place:].lstrip()))


def _parse_call(body: str) -> tuple[str, str] | None:
    """Read a whole call's name and arguments, in any order; None if it is no call."""
    call = _parse_json(body)
    if not isinstance(call, dict):
        return None
    name = call.get("name")
    if not isinstance(name, str) or not name:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return name, arguments


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
