"""What may reach a terminal, and where growing Markdown is cut."""

from __future__ import annotations

import io
import time

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qwen.cli_screen import PlainReply, RenderedReply, render_markdown
from qwen.cli_text import MarkdownBlocks, safe_text
from qwen.messages import StreamEvent


@given(st.text())
def test_no_command_reaches_the_terminal(text):
    safe = safe_text(text)
    for character in safe:
        code = ord(character)
        assert character in "\n\t" or code >= 0x20
        assert not 0x7F <= code < 0xA0
    safe.encode()


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb", "a\nb"),
        ("\x1b[31m", "␛[31m"),
        ("\x9b31m", "\ufffd31m"),
        ("a\u202eb", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("你好 שלום 👩‍💻", "你好 שלום 👩‍💻"),
    ],
)
def test_commands_become_visible_and_text_stays(text, safe):
    assert safe_text(text) == safe


def cut(text: str, sizes: list[int]) -> list[str]:
    blocks, done, at = MarkdownBlocks(), [], 0
    for size in [*sizes, len(text)]:
        done += blocks.feed(text[at : at + size])
        at += size
    return [block for block in [*done, blocks.finish()] if block]


TEXTS = st.lists(
    st.sampled_from(["para", "  more", "", "", "```py", "```", "~~~", "- item", "1. one", "    x"])
).map("\n".join)


@given(TEXTS, st.lists(st.integers(1, 5)))
def test_blocks_do_not_depend_on_where_the_text_is_cut(text, sizes):
    assert cut(text, sizes) == cut(text, [])


@given(TEXTS)
def test_no_line_is_lost_or_doubled(text):
    joined = "\n".join(cut(text, []))
    assert [line for line in joined.split("\n") if line] == [x for x in text.split("\n") if x]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("a\n\nb", ["a", "b"]),
        ("a\nb", ["a\nb"]),
        ("```\na\n\nb\n```\n\nc", ["```\na\n\nb\n```", "c"]),
        ("- a\n\n  still a\n\nb", ["- a\n\n  still a", "b"]),
        ("````\n```\n\n```\n````", ["````\n```\n\n```\n````"]),
    ],
)
def test_a_block_ends_only_where_nothing_to_come_can_change_it(text, blocks):
    assert cut(text + "\n", []) == blocks


def rendered(text: str) -> str:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(render_markdown(text))
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`a` Vector<int> and a<b", "a Vector<int> and a<b"),
        (r"\(x_1\) and \[y\]", r"\(x_1\) and \[y\]"),
        ("one\ntwo", "one\ntwo"),
        ("[docs](https://example.org/x)", "docs (https://example.org/x)"),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
        (":smile:", ":smile:"),
    ],
)
def test_markdown_keeps_what_models_write(text, shown):
    assert shown in rendered(text)


def test_a_long_reply_costs_in_proportion_to_its_length():
    """Characters written to the terminal, which no clock has a part in."""

    def written(lines: int) -> int:
        out = io.StringIO()
        reply = RenderedReply(Console(file=out, force_terminal=True, width=80, height=24))
        reply.feed(StreamEvent(text="```\n"))
        for number in range(lines):
            reply.feed(StreamEvent(text=f"line {number}\n"))
            reply._draw()
        reply.finish("")
        return len(out.getvalue())

    assert written(800) < 5 * written(200)


def test_the_open_block_is_drawn_at_a_pace(monkeypatch):
    out = io.StringIO()
    reply = RenderedReply(Console(file=out, force_terminal=True, width=80, height=24))
    drawn = []
    monkeypatch.setattr(reply, "_draw", lambda: drawn.append(1))
    reply._drawn = time.monotonic() + 1000
    for _ in range(1000):
        reply.feed(StreamEvent(text="x"))
    assert not drawn


def test_thoughts_are_shown_on_a_terminal_and_not_in_a_pipe():
    out = io.StringIO()
    reply = RenderedReply(Console(file=out, force_terminal=True, width=80, height=24))
    plain = PlainReply(pipe := io.StringIO())
    for shown in (reply, plain):
        shown.feed(StreamEvent(reasoning="let me see"))
        shown.feed(StreamEvent(text="42"))
        shown.finish("")
    assert "let me see" in out.getvalue() and "42" in out.getvalue()
    assert pipe.getvalue() == "42\n"


class Emulated(io.StringIO):
    """A terminal of 24 rows and 40 columns that remembers what scrolled off."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal = pyte.HistoryScreen(40, 24, history=5000)
        self._stream = pyte.Stream(self.terminal)

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def text(self) -> str:
        old = ["".join(row[n].data for n in range(40)) for row in self.terminal.history.top]
        return "\n".join([*old, *self.terminal.display])


@pytest.mark.parametrize("wrap", ["```\n{}\n```", "{}", "- {}", "para\n\n{}\n\n# Next"])
def test_rows_that_were_drawn_anew_leave_nothing_behind(wrap):
    screen = Emulated()
    reply = RenderedReply(Console(file=screen, force_terminal=True, width=40, height=24))
    lines = [f"<{number}> " + "wide words " * 8 for number in range(60)]
    for piece in wrap.format("\n".join(lines)).splitlines(keepends=True):
        reply.feed(StreamEvent(text=piece))
        reply._draw()
        newest = piece[piece.find("<") : piece.find(">") + 1]
        assert newest in "".join(screen.terminal.display)
    reply.finish("the end")
    shown = screen.text()
    assert [shown.count(f"<{number}>") for number in range(60)] == [1] * 60
    assert shown.count("the end") == 1
