"""Text for a terminal: what may reach it, and where a growing Markdown text can be cut.

Pure functions and values; knows no terminal library.
"""

from __future__ import annotations

import re

#: Characters that command a terminal or reorder what it shows, and halves of surrogate pairs.
#: \t and \n stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})(.*)")


def safe_text(text: str) -> str:
    r"""Return a text with every terminal command made visible (␛) or replaced; a \r is left out."""
    return _UNSAFE.sub(_visible, text)


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x0D:
        return ""
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


class MarkdownBlocks:
    """Cuts growing Markdown into blocks that nothing to come can change.

    A block ends at an empty line before a line that is not indented, outside of fenced code. Work
    and memory per piece are bounded by the piece and the open block.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []  # whole lines of the open block
        self._line = ""  # the last line, not ended yet
        self._fence = ""  # the marker of the code block that is open
        self._after_blank = False

    def feed(self, text: str) -> list[str]:
        """Take more text; return the blocks that it completes."""
        *whole, rest = text.split("\n")
        done: list[str] = []
        for line in whole:
            done += self._end_line(self._line + line)
            self._line = ""
        self._line += rest
        return done

    def finish(self) -> str:
        """Return the open block; nothing may be fed afterwards."""
        return "\n".join([*self._lines, self._line]).strip("\n")

    def tail(self, *, lines: int, characters: int) -> str:
        """Return the end of the open block, with its opening fence where code is cut."""
        kept = [*self._lines[-lines:], self._line]
        if self._fence and len(self._lines) > lines:
            kept.insert(0, self._fence)
        text = "\n".join(kept)
        return text[-characters:] if len(text) > characters else text

    def _end_line(self, line: str) -> list[str]:
        done = []
        indented = line.startswith((" ", "\t"))
        if self._after_blank and line.strip() and not indented and not self._fence:
            block = "\n".join(self._lines).strip("\n")
            if block:
                done.append(block)
            self._lines = []
        self._lines.append(line)
        self._after_blank = not line.strip()
        self._note_fence(line)
        return done

    def _note_fence(self, line: str) -> None:
        found = _FENCE.match(line)
        if found is None:
            return
        if not self._fence:
            if "`" not in found[2] or found[1].startswith("~"):
                self._fence = found[1]
        elif found[1].startswith(self._fence) and not found[2].strip():
            self._fence = ""
