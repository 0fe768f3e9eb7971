"""What the terminal chat shows: Markdown that grows, notes, errors. Everything passes `safe_text`.

On a terminal a reply is rendered block by block; elsewhere it is written as it comes. Source of
the look: rich, with HTML left visible and line breaks kept.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Protocol, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from qwen.cli_text import MarkdownBlocks, safe_text
from qwen.messages import StreamEvent

#: Between two pictures of the block that is being written.
PACE_SECONDS = 0.1


class Reply(Protocol):
    """A reply that is being shown."""

    def feed(self, event: StreamEvent) -> None:
        """Show a step."""

    def finish(self, note: str) -> None:
        """Show what is left, and a note under it; called once, also after an error."""


class Screen:
    """The terminal, or the file or pipe in its place.

    Args:
        out: Where replies go.
        err: Where errors go.
        plain: Write replies as they come, also to a terminal.
    """

    def __init__(self, out: TextIO, err: TextIO, *, plain: bool = False) -> None:
        self._out = out
        self._plain = plain
        self._console = Console(file=out, highlight=False, markup=False, emoji=False)
        self._errors = Console(file=err, highlight=False, markup=False, emoji=False)

    @property
    def draws(self) -> bool:
        """Whether replies are drawn, on a terminal that can."""
        return not self._plain and self._console.is_terminal and not self._console.is_dumb_terminal

    def say(self, text: str, *, style: str = "") -> None:
        """Print lines of our own; long ones are folded at words."""
        self._console.print(Text(safe_text(text), style=style))

    def note(self, text: str) -> None:
        """Print something beside the conversation."""
        self.say(text, style="dim")

    def error(self, text: str) -> None:
        """Print what went wrong and what to do next."""
        line = Text(safe_text(text))
        if self._errors.is_terminal:
            line.stylize("red")
        self._errors.print(line, soft_wrap=True)

    def markdown(self, text: str) -> None:
        """Print a whole text as a finished reply."""
        self._console.print(_Rows(safe_text(text)))

    def clear(self) -> None:
        """Empty the terminal."""
        self._console.clear()

    def reply(self) -> Reply:
        """Begin to show a reply."""
        return RenderedReply(self._console) if self.draws else PlainReply(self._out)


class PlainReply:
    """A reply for a pipe or a file: its text alone, as it comes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._ended_line = True

    def feed(self, event: StreamEvent) -> None:
        """See `Reply.feed`."""
        text = safe_text(event.text)
        if text:
            self._out.write(text)
            self._out.flush()
            self._ended_line = text.endswith("\n")

    def finish(self, note: str) -> None:
        """End the last line; the note is not part of the reply."""
        if not self._ended_line:
            self._out.write("\n")
        self._out.flush()


class RenderedReply:
    """A reply on a terminal. A finished block is printed once; the open one is drawn anew.

    Drawing looks at a screenful at most, so that a reply costs in proportion to its length.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._blocks = MarkdownBlocks()
        self._live: Live | None = None
        self._drawn = 0.0
        self._printed = False
        self._thinking = False
        self._show(Text("…", style="dim"))
        self._drawn = 0.0  # the first word is shown at once

    def feed(self, event: StreamEvent) -> None:
        """See `Reply.feed`."""
        if event.reasoning:
            self._end_live()
            self._thinking = True
            self._console.print(
                Text(safe_text(event.reasoning), style="dim italic"), end="", soft_wrap=True
            )
        if not event.text:
            return
        self._end_thoughts()
        done = self._blocks.feed(safe_text(event.text))
        for block in done:
            self._print(block)
        if done or time.monotonic() - self._drawn >= PACE_SECONDS:
            self._draw()

    def finish(self, note: str) -> None:
        """See `Reply.finish`."""
        self._end_thoughts()
        self._end_live()
        rest = self._blocks.finish()
        if rest.strip():
            self._print(rest)
        if note:
            self._console.print(Text(safe_text(note), style="dim"))
        self._console.print()

    def _end_thoughts(self) -> None:
        if self._thinking:
            self._console.print("\n")
            self._thinking = False

    def _print(self, block: str) -> None:
        if self._printed:
            self._console.print()
        self._console.print(_Rows(block))
        self._printed = True

    def _draw(self) -> None:
        rows, columns = max(self._console.height - 3, 3), self._console.width
        tail = self._blocks.tail(lines=rows, characters=rows * columns)
        shown = _Rows(tail, rows)
        self._show(Group("", shown) if self._printed else shown)

    def _show(self, open_block: Any) -> None:
        """Draw in place of what was drawn before."""
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(open_block, refresh=True)
        self._drawn = time.monotonic()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None


class _Rows:
    """A Markdown text without the empty rows around it; the last so many rows of it."""

    def __init__(self, text: str, last: int | None = None) -> None:
        self._text, self._last = text, last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = console.render_lines(
            render_markdown(self._text), options.update(height=None), pad=False
        )
        filled = [n for n, row in enumerate(rows) if any(part.text.strip() for part in row)]
        rows = rows[filled[0] : filled[-1] + 1] if filled else []
        for row in rows[-self._last :] if self._last else rows:
            yield from row
            yield Segment.line()


class _PlainHeading(Heading):
    """A heading at the left, so that it reads as one however wide the terminal is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _BareCode(CodeBlock):
    """Code without a frame, so that it can be copied from the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The terminal's own colours are readable on its background, dark or light.
        yield Syntax(
            str(self.text).rstrip(),
            self.lexer_name,
            theme="ansi_dark",
            word_wrap=True,
            background_color="default",
        )


class _ChatMarkdown(Markdown):
    """Markdown as models write it."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _PlainHeading,
        "fence": _BareCode,
        "code_block": _BareCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)  # a link's address is shown, not hidden in it
        # Without HTML, `Vector<int>` keeps its tail; without "escape", `\(x\)` its backslashes;
        # without images, their addresses are shown.
        parser = MarkdownIt("commonmark", {"html": False})
        parser.enable(["strikethrough", "table"]).disable(["escape", "image"])
        self.markup = text
        self.parsed = parser.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def render_markdown(text: str) -> Any:
    """Return safe Markdown as something that rich can print."""
    return _ChatMarkdown(text)
