"""Exported conversations: self-contained, inert, and with the raw texts where they belong."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen.messages import Message
from webapp.export import Transcript, export_html, export_json, export_markdown, render_html

REPLY = "Price $5 and $10, $x^2$, a<b then c>d, Vector<int>.\n\n```py\nprint('<b>')\n```\n"
TRANSCRIPT = Transcript(
    title="A <chat>",
    model="Qwen2.5-Coder",
    created="2026-11-23T17:00:00+00:00",
    system_prompt="Sei <freundlich>",
    entries=(
        (Message("user", "你好 <script>alert(1)</script>"), ""),
        (Message("assistant", REPLY), "12 tokens · stop"),
    ),
)
TAGS = """
html head meta title style body header main article h1 h2 h3 h4 h5 h6 p pre code span div a br hr ul
ol li table thead tbody tr th td blockquote strong em b i del s sub sup small math mrow mi mo mn
mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle
mpadded mphantom menclose
"""
ALLOWED = set(TAGS.split())


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_json_holds_the_raw_texts() -> None:
    document = json.loads(export_json(TRANSCRIPT))
    assert document["format"] == "qwen-chat-transcript"
    assert document["version"] == 1
    assert document["system_prompt"] == "Sei <freundlich>"
    assert document["messages"] == [
        {"role": "user", "content": "你好 <script>alert(1)</script>"},
        {"role": "assistant", "content": REPLY, "note": "12 tokens · stop"},
    ]
    assert "你好" in export_json(TRANSCRIPT)


def test_markdown_holds_the_raw_texts_under_a_heading_for_each_speaker() -> None:
    text = export_markdown(TRANSCRIPT)
    assert text.index("## System") < text.index("## You") < text.index("## Assistant")
    assert REPLY.strip() in text
    assert "> 12 tokens · stop" in text


def test_markdown_closes_a_code_block_that_was_cut() -> None:
    cut = Transcript("t", "m", "c", "", ((Message("assistant", "```py\nx"), "cancelled"),))
    assert "```py\nx\n```\n\n> cancelled" in export_markdown(cut)


def test_html_is_one_file_that_needs_neither_script_nor_network() -> None:
    page = Page(export_html(TRANSCRIPT))
    assert page.tags <= ALLOWED
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not {name for name, _ in page.attributes} & {"src", "srcset", "style", "action", "data"}
    assert "url(" not in export_html(TRANSCRIPT)
    assert "@import" not in export_html(TRANSCRIPT)


def test_html_shows_text_code_and_notes_whole() -> None:
    words = Page(export_html(TRANSCRIPT)).words
    for text in ("A <chat>", "Qwen2.5-Coder", "2026-11-23", "Sei <freundlich>", "12 tokens · stop"):
        assert text in words
    for text in ("$5 and $10", "a<b then c>d", "Vector<int>", "print('<b>')", "<script>alert(1)"):
        assert text in words


@pytest.mark.parametrize("text", ["$x^2$", r"\(x^2\)", "$$x^2$$", r"\[x^2\]", "> $$\n> x^2\n> $$"])
def test_formulas_become_mathml(text: str) -> None:
    html = render_html(text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html
    assert "&gt;" not in html
    assert ('display="block"' in html) == (text[:2] not in ("$x", r"\("))


@pytest.mark.parametrize("text", [r"$\sqrt$", r"\(\nosuchcommand{x}\)", r"\(x_1 \frac{a"])
def test_a_formula_that_cannot_be_converted_is_shown_as_its_source(text: str) -> None:
    assert text in Page(render_html(text)).words
    assert "<math" not in render_html(text)


@pytest.mark.parametrize(
    "text", ["$5 and $10", "$HOME $PATH", "`$x$`", "```\n$x$\n```", r"\$x\$ a"]
)
def test_money_and_code_are_not_formulas(text: str) -> None:
    assert "<math" not in render_html(text)
    assert text.replace("\\", "").strip("`\n") in Page(render_html(text)).words


@pytest.mark.parametrize(
    "text",
    [
        "<script>q()</script>",
        "<img src=https://a.b/c onerror=q()>",
        "![a](https://a.b/c.png)",
        "[a](javascript:q())",
        "[a](/relative)",
        "[a]: javascript:q()\n\n[a]",
        "<javascript:q()>",
        "<form action=https://a.b><input></form>",
        "<iframe src=https://a.b></iframe>",
        "<style>*{background:url(https://a.b)}</style>",
        "<svg onload=q()>",
        "<meta http-equiv=refresh content='0;url=https://a.b'>",
        r"$\text{<img src=x onerror=q()>}$",
        r"$\text{</mtext><style><img src=x onerror=q()>}$",
        r"$\href{javascript:q()}{x}$",
        r"$\includegraphics{https://a.b/c.png}$",
        "`<img src=x>` ``<b>``",
        "```\n</code></pre><script>q()</script>\n```",
        "    <script>q()</script>",
        "> <script>q()</script>",
        "- <script>q()</script>",
        "| a |\n|---|\n| <script>q()</script> |",
        "<math><mtext><table><mglyph><style><img src=x onerror=q()>",
    ],
)
def test_nothing_in_a_message_runs_or_loads(text: str) -> None:
    page = Page(render_html(text))
    assert page.tags <= ALLOWED - {"style", "meta"}
    assert {name for name, _ in page.attributes} <= {"href", "rel", "display", "stretchy", "start"}
    for name, value in page.attributes:
        assert name != "href" or re.match("https?://|mailto:", value or "")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"ab1 \n`~$\\()[]{}<>!&:*_->|#.",
                "```\n",
                "$$",
                "\\(",
                "\\)",
                "- ",
                "   ",
                "1. ",
                "> ",
                "<img src=q>",
                "<b x=y>",
                "](http://a)",
                "**",
                "\n\n",
                "\\frac{a}{b}",
                "qz0q",
                "|-|-|\n",
            ]
        ),
        max_size=40,
    ).map("".join)
)
def test_any_message_becomes_inert_html(text: str) -> None:
    page = Page(render_html(text))
    assert page.tags <= ALLOWED - {"style", "meta"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n  - b\n- c", 2),
        ("- a\n    - b\n- c", 2),
        ("1. a\n   - b\n\n   - c\n2. d", 2),
        ("Text:\n- a\n- b", 1),
    ],
)
def test_lists_are_nested_as_models_write_them(text: str, expected: int) -> None:
    html = render_html(text)
    assert html.count("<ul>") + html.count("<ol>") == expected
    assert html.count("<li>") == len(re.findall(r"(?m)^ *(?:-|\d\.) ", text))


def test_code_stays_in_its_list_item() -> None:
    html = render_html("1. a\n   ```py\n   x\n   ```\n2. b")
    assert re.search(r"<li>\s*<p>a</p>\s*<pre><code>x\n</code></pre>\s*</li>\s*<li>", html)


def test_tables_keep_their_alignment_without_styles() -> None:
    html = render_html("Text\n| a | b |\n|:-:|---|\n| `x|y` | $|z|$ |")
    assert '<th align="center">a</th>' in html
    assert "<code>x|y</code>" in html
    assert "<math" in html


def test_deep_nesting_is_shown_and_not_refused() -> None:
    assert "x" in Page(render_html("- " * 3000 + "x")).words


def test_importing_the_module_imports_no_converter() -> None:
    code = "import sys, webapp.export; print({'nh3', 'mdtex2html', 'markdown'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
    assert result.stderr == ""


def test_exporting_warns_about_nothing() -> None:
    code = "import webapp.export as e; e.render_html('$x$ `y`')"
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout + result.stderr == ""
