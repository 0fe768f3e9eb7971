r"""A reply told apart: code blocks, code spans and formulas against the Markdown around them.

Reads a reply as marked 12 does, as far as it must, and says where it cannot be sure. Lines end
with "\n", "\r\n" or "\r", as in marked. Knows nothing of marks, HTML or Gradio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_PARAGRAPH_END = re.compile(r"(?:\r\n|\r(?!\n)|\n)[ \t>]*(?=[\r\n])|\Z")
# Everything that may stand before a fence on its line: indentation, quote marks, list markers.
_FENCE_OPENING = re.compile(
    r"((?:[ \t]|>|[-*+](?=[ \t])|[0-9]{1,9}[.)](?=[ \t])|\[[ xX]\](?= ))*)(`{3,}|~{3,})([^\r\n]*)"
)
_QUOTE_PREFIX = re.compile(r"[ \t]*(?:>[ \t]?)+")
_URL = r"https?://[\w\-.~:/?#@!$&'+,;=%]+"
_TEXT_TOKEN = re.compile(rf"(?P<url>{_URL})|(?P<escape>\\[!-/:-@\[-`{{-~])|`+|\$+", re.A | re.I)
_LINE_START = re.compile(r"(?:^|[\r\n])(?:[ \t>]|[-*+][ \t]|[0-9]{1,9}[.)][ \t])*\Z")
_CLOSERS = {
    "$": re.compile(r"(?:[^\\$]++|\\.)*+\$", re.S),
    "$$": re.compile(r"(?:[^\\$]++|\\.|\$(?!\$))*+\$\$", re.S),
    r"\(": re.compile(r"(?:[^\\]++|\\(?![()]).)*+\\\)", re.S),
    r"\[": re.compile(r"(?:[^\\]++|\\(?![\[\]]).)*+\\\]", re.S),
}
# A new block inside what would be an inline formula: the delimiters belong to two places.
_BLOCK_START = re.compile(r"[\r\n][ \t]*(?:[-*+>#|]|[0-9]{1,9}[.)][ \t])")
_MONEY = re.compile(r"\d[^\\^_={}]*(?:[A-Za-z]{2}|[\u3040-\u9fff])")


@dataclass(frozen=True, slots=True)
class Fence:
    """The opening line of a fenced code block.

    Attributes:
        prefix: What stands before the fence: indentation, `>`, a list marker.
        run: The backticks or tildes.
        info: The rest of the line: the language tag and more.
        sure: marked reads it as a fence, whatever came before.
        closed: The closing line is there.
    """

    prefix: str
    run: str
    info: str
    sure: bool
    closed: bool = False

    @property
    def quoted(self) -> bool:
        """Whether the block stands in a quote."""
        return ">" in self.prefix

    @property
    def indent(self) -> int:
        """Columns before the fence, a tab counting 4 as in marked."""
        return columns(self.prefix)

    @property
    def tag(self) -> str:
        """The language tag; empty when there is none."""
        words = self.info.split(maxsplit=1)
        return words[0] if words else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a reply; the `text` of all spans joined is the reply.

    Attributes:
        kind: "text" is Markdown; "code" a code span; "fence" whole lines of a code block; "math" a
            complete formula; "source" the beginning of a formula.
        text: The raw characters, delimiters included.
        delimiter: What opens a formula or a code span.
        fence: The block's opening, for "fence".
    """

    kind: Literal["text", "code", "fence", "math", "source"]
    text: str
    delimiter: str = ""
    fence: Fence | None = None

    @property
    def body(self) -> str:
        """The formula or the code itself, without delimiters, fences and their indentation."""
        if self.fence is not None:
            return _fence_body(self.fence, self.text)
        return self.text[len(self.delimiter) : len(self.text) - len(self.delimiter)]

    @property
    def is_display(self) -> bool:
        """Whether a formula stands on a line of its own."""
        return self.delimiter in ("$$", r"\[")


def split_lines(text: str) -> list[str]:
    """Return the lines with their ends."""
    return _LINE.findall(text)


def indentation(line: str) -> str:
    """Return the spaces and tabs that a line begins with."""
    return line[: len(line) - len(line.lstrip(" \t"))]


def columns(blank: str) -> int:
    """Return how wide what stands before a fence is, a tab counting 4 as in marked."""
    return len(blank) + 3 * blank.count("\t")


def _fence_body(fence: Fence, text: str) -> str:
    lines = split_lines(text)[1:]
    if fence.closed:
        lines.pop()
    indent = fence.indent
    if fence.quoted:
        lines = [_QUOTE_PREFIX.sub("", line, count=1) for line in lines]
        indent = columns(_QUOTE_PREFIX.sub("", fence.prefix, count=1))
    return "".join(line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in lines)


def split_spans(text: str) -> list[Span]:
    """Tell code blocks, code spans and formulas from the Markdown around them."""
    spans: list[Span] = []
    plain: list[str] = []
    block: list[str] = []
    fence: Fence | None = None
    trusted = True
    for line in split_lines(text):
        if fence is not None and fence.quoted and not _QUOTE_PREFIX.match(line):
            spans.append(Span("fence", "".join(block), fence=fence))
            fence = None
        if fence is not None:
            block.append(line)
            if _closes(fence, line):
                fence = Fence(fence.prefix, fence.run, fence.info, fence.sure, closed=True)
                spans.append(Span("fence", "".join(block), fence=fence))
                fence = None
            continue
        fence = _parse_fence(line, trusted=trusted)
        if fence is None:
            plain.append(line)
            continue
        # marked may take a list marker before a fence for text: then it sees no fence here and
        # reads every later one the other way round.
        trusted = trusted and (fence.quoted or not fence.prefix.strip())
        spans += _TextSplitter("".join(plain), is_last=False).split()
        plain, block = [], [line]
    if fence is not None:
        spans.append(Span("fence", "".join(block), fence=fence))
    return spans + _TextSplitter("".join(plain), is_last=True).split()


def closing_fence(text: str) -> str:
    """Return the line that would close the last code block of a reply; empty if none is open.

    A block in a quote ends with the quote and needs no closing.
    """
    spans = split_spans(text)
    fence = spans[-1].fence if spans else None
    if fence is None or fence.closed or fence.quoted:
        return ""
    return " " * fence.indent + fence.run


def _parse_fence(line: str, *, trusted: bool) -> Fence | None:
    found = _FENCE_OPENING.match(line)
    if found is None:
        return None
    prefix, run, info = found.groups()
    if run[0] == "`" and "`" in info:
        return None
    # At most 3 spaces: a fence in marked inside and outside of lists, since it also ends
    # paragraphs, lists, quotes and tables.
    return Fence(prefix, run, info, sure=trusted and prefix in ("", " ", "  ", "   "))


def _closes(fence: Fence, line: str) -> bool:
    line = line.rstrip("\r\n")
    if fence.quoted:
        line = _QUOTE_PREFIX.sub("", line, count=1)
    rest = line.lstrip(" \t")
    if not rest.startswith(fence.run) or rest.rstrip(" ").strip("`~"):
        return False
    # How much deeper than its opening a closing line may stand depends on the list around it.
    limit = max(fence.indent, 3) if fence.indent == 0 or fence.quoted else fence.indent
    return columns(indentation(line)) <= limit


class _TextSplitter:
    """Splits the text between two code blocks into Markdown, code spans and formulas."""

    def __init__(self, text: str, *, is_last: bool) -> None:
        self.text = text
        self.is_last = is_last
        self.paragraph_end = -1
        self.absent: dict[str, int] = {}  # backticks -> there are none like them up to here

    def split(self) -> list[Span]:
        spans: list[Span] = []
        start = position = 0
        while found := _TEXT_TOKEN.search(self.text, position):
            position = found.end()
            if found["url"]:
                continue
            if self.paragraph_end < found.start():
                self.paragraph_end = self._end_of_paragraph(found.start())
            span = self._code(found) if found[0][0] == "`" else self._math(found)
            if span is None:
                continue
            if start < found.start():
                spans.append(Span("text", self.text[start : found.start()]))
            spans.append(span)
            start = position = found.start() + len(span.text)
        if start < len(self.text):
            spans.append(Span("text", self.text[start:]))
        return spans

    def _end_of_paragraph(self, position: int) -> int:
        found = _PARAGRAPH_END.search(self.text, position)
        return found.start() if found else len(self.text)

    def _code(self, found: re.Match[str]) -> Span | None:
        ticks = found[0]
        if self.absent.get(ticks, -1) >= self.paragraph_end:
            return None
        for closing in re.finditer("`+", self.text[found.end() : self.paragraph_end]):
            if closing[0] == ticks:
                text = self.text[found.start() : found.end() + closing.end()]
                return Span("code", text, ticks)
        self.absent[ticks] = self.paragraph_end
        return None

    def _math(self, found: re.Match[str]) -> Span | None:
        delimiter = found[0]
        if delimiter not in _CLOSERS:
            return None
        own_line = delimiter in ("$$", r"\[") and self._at_line_start(found.start())
        end = self._closing(delimiter, found.end(), self.paragraph_end)
        if end is None and own_line:
            end = self._closing(delimiter, found.end(), len(self.text))
            if end is not None and not re.match(
                r"[ \t]*[.,;:。，]?[ \t]*[\r\n]|\Z", self.text[end:]
            ):
                return None
        if end is None:
            return self._beginning(found.start(), delimiter, own_line=own_line)
        text = self.text[found.start() : end]
        body = text[len(delimiter) : -len(delimiter)]
        bare = re.sub(r"\\.", "", body, flags=re.S)
        # KaTeX looks for the end with braces counted.
        if not body.strip() or bare.count("{") != bare.count("}"):
            return None
        if delimiter == "$" and not self._is_inline(body, found.start(), end):
            return None
        if delimiter == r"\(" and _BLOCK_START.search(body):
            return None
        return Span("math", text, delimiter)

    def _closing(self, delimiter: str, start: int, limit: int) -> int | None:
        # Each search ends at the next delimiter of its kind, so all of them together are linear.
        found = _CLOSERS[delimiter].match(self.text, start, limit)
        return found.end() if found else None

    def _at_line_start(self, position: int) -> bool:
        line = max(self.text.rfind("\n", 0, position), self.text.rfind("\r", 0, position))
        return _LINE_START.search(self.text[max(line, 0) : position]) is not None

    def _is_inline(self, body: str, start: int, end: int) -> bool:
        """Apply Pandoc's rule for `$`, and keep away from prices, shell variables and cells."""
        after = self.text[end : end + 1]
        if body[0].isspace() or body[-1].isspace() or "`" in body or _BLOCK_START.search(body):
            return False
        if after.isascii() and (after.isdigit() or after.isupper() or after in tuple("_{($")):
            return False
        if after.isalpha() and body[-1] in "/:.,;=&?-+@\"'":
            return False
        if _MONEY.match(body):
            return False
        line = max(self.text.rfind("\n", 0, start), self.text.rfind("\r", 0, start)) + 1
        return " | " not in body or not self.text[line:start].lstrip().startswith("|")

    def _beginning(self, start: int, delimiter: str, *, own_line: bool) -> Span | None:
        """A formula that is still being written is shown as its source, as it stands."""
        if delimiter[0] == "$" and not own_line:
            return None
        if (self.is_last and self.paragraph_end == len(self.text.rstrip("\r\n"))) or (
            self.is_last and not self.text[self.paragraph_end :].strip()
        ):
            return Span("source", self.text[start : self.paragraph_end].rstrip(), delimiter)
        return Span("source", delimiter, delimiter) if delimiter[0] == "\\" else None
