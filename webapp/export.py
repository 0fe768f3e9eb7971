r"""A conversation -> one self-contained HTML file, JSON, or Markdown.

Formulas become MathML (latex2mathml, through mdtex2html), so that the HTML needs no script and no
network; nh3 sanitises it, and its content-security policy forbids both. Code, formulas and text
are told apart by `webapp.spans` alone: mdtex2html would take prices for formulas.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from html import escape

from qwen.messages import Message
from qwen.transcript import Transcript, export_json
from webapp.spans import Span, closing_fence, split_spans

__all__ = ["Transcript", "export_html", "export_json", "export_markdown", "render_html"]

_ROLES = {"user": "You", "assistant": "Assistant", "system": "System"}

_MATHML_TAGS = frozenset(
    {"math", "mrow", "mi", "mo", "mn", "mtext", "mspace", "ms", "mfrac", "msqrt", "mroot", "msub"}
    | {"msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts", "none"}
    | {"mtable", "mtr", "mtd", "mlabeledtr", "mpadded", "mphantom", "menclose", "mstyle"}
)
_MATHML_ATTRIBUTES = frozenset(
    {"display", "mathvariant", "mathsize", "mathcolor", "stretchy", "fence", "form", "separator"}
    | {"lspace", "rspace", "minsize", "maxsize", "symmetric", "largeop", "movablelimits", "accent"}
    | {"accentunder", "displaystyle", "scriptlevel", "linethickness", "notation", "width", "height"}
    | {"depth", "voffset", "columnalign", "columnspacing", "columnlines", "rowspacing", "rowlines"}
)

# Python-Markdown wants an empty line before a list or a table; replies seldom have one.
_CROWDED = re.compile(
    r"(?m)^(?![ >]*(?:[-*+]|[0-9]+[.)])[ \t])([^|\n]*[^|\s][^|\n]*)\n"
    r"(?=[ ]{0,3}(?:[-*+]|1[.)])[ ]|[ ]{0,3}\|)"
)
# Escaped dollars, tags, images, and all brackets that are not those of a web or mail link.
_INERT = re.compile(
    r"\\\$|[$`]|\\(?=[()\[\]])|<(?!https?://[^\s<>]+>)(?=[A-Za-z/!?])"
    r"|!?\[(?![^\[\]\n]*\]\(<?(?:https?://|mailto:))|!(?=\[)"
)
_QUOTE_PREFIX = re.compile(r"(?<=\n)[ \t]*(?:>[ \t]?)+")
_LIST_MARKER = re.compile(r"(?:[-*+]|([0-9]{1,9})[.)])[ ]+(.*)")

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f4f5f8; --faint: #667; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f4a; --soft: #1d2027; --faint: #99a; } }
body { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; line-height: 1.6;
  font-family: system-ui, "Noto Sans CJK SC", "Microsoft YaHei", "Hiragino Sans", sans-serif;
  overflow-wrap: anywhere; }
header, footer, .note, .role { color: var(--faint); font-size: 0.85rem; }
h1 { color: CanvasText; font-size: 1.5rem; margin-bottom: 0.2rem; }
article { border-top: 1px solid var(--line); padding: 0.6rem 0; }
article.user { background: var(--soft); padding-inline: 0.8rem; border-radius: 6px; }
.role { font-weight: 600; margin: 0.3rem 0; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.7rem; overflow-x: auto; }
code { font-family: ui-monospace, "Cascadia Mono", Menlo, monospace; font-size: 0.9em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.6rem; }
blockquote { border-left: 3px solid var(--line); margin-left: 0; padding-left: 1rem; }
math[display="block"] { overflow-x: auto; padding: 0.3rem 0; }
@media print { article { break-inside: avoid-page; } }
"""


def export_markdown(transcript: Transcript) -> str:
    """Return the conversation as Markdown: the raw texts under a heading for each speaker."""
    parts = [f"# {_one_line(transcript.title)}", _about(transcript)]
    if transcript.system_prompt:
        parts += ["## System", _closed(transcript.system_prompt)]
    for message, note in transcript.entries:
        parts += [f"## {_ROLES[message.role]}", _closed(message.content)]
        if note:
            parts.append(f"> {_one_line(note)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def export_html(transcript: Transcript) -> str:
    """Return the conversation as one HTML file without scripts and without outside resources."""
    title = escape(_one_line(transcript.title))
    entries = list(transcript.entries)
    if transcript.system_prompt:
        entries.insert(0, (Message("system", transcript.system_prompt), ""))
    articles = "\n".join(_article(message, note) for message, note in entries)
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>{escape(_about(transcript))}</header>
<main>
{articles}
</main>
</body>
</html>
"""


def _article(message: Message, note: str) -> str:
    role = message.role
    below = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<article class="{role}">\n<p class="role">{_ROLES[role]}</p>\n'
        f"{render_html(message.content)}{below}\n</article>"
    )


def _about(transcript: Transcript) -> str:
    return " · ".join(filter(None, (_one_line(transcript.model), transcript.created)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _closed(text: str) -> str:
    """Close a code block that the reply leaves open, so that it does not swallow what follows."""
    closing = closing_fence(text)
    return f"{text.rstrip()}\n{closing}" if closing else text.strip("\r\n")


def render_html(text: str) -> str:
    """Return a message's Markdown and LaTeX as sanitised HTML with MathML."""
    convert, formula = _load_converters()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    token = "qz"
    while token in text:
        token += "z"
    parts: list[str] = []
    blocks: list[str] = []
    for span in split_spans(text):
        if span.kind == "text":
            parts.append(span.text)
            continue
        place = f"{token}{len(blocks)}q"
        blocks.append(_block(span, formula))
        if span.fence is not None:
            # A paragraph of its own, where the block stood: in a list item or in a quote.
            before = "" if span.fence.prefix.strip() else "\n"
            parts.append(f"{before}{span.fence.prefix}{place}\n\n")
        else:
            parts.append(place)
    try:
        markdown = _realigned(_INERT.sub(_inert, "".join(parts)))
        html = convert(_CROWDED.sub(r"\1\n\n", markdown))
    except RecursionError:  # hundreds of nested quotes or lists
        return f"<pre>{escape(text)}</pre>"
    found = re.compile(rf"<p>{token}(\d+)q</p>|{token}(\d+)q")
    return _sanitized(found.sub(lambda match: blocks[int(match[1] or match[2])], html))


def _realigned(markdown: str) -> str:
    """Indent lists by the four spaces that Python-Markdown wants; models use two or three."""
    markers: list[int] = []  # the columns of the list markers that this line is under
    lines: list[str] = []
    after_blank = loose = False
    for line in markdown.expandtabs(4).split("\n"):
        text = line.lstrip(" ")
        if not text:
            after_blank = loose = True
            lines.append("")
            continue
        column = len(line) - len(text)
        marker = _LIST_MARKER.match(text)
        depth = len(markers)
        while markers and (marker or after_blank) and column < markers[-1] + 2:
            markers.pop()
        if loose and marker and len(markers) + 1 < depth:
            lines.append("")  # else the item becomes a part of the deeper one
        # Outside of a list nothing is code here: code has been taken out already.
        lines.append(
            " " * (4 * len(markers))
            + (f"{marker[1]}. {marker[2]}" if marker and marker[1] else text)
        )
        if marker:
            markers.append(column)
        loose = loose and bool(markers)
        after_blank = False
    return "\n".join(lines)


def _inert(found: re.Match[str]) -> str:
    """Write what Python-Markdown or mdtex2html would act upon as an entity."""
    text = found[0].removeprefix("\\") or found[0]
    return "".join(f"&#{ord(character)};" for character in text)


def _block(span: Span, formula: Callable[[str, bool], str]) -> str:
    if span.kind == "fence":
        return f"<pre><code>{escape(span.body)}</code></pre>"
    if span.kind == "code":
        return f"<code>{escape(span.body.strip() or span.body)}</code>"
    if span.kind == "source":
        return escape(span.text)
    try:
        return formula(span.body, span.is_display)
    except Exception:  # latex2mathml raises nearly anything on what it cannot read
        return f"<code>{escape(span.text)}</code>"


def _load_converters() -> tuple[Callable[[str], str], Callable[[str, bool], str]]:
    """Return Markdown -> HTML and (LaTeX, is display) -> MathML; neither is sanitised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mdtex2html 1.3.2 has invalid escape sequences
        import mdtex2html
        from latex2mathml.converter import convert as to_mathml
        from markdown.extensions.tables import TableExtension

    def formula(body: str, display: bool) -> str:
        if "\n>" in body:
            body = _QUOTE_PREFIX.sub("", body)
        mathml: str = to_mathml(body, display="block" if display else "inline")
        if "<mi>\\" in mathml:
            raise ValueError("an unknown command")
        return re.sub(
            r"(?s)(?<=<mtext>)(.*?)(?=</mtext>)",
            lambda found: found[0].replace("<", "&lt;").replace(">", "&gt;"),
            mathml,
        )

    tables = TableExtension(use_align_attribute=True)
    extensions = ["fenced_code", tables, "sane_lists", "nl2br"]
    return partial(mdtex2html.convert, extensions=extensions, splitParagraphs=False), formula


def _sanitized(html: str) -> str:
    import nh3

    attributes = {tag: set(names) for tag, names in nh3.ALLOWED_ATTRIBUTES.items() if tag != "img"}
    attributes |= {tag: set(_MATHML_ATTRIBUTES) for tag in _MATHML_TAGS}
    return nh3.clean(
        html,
        tags=(nh3.ALLOWED_TAGS - {"img", "area", "map"}) | _MATHML_TAGS,
        attributes=attributes,
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
    )
