r"""A reply's Markdown and LaTeX -> guarded Markdown for `gr.Chatbot`, and back again.

Only invisible marks and what they bracket are inserted, so that `restore_text` gives the reply
back exactly. The rules follow what Gradio 6.31 does with a message: it takes formulas out, runs
marked 12, puts the formulas back as HTML, sanitises, runs KaTeX. Its sanitiser lets images and
forms through, so no `<` that could begin a tag may reach it: a `<` goes unguarded only inside a
fence that marked is sure to read as a fence. Knows neither Gradio's API nor the page.
"""

from __future__ import annotations

import re
import unicodedata

from webapp.spans import (
    Fence,
    Span,
    closing_fence,
    columns,
    indentation,
    split_lines,
    split_spans,
)

# Deprecated format characters (Unicode 16, section 23.3): invisible in every browser and, unlike
# U+2060 or private-use characters, in no real text and no font.
GUARD = "\u206a"  # parts two characters, or counts added spaces at the end of a line
INSERTED = "\u206b"  # ends a stretch that was added before it
INLINE = "\u206c"  # brackets the body of an inline formula
DISPLAY = "\u206d"  # brackets the body of a display formula
SOURCE = "\u206e"  # brackets the source of a formula that is not complete yet
NOTE = "\u206f"  # what follows the reply begins here

#: For `gr.Chatbot(latex_delimiters=...)`: a formula is only what `render_reply` marked as one.
LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": f"$${DISPLAY}", "right": f"{DISPLAY}$$", "display": True},
    {"left": f"\\[{DISPLAY}", "right": f"{DISPLAY}\\]", "display": True},
    {"left": f"${INLINE}", "right": f"{INLINE}$", "display": False},
    {"left": f"\\({INLINE}", "right": f"{INLINE}\\)", "display": False},
]

# Gradio's highlighters and the tags that mean them, nearly or exactly. Any other tag is shown as
# plain text: "cpp" and "constructor", to name two, make Gradio drop the whole message.
_LANGUAGES = {
    "bash": "sh shell zsh ksh console shell-session shellscript powershell ps1 dockerfile docker "
    "makefile make",
    "c": "c++ cpp cxx cc h hpp objc objective-c objectivec cuda glsl arduino",
    "css": "scss less sass",
    "go": "golang",
    "java": "kotlin kt csharp c# cs scala groovy dart swift",
    "javascript": "js jsx mjs cjs ts tsx typescript node",
    "json": "jsonc json5 jsonl ndjson",
    "latex": "tex bibtex",
    "markup": "html xml svg vue xhtml mathml rss svelte htm",
    "php": "",
    "python": "py python3 py3 ipython pycon pyi python-repl",
    "rust": "rs",
    "sql": "mysql postgresql postgres sqlite plsql tsql pgsql",
    "yaml": "yml toml ini",
}
_HIGHLIGHTERS = {tag: name for name, tags in _LANGUAGES.items() for tag in (name, *tags.split())}

_ALL_MARKS = re.compile("[\u206a-\u206f]")
_FENCE_LIKE = re.compile(r"(?=`{3}|~{3})")
_GUARDED = re.compile(
    r"(?P<autolink><https?://[^\s<>`\\\[\]\x00\ufeff]+>)"
    r"|(?P<link>\]\( ?<?(?:https?://|mailto:)[^\s()<>\[\]`\\!\x00\ufeff]*>?)"
    r"|(?P<before>!(?=\[)|\](?=[(:])|<(?=[A-Za-z/!?])|ftp:(?=//))"
    r"|(?P<ticks>`{3,})|(?P<stars>\*\*+)|(?P<blank>[\r\n][ \t]*[\r\n])",
    re.I,
)
_NEVER = re.compile(r"!(?=\[)|\](?=[(:])|<(?=[A-Za-z/!?])|ftp:(?=//)", re.I)
# What Gradio itself acts upon: its placeholder for formulas, diagrams, a path that it rewrites.
_FORGED = re.compile(r'%%%(?=LATEX_BLOCK_)|```(?=mermaid)|src="(?=/file)')
_QUOTED_LINE = re.compile(r"([\r\n][ \t]*)((?:>[ \t]?)+)")

_TAIL = f'\n\n<small class="note">{NOTE}'
_RESTORE_CODED = re.compile(rf"([{INLINE}{DISPLAY}{SOURCE}])([\s\S]*?)\1")
_RESTORE_COMMENT = re.compile(rf"%{GUARD}([> \t]*){GUARD}\n")
_RESTORE_PADDED = re.compile(rf"({GUARD}+)(\r\n|\r|\n)( +)")
_RESTORE_INSERTED = re.compile(rf"(?:(?<![a-z])[a-z]+ |(?<! ) +|\n{INSERTED}){INSERTED}")


def render_reply(text: str) -> str:
    """Return the guarded Markdown that shows a reply; works on any beginning of one, too."""
    spans = split_spans(_ALL_MARKS.sub("", text))
    parts: list[str] = []
    writer = _TextWriter()
    for index, span in enumerate(spans):
        if span.fence is not None:
            parts.append(_render_fence(span.fence, span.text))
        elif span.kind == "text":
            following = spans[index + 1].text[0] if index + 1 < len(spans) else ""
            parts.append(writer.render(span.text, following))
        elif span.kind == "code":
            parts.append(_NEVER.sub(_part, span.text))
        elif span.kind == "math":
            parts.append(_render_math(span))
        else:
            parts.append(SOURCE + _numbered(span.text) + SOURCE)
        writer.previous = span.text[-1]
    return _FORGED.sub(_part, "".join(parts))


def restore_text(display: str) -> str:
    """Return the reply that `render_reply`, with or without a note behind it, was given."""
    text, _, note = display.partition(_TAIL)
    if note[:1] in (GUARD, INSERTED):
        line = max(text.rfind("\n"), text.rfind("\r"))  # its fence was added for the note
        text = text[: line + (note[0] == INSERTED)]
    text = _RESTORE_CODED.sub(lambda found: _decoded(found[2]), text)
    text = _RESTORE_PADDED.sub(lambda found: found[2] + found[3][len(found[1]) :], text)
    text = _RESTORE_INSERTED.sub("", text)
    return _ALL_MARKS.sub("", text)


def render_note(note: str, *, after: str = "") -> str:
    """Return what shows `note` in small type behind `render_reply(after)`.

    Args:
        note: Plain text.
        after: The raw reply; needed when its last code block may be unclosed, as in one that
            was stopped: the block is closed first.
    """
    after = _ALL_MARKS.sub("", after)
    closing, mark = closing_fence(after), ""
    if closing:
        is_line = after[-1] in "\r\n"
        closing, mark = (closing, INSERTED) if is_line else ("\n" + closing, GUARD)
    return f"{closing}{_TAIL}{mark}{_numbered(' '.join(note.split()))}</small>"


def _part(found: re.Match[str]) -> str:
    return found[0] + GUARD


def _numbered(text: str) -> str:
    """Write all ASCII punctuation as numbered entities: inert in Markdown and in HTML."""
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)


def _decoded(text: str) -> str:
    text = re.sub(r"&#([0-9]{2,3});", lambda found: chr(int(found[1])), text)
    return _RESTORE_COMMENT.sub(r"\1", text)


def _render_math(span: Span) -> str:
    mark = DISPLAY if span.is_display else INLINE
    # The quote marks of a formula in a quote become TeX comments.
    body = (
        _QUOTED_LINE.sub(rf"\1%{GUARD}\2{GUARD}\n", span.body) if "\n>" in span.body else span.body
    )
    # Gradio puts formulas into the page as HTML.
    body = re.sub("[&<>\"']", lambda found: f"&#{ord(found[0])};", body)
    closing = span.text[-len(span.delimiter) :]
    return span.delimiter + mark + body + mark + closing


class _TextWriter:
    """Guards Markdown text; remembers across spans whether `**` is open."""

    def __init__(self) -> None:
        self.previous = ""
        self.bold = False

    def render(self, text: str, following: str) -> str:
        def guard(found: re.Match[str]) -> str:
            if found["before"]:
                return _part(found)
            if found["ticks"]:
                # No fence, for there is a backtick behind it, which may be in a formula.
                return GUARD + found[0]
            if found["stars"]:
                before = text[found.start() - 1] if found.start() else self.previous
                after = text[found.end()] if found.end() < len(text) else following
                return self._stars(found[0], before, after)
            if found["blank"]:
                self.bold = False
            return found[0]

        return _GUARDED.sub(guard, text)

    def _stars(self, stars: str, before: str, after: str) -> str:
        """Let `**` work between CJK letters and punctuation, where CommonMark does not."""
        self.bold = not self.bold
        if self.bold and _is_cjk(before) and _is_punctuation(after):
            return stars + GUARD
        if not self.bold and _is_punctuation(before) and _is_cjk(after):
            return GUARD + stars
        return stars


def _is_cjk(character: str) -> bool:
    return character >= "\u2e80" and character.isalpha()


def _is_punctuation(character: str) -> bool:
    return character != "" and unicodedata.category(character)[0] in "PS"


def _render_fence(fence: Fence, text: str) -> str:
    lines = split_lines(text)
    last = len(lines) - 1 if fence.closed else len(lines)
    output = [_render_opening(fence, lines[0])]
    for index, line in enumerate(lines[1:], start=1):
        if index == last and not fence.quoted:
            pad = fence.indent - columns(indentation(line))
            if pad > 0:  # a mark on this line would keep it from closing the block
                output[-1] = _before_end(output[-1], GUARD * pad)
                line = " " * pad + line
            output.append(line)
        elif index == last:
            output.append(line)
        else:
            output.append(_render_code_line(fence, line))
    return "".join(output)


def _render_opening(fence: Fence, line: str) -> str:
    start = len(fence.prefix) + len(fence.run)
    info = line[start:] if fence.sure else _NEVER.sub(_part, line[start:])
    if fence.tag:
        name = _HIGHLIGHTERS.get(fence.tag.lower(), "text")
        if name != fence.tag:
            blank = indentation(info)
            info = f"{blank}{name} {INSERTED}{info[len(blank) :]}"
    line = line[:start] + info
    # Without an end of line marked takes it for a part of the paragraph above.
    return line if line[-1] in "\r\n" else f"{line}\n{INSERTED}{INSERTED}"


def _render_code_line(fence: Fence, line: str) -> str:
    width = columns(indentation(line))
    if not line.strip(" \t\r\n"):
        return line
    if not fence.sure:
        line = _NEVER.sub(_part, line)
    if fence.quoted or not fence.sure or width > fence.indent > 0:
        # Nobody may take this line for the block's end, nor for another block.
        line = _FENCE_LIKE.sub(GUARD, line, count=1)
    if not fence.quoted and width < fence.indent:
        # A line that is indented less would end the list item and the block with it.
        line = " " * fence.indent + INSERTED + line
    return line


def _before_end(line: str, mark: str) -> str:
    content = line.rstrip("\r\n")
    return content + mark + line[len(content) :]
