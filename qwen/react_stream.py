"""From a ReAct reply's streamed text to text and a tool call.

Pure: knows no tokenizer and no model. What the reader returns does not depend on where the text is
cut. Source of the form: the published prompt of Qwen v1 (`qwen.react`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qwen.tool_stream import CallWriter, ReplyPart, new_call_id, possible_start

#: Where a reply begins: a new one; behind "Thought:"; behind "Final Answer:"; within the answer.
Beginning = Literal["reply", "thought", "answer", "plain"]

_THOUGHT = "Thought:"
_ACTION = "Action:"
_INPUT = "Action Input:"
_ANSWER = "\nFinal Answer:"
_OBSERVATION = "\nObservation:"


class ReactReader:
    """Reads a reply of Thought, Action and Action Input, or of Thought and Final Answer.

    A thought is held back until it is known what it leads to: before a call it is the text, before
    an answer it is left out, and if neither comes the reply is text as it stands. Answers, and
    replies that do not begin with a thought, are given out at once. A line break that may begin
    an action is held back. There is one call at most: the model has to see its result.

    Args:
        begins: Where the reply begins.
        reads_calls: False takes every action for text.
        new_id: Makes the id of a call.
    """

    def __init__(
        self,
        begins: Beginning = "reply",
        *,
        reads_calls: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._out = CallWriter(new_id)
        self._reads_calls = reads_calls
        self._buffer = ""
        self._has_arguments = False
        states: dict[Beginning, Callable[[], bool]] = {
            "reply": self._read_opening,
            "thought": self._read_thought,
            "answer": self._read_answer_start,
            "plain": self._read_plain,
        }
        self._read = states[begins]

    def feed(self, text: str) -> ReplyPart:
        """See `CallReader.feed`."""
        self._buffer += text
        while self._read():
            pass
        return self._out.take()

    def end(self) -> ReplyPart:
        """See `CallReader.end`."""
        rest, self._buffer = self._buffer, ""
        if self._read == self._read_arguments:
            self._give_arguments(rest)
        elif self._read != self._read_nothing:
            self._out.text(rest)
        return self._out.take()

    # Each `_read_…` takes from the buffer what it can, and tells whether to look again.

    def _read_opening(self) -> bool:
        begun = self._buffer.lstrip()
        if any(mark.startswith(begun) for mark in (_THOUGHT, _ACTION)):
            return False
        is_thought = begun.startswith((_THOUGHT, _ACTION))
        self._read = self._read_thought if is_thought else self._read_plain
        return True

    def _read_thought(self) -> bool:
        answer = self._buffer.find(_ANSWER)
        place = self._find_action(0)
        while place >= 0 and not 0 <= answer < place:
            action = _read_action(self._buffer, place)
            if action is None:
                return False
            name, end = action
            if name:
                before, mark, thought = self._buffer[:place].partition(_THOUGHT)
                self._out.text((thought if mark else before).strip())
                self._begin_call(name, end)
                return True
            place = self._find_action(place + 1)
        if answer < 0:
            return False
        self._buffer = self._buffer[answer + len(_ANSWER) :]
        self._read = self._read_answer_start
        return True

    def _find_action(self, start: int) -> int:
        """Return where an action may begin, its line break included; -1 is nowhere."""
        if not self._reads_calls:
            return -1
        begun = self._buffer.lstrip()
        if start == 0 and begun.startswith(_ACTION):
            return len(self._buffer) - len(begun)
        return self._buffer.find("\n" + _ACTION, start)

    def _read_answer_start(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._read = self._read_plain
        return True

    def _read_plain(self) -> bool:
        mark = "\n" + _ACTION
        place = self._buffer.find(mark) if self._reads_calls else -1
        if place < 0:
            held = possible_start(self._buffer, mark) if self._reads_calls else 0
            self._give_text(len(self._buffer[: len(self._buffer) - held].rstrip()))
            return False
        action = _read_action(self._buffer, place)
        if action is None:
            self._give_text(len(self._buffer[:place].rstrip()))
            return False
        name, end = action
        if not name:
            self._give_text(place + len(mark))
            return True
        text = len(self._buffer[:place].rstrip())
        self._give_text(text)
        self._begin_call(name, end - text)
        return True

    def _begin_call(self, name: str, end: int) -> None:
        self._out.call(name)
        self._buffer = self._buffer[end:]
        self._read = self._read_arguments

    def _read_arguments(self) -> bool:
        end = self._buffer.find(_OBSERVATION)
        if end >= 0:
            self._give_arguments(self._buffer[:end])
            self._buffer = ""
            self._read = self._read_nothing
            return False
        held = possible_start(self._buffer, _OBSERVATION)
        certain = self._buffer[: len(self._buffer) - held].rstrip()
        self._give_arguments(certain)
        self._buffer = self._buffer[len(certain) :]
        return False

    def _give_arguments(self, text: str) -> None:
        text = text.rstrip() if self._has_arguments else text.strip()
        self._has_arguments = self._has_arguments or bool(text)
        self._out.arguments(text)

    def _read_nothing(self) -> bool:
        self._buffer = ""
        return False

    def _give_text(self, length: int) -> None:
        self._out.text(self._buffer[:length])
        self._buffer = self._buffer[length:]


def _read_action(text: str, place: int) -> tuple[str, int] | None:
    """Read an action's name and where its input begins.

    Returns:
        The name, "" if it is no action after all, and the place; None while more has to be read.
    """
    start = text.index(_ACTION, place) + len(_ACTION)
    line = text[start:].lstrip()
    name, line_break, after = line.partition("\n")
    if len(name.split()) > 1:
        return "", place  # a sentence, not a tool's name
    if not line_break:
        return None
    after = after.lstrip()
    if after.startswith(_INPUT):
        return name.strip(), len(text) - len(after) + len(_INPUT)
    return None if _INPUT.startswith(after) else ("", place)
