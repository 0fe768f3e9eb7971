"""From a reply's streamed text to text and tool calls: the form that Qwen2 and later write.

Pure: knows no tokenizer and no model. What a reader returns does not depend on where the text is
cut. Source of the form: the chat templates of Qwen2.5, `<tool_call>{"name": …, "arguments":
…}</tool_call>`. Small models leave the tags out, so a reply that begins with such an object, bare
or in a ```json fence, is read too if it names a tool that was offered.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from qwen.messages import StreamEvent, ToolCallDelta
from qwen.tool_json import JsonValue, parse_call, parse_json, read_call_header

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

#: What else models put around a call; read only where a reply begins or after a call.
_OTHER_FORMS = {"```json": "```", "<tools>": "</tools>"}


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
    events: Iterable[StreamEvent], reader: CallReader | None, *, heard: str = ""
) -> Iterator[StreamEvent]:
    """Read calls out of the text of a reply's events, and change nothing else in them.

    Args:
        events: Of a reply that is streamed.
        reader: None passes the events on as they are.
        heard: The beginning of the reply that the model was given and does not write itself.

    Yields:
        What `heard` has, if anything; each event, its text and calls told apart; at the end, if
        anything was held back, one more.
    """
    if reader is None:
        yield from events
        return
    first = reader.feed(heard)
    if first != ReplyPart():
        yield StreamEvent(text=first.text, tool_calls=first.calls)
    for event in events:
        part = reader.feed(event.text)
        yield replace(event, text=part.text, tool_calls=part.calls)
    last = reader.end()
    if last != ReplyPart():
        yield StreamEvent(text=last.text, tool_calls=last.calls)


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
        self._value = JsonValue()

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
        header = read_call_header(self._buffer if close < 0 else self._buffer[:close])
        if header.name and (tagged or header.name in self._names):
            self._out.call(header.name)
            self._buffer = self._buffer[header.end :]
            self._value = JsonValue()
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
        call = parse_call(self._buffer[:length]) if self._closer == CLOSE_TAG else None
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
            inner = parse_json(text)
            text = inner if isinstance(inner, str) else text
        self._out.arguments(text)

    def _give_text(self, length: int) -> None:
        if length:
            self._at_start = False
            self._out.text(self._buffer[:length])
            self._buffer = self._buffer[length:]
