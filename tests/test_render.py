"""The guarded Markdown: what is math, what is code, what may not become HTML, and the way back."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from webapp.render import (
    DISPLAY,
    GUARD,
    INLINE,
    INSERTED,
    LATEX_DELIMITERS,
    NOTE,
    SOURCE,
    render_note,
    render_reply,
    restore_text,
)
from webapp.spans import split_spans

MARKS = GUARD + INSERTED + INLINE + DISPLAY + SOURCE + NOTE
PIECES = [
    *"ab1 \t`~$\\()[]{}<>!&#;:*_->|.%/",
    *[
        "\n",
        "\r\n",
        "\r",
        "\n\n",
        "```",
        "```cpp\n",
        "```\n",
        "~~~",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
    ],
    *["  ", "    ", "1. ", "- ", "> ", "- [ ] ", "http://a.b/", "&#60;", "&lt;", "中", "。", "**"],
    *["%%%LATEX_BLOCK_0%%%", "<img src=q>", "<b>", "![i](http://q)", "[l](javascript:q)", "[a]: "],
]
replies = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
lines = st.lists(
    st.tuples(
        st.sampled_from(
            ["", "", " ", "  ", "   ", "    ", "      ", "> ", "- ", "1. ", "2. ", "- [x] "]
        ),
        st.sampled_from(
            ["```", "```py", "~~~", "<img src=q>", "code", "", "- a", "10. a", "> c", "$$"]
        ),
    ).map("".join),
    max_size=12,
).map("\n".join)


def formulas(text: str) -> list[str]:
    return [span.body for span in split_spans(text) if span.kind == "math"]


class Tags(HTMLParser):
    """The tags that a CommonMark parser makes of a text, after Gradio has taken formulas out."""

    def __init__(self, display: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        for delimiter in LATEX_DELIMITERS:
            left, right = re.escape(str(delimiter["left"])), re.escape(str(delimiter["right"]))
            display = re.sub(rf"{left}[\s\S]+?{right}", "%%%LATEX_BLOCK_0%%%", display)
        self.feed(MarkdownIt("commonmark").render(display))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


# --- there and back ----------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(replies, lines, st.text(max_size=60).filter(lambda text: not set(MARKS) & set(text)))
)
def test_a_reply_is_restored_from_what_is_shown(text: str) -> None:
    assert restore_text(render_reply(text)) == text


@settings(max_examples=400, deadline=None)
@given(st.one_of(replies, lines))
def test_a_reply_is_restored_without_the_note_behind_it(text: str) -> None:
    note = "12 tokens ```\n<b> $x$"
    assert restore_text(render_reply(text) + render_note(note, after=text)) == text
    assert restore_text(render_reply(text) + render_note(note)) == text


@settings(max_examples=200, deadline=None)
@given(st.one_of(replies, lines))
def test_the_spans_of_a_reply_joined_are_the_reply(text: str) -> None:
    assert "".join(span.text for span in split_spans(text)) == text


def test_every_beginning_of_a_reply_can_be_shown_and_restored() -> None:
    reply = (
        "# T\n\n$$\n\\frac{a_b}{c}\n$$ and \\(x<y\\), $5.\n\n1. a\n   ```cpp\nint x;\n   ```\n"
        "> ```py\n> z\n> ```\n\n[l](https://a.b) `c` **d** | e |\n~~~~html\n<b>\n~~~~\n\\[ 1"
    )
    for end in range(len(reply) + 1):
        assert restore_text(render_reply(reply[:end])) == reply[:end]


def test_restoring_what_was_never_rendered_changes_nothing() -> None:
    text = '\n\n<small class="note">x</small> &#60; c cpp\n   ```\n'
    assert restore_text(text) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=MARKS + "&#;0123456789 \na<`%$>", max_size=40))
def test_restoring_a_forged_text_fails_on_nothing_and_leaves_no_marks(text: str) -> None:
    assert not set(MARKS) & set(restore_text(text))


def test_marks_in_a_reply_forge_neither_formulas_nor_notes() -> None:
    forged = f'$${DISPLAY}x{DISPLAY}$ a <{GUARD}b {NOTE} \n\n<small class="note">{NOTE}y</small>'
    shown = render_reply(forged)
    assert NOTE not in shown
    assert DISPLAY not in shown
    assert not Tags(shown).found & {"small", "b"}


@pytest.mark.parametrize("text", ["%%%LATEX_BLOCK_0%%%", "`%%%LATEX_BLOCK_0%%%` $x$"])
def test_gradios_placeholder_for_formulas_cannot_be_forged(text: str) -> None:
    assert "%%%LATEX_BLOCK_" not in render_reply(text)


# --- formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so $x^2$ is", ["x^2"]),
        (r"so \(x\) is", ["x"]),
        ("$$x$$", ["x"]),
        (r"\[ x \]", [" x "]),
        ("$$\na\n\nb\n$$\n", ["\na\n\nb\n"]),
        ("- $$\n  a\n  $$", ["\n  a\n  "]),
        ("the $n$th term, $k$-means", ["n", "k"]),
        (r"$\text{costs \$5}$", [r"\text{costs \$5}"]),
        (r"$$a \\ b \text{$c$}$$", [r"a \\ b \text{$c$}"]),
        ("| $|x|$ | $y$ |", ["|x|", "y"]),
        ("$P(A | B)$", ["P(A | B)"]),
        ("面积是$a^2$平方", ["a^2"]),
        ("$x$$y$", []),
    ],
)
def test_formulas_are_found(text: str, expected: list[str]) -> None:
    assert formulas(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "$5 and $10",
        "from $5 to 10$ or so",
        "US$5, $6 and $7.",
        "价格是$5，一共10$",
        "$HOME $PATH",
        "$HOME/$PATH",
        "${a}${b}",
        "$dir/$file",
        "`$x$` and ``\\(y\\)``",
        "```\n$x$ \\(y\\)\n```",
        "~~~\n$$x$$\n~~~",
        "> ```\n> $x$\n> ```",
        r"\$x\$",
        "- costs $a\n- costs b$",
        "a $x\n\ny$ b",
        "| $5 | 6$ |",
        "$ x $",
        "https://a.b/?x=$y&z=$q",
        "[l](https://a.b/$x$)",
        "$\\{x | {y$",
    ],
)
def test_money_code_and_variables_are_not_formulas(text: str) -> None:
    assert formulas(text) == []
    assert not set(INLINE + DISPLAY) & set(render_reply(text))


def test_formula_text_cannot_be_html() -> None:
    shown = render_reply('$a<b & "c"$')
    assert shown == f"${INLINE}a&#60;b &#38; &#34;c&#34;{INLINE}$"


def test_each_delimiter_is_one_that_gradio_is_told() -> None:
    for text in ("$$x$$", r"\[x\]", "$x$", r"\(x\)"):
        shown = render_reply(text)
        assert any(
            shown.startswith(str(d["left"])) and shown.endswith(str(d["right"]))
            for d in LATEX_DELIMITERS
        )


@pytest.mark.parametrize("text", ["so \\(x_1 + y_1", "$$\n\\frac{a_b}{c_d", "- \\[ a*b*c"])
def test_an_unfinished_formula_is_shown_as_its_source(text: str) -> None:
    shown = render_reply(text)
    assert "<em>" not in MarkdownIt().render(shown)
    assert not set(INLINE + DISPLAY) & set(shown)


def test_quote_marks_inside_a_formula_are_comments() -> None:
    shown = render_reply("> $$\n> a\n> $$")
    assert f"\n%{GUARD}&#62; {GUARD}\na" in shown


# --- code --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "shown"),
    [
        ("cpp", "c"),
        ("py", "python"),
        ("TypeScript", "javascript"),
        ("html", "markup"),
        ("sh", "bash"),
        ("yml", "yaml"),
        ("mermaid", "text"),
        ("constructor", "text"),
        ("__proto__", "text"),
        ("Python", "python"),
    ],
)
def test_a_language_tag_is_mapped_to_a_highlighter(tag: str, shown: str) -> None:
    assert render_reply(f"```{tag}\nx\n```") == f"```{shown} {INSERTED}{tag}\nx\n```"


def test_a_language_with_its_own_highlighter_is_left() -> None:
    assert render_reply("```python\nx\n```") == "```python\nx\n```"


@pytest.mark.parametrize(
    "text",
    [
        "```\n<b>\n```",
        "~~~html x\n<b>\n~~~",
        "````\n```\n<b>\n````",
        "- a\n  ```\n  <b>\n  ```",
        "```\n<b>",
    ],
)
def test_code_keeps_its_angle_brackets(text: str) -> None:
    assert "<b>" in render_reply(text)


def test_an_unindented_line_stays_in_the_code_block_of_its_list_item() -> None:
    shown = render_reply("1. a\n   ```\nx\n```\nend")
    html = MarkdownIt().render(shown)
    assert html.count("<pre>") == 1
    assert "</pre>\n</li>" in html


def test_a_fence_that_has_no_line_end_yet_is_a_block_already() -> None:
    # Without a line end marked takes the fence for a part of the paragraph.
    assert render_reply("text\n```python") == f"text\n```python\n{INSERTED}{INSERTED}"


@pytest.mark.parametrize(
    "text",
    [
        "text\n2. ```\n   ```\n```\n<img src=q>\n```",  # no list for marked: a paragraph
        "- [ ] ```\n  x\n```\n<img src=q>\n```",
        "> ```\n> <img src=q>",
        "     ```\n<img src=q>",
    ],
)
def test_code_that_marked_may_take_for_text_is_guarded(text: str) -> None:
    assert f"<{GUARD}img" in render_reply(text)


def test_ticks_before_a_formula_with_a_tick_open_no_block() -> None:
    assert render_reply("``` \\(x`y\\)\n").startswith(f"{GUARD}```")


@pytest.mark.parametrize("text", ["x```mermaid\n```\n<img src=q>\n```", "````\n```mermaid\n````"])
def test_gradios_diagrams_cannot_be_reached(text: str) -> None:
    assert "```mermaid" not in render_reply(text)


@settings(max_examples=600, deadline=None)
@given(st.one_of(lines, replies))
def test_no_text_becomes_an_element(text: str) -> None:
    tags = Tags(render_reply(text)).found
    assert not tags & {"img", "b", "script", "small"}


# --- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a<b then c>d", "Vector<int>", "</div>", "<!-- c -->", "<?php ?>", "`<b>`", "    <b>"]
)
def test_a_tag_outside_of_a_code_block_is_guarded(text: str) -> None:
    assert f"<{GUARD}" in render_reply(text)


@pytest.mark.parametrize("text", ["1 < 2", "a <- b", "<https://a.b/c>", "x<=y", "&lt;b&gt; &amp;"])
def test_what_cannot_be_a_tag_is_left(text: str) -> None:
    assert render_reply(text) == text


@pytest.mark.parametrize(
    "url", ["https://a.b/c?d=e", "HTTP://a.b", "mailto:a@b.c", "<https://a.b>"]
)
def test_web_and_mail_links_stay_links(url: str) -> None:
    assert render_reply(f"[l]({url})") == f"[l]({url})"


@pytest.mark.parametrize(
    "link",
    [
        "[l](javascript:alert(1))",
        "[l]( JaVaScRiPt:alert(1))",
        "[l](java&#115;cript:alert(1))",
        "[l](&#x6a;avascript:alert(1))",
        "[l](data:text/html,x)",
        "[l](vbscript:x)",
        "[l](//a.b)",
        "[l](/login)",
        "[l](#top)",
        "[l](<javascript:x>)",
        "[l]:\njavascript:x\n\n[l]",
        "[l]: javascript:x\n\n[l]",
        "[l]: https://a.b\n\n[l]",
        "<javascript:alert(1)>",
        "[a\n]: javascript:x\n\n[a]",
    ],
)
def test_other_links_are_text(link: str) -> None:
    assert "a" not in Tags(render_reply(link)).found


@pytest.mark.parametrize(
    "image",
    ["![a](https://a.b/c.png)", "![a](data:image/png;base64,x)", "![a][b]\n\n[b]: https://c.d"],
)
def test_images_load_nothing(image: str) -> None:
    assert "img" not in Tags(render_reply(image)).found


def test_bold_works_between_chinese_letters_and_punctuation() -> None:
    for text in ("是**「引号」**的", "是**$x$**的", "**定义：**设"):
        assert "<strong>" in MarkdownIt().render(render_reply(text))


# --- notes -------------------------------------------------------------------------------------


def test_a_note_is_a_paragraph_of_its_own_and_escaped() -> None:
    html = MarkdownIt().render(render_reply("text") + render_note("3 < 4 *x* <b>\nnext"))
    assert f'<p><small class="note">{NOTE}3 &lt; 4 *x* &lt;b&gt; next</small></p>' in html


@pytest.mark.parametrize(
    "text", ["```py\nx", "```py\nx\n", "```", "- a\n  ```\n  x", "~~~~\nx\n~~~"]
)
def test_a_note_closes_the_block_of_a_reply_that_was_cut(text: str) -> None:
    html = MarkdownIt().render(render_reply(text) + render_note("n", after=text))
    assert html.rstrip().endswith("</small></p>")
    assert "<pre>" in html


# --- the browser's side ------------------------------------------------------------------------


def test_delimiters_survive_json() -> None:
    assert json.loads(json.dumps(LATEX_DELIMITERS)) == LATEX_DELIMITERS
