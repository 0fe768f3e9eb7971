"""What the page displays, made from plain values: chat messages, notes, the strips of HTML.

Pure functions; knows the words and the conversation, neither Gradio nor the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from qwen.backend import BackendInfo, LoadStatus, MemoryUse
from qwen.messages import ContextUsage, Message, QueuePlace
from webapp.conversation import Conversation, Node, ReplyNote
from webapp.render import render_note, render_reply
from webapp.text import Words

#: Characters of a dropped message that the context bar quotes.
QUOTED_CHARACTERS = 40
#: Messages that are shown at first; a long history costs the browser at every step of a reply.
WINDOW = 50


class Bubbles:
    """What the shown messages of one page look like: each is rendered once while it stays."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._known: dict[Node, str] = {}

    def of(self, path: Sequence[Node]) -> list[str]:
        """Return the guarded Markdown of finished messages, with their notes."""
        known = self._known
        self._known = {
            node: known[node]
            if node in known
            else render_reply(node.content) + _note(node, self._words)
            for node in path
        }
        return list(self._known.values())


def chat_messages(
    conversation: Conversation,
    words: Words,
    *,
    window: int,
    notice: str = "",
    growing: bool = False,
    bubbles: Bubbles | None = None,
) -> list[dict[str, Any]]:
    """Return the last `window` shown messages in the form that Gradio's Chatbot takes.

    Args:
        conversation: Whose path is shown.
        words: The language of the notes.
        window: How many messages to show at most.
        notice: A sentence under the last message, in a bubble of its own after a question.
        growing: The last reply is still being written, so it has no note yet.
        bubbles: Remembers from one call to the next what has been rendered.
    """
    path = conversation.path[-window:]
    last = path[-1] if path else None
    is_open = last is not None and last.role == "assistant" and bool(growing or notice)
    finished = path[:-1] if is_open else path
    texts = (bubbles or Bubbles(words)).of(finished)
    shown = [_bubble(node.role, text) for node, text in zip(finished, texts, strict=True)]
    if last is None:
        return shown
    if is_open:
        note = render_note(notice, after=last.content) if notice else ""
        shown.append(_bubble("assistant", render_reply(last.content) + note))
    elif last.role == "user" and (notice or not growing):
        shown.append(_bubble("assistant", render_note(notice or words("no_reply_yet"))))
    return shown


def _bubble(role: str, content: str) -> dict[str, Any]:
    # As Gradio sends it, since replies skip its conversion (`webapp.ui`); in the other events a
    # plain string would lose its indentation.
    text = {"type": "text", "text": content}
    return {"role": role, "content": [text], "metadata": None, "options": None}


def _note(node: Node, words: Words) -> str:
    if node.role == "user":
        return ""
    if node.note is None:
        return render_note(words("interrupted"), after=node.content)
    return render_note(note_text(node.note, words), after=node.content)


def note_text(note: ReplyNote, words: Words) -> str:
    """Return the line under a reply: tokens, speed, time to first token, why it ended."""
    line = words(
        "note" if note.tokens > 1 else "note_short",
        tokens=f"{note.tokens:,}",
        speed=f"{note.tokens_per_second:.1f}",
        first=f"{note.time_to_first_token:.1f}",
        finish=words(f"finish_{note.finish_reason}"),
    )
    if note.dropped:
        line += " · " + words("note_dropped", count=note.dropped)
    return line


def status_html(status: LoadStatus, info: BackendInfo | None, words: Words) -> str:
    """Return the strip under the title: progress of loading, an error, or the model's name."""
    if status.stage == "failed" and status.error is not None:
        return _strip("failed", f"<b>{words('failed')}.</b> {escape(str(status.error))}", "alert")
    if info is None:
        return _strip("loading", _progress(status, words), "status")
    facts = [info.name, info.device, info.dtype]
    if info.context_length:
        facts.append(words("context_tokens", count=f"{info.context_length:,}"))
    lines = [
        " · ".join(escape(fact) for fact in facts if fact),
        *(escape(line) for line in info.notices),
    ]
    memory = "" if info.memory is None else _memory(info.memory, words)
    return _strip("ready", "<br>".join(lines) + memory, "status")


def _memory(use: MemoryUse, words: Words) -> str:
    working = use.activations + use.program
    needed = use.weights + use.cache + working
    parts = words(
        "memory_parts",
        weights=_gigabytes(use.weights),
        cache=_gigabytes(use.cache),
        working=_gigabytes(working),
        context=f"{use.context:,}",
        free=_gigabytes(use.free),
    )
    title = words("memory", needed=_gigabytes(needed), free=_gigabytes(use.free))
    return f"<details><summary>{title}</summary>{parts}</details>"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _progress(status: LoadStatus, words: Words) -> str:
    amount, bar = "", "<progress></progress>"
    if status.total:
        bar = f'<progress value="{status.done}" max="{status.total}"></progress>'
        amount = f" {status.done * 100 // status.total} %"
        if status.unit == "bytes":
            amount += f" ({status.done / 1e6:,.0f} / {status.total / 1e6:,.0f} MB)"
    step = f"{words('loading')}: {escape(status.step)}{amount} · {status.seconds:.0f} s"
    return f"{bar}<div>{step}<br><small>{words('loading_hint')}</small></div>"


def loading_text(status: LoadStatus, words: Words) -> str:
    """Return one line about loading, for the bubble of a message that waits for the model."""
    percent = f" {status.done * 100 // status.total} %" if status.total else ""
    return f"{words('loading')}: {status.step}{percent} · {status.seconds:.0f} s"


def queue_text(place: QueuePlace, words: Words) -> str:
    """Return one line for the bubble of a message that waits for its turn."""
    if place.position == 0:
        return words("waiting")
    return words("queued", position=place.position, seconds=max(round(place.seconds), 1))


def notice_html(notice: str) -> str:
    """Return the strip above the message box that says what went wrong, or nothing."""
    return _strip("failed", escape(notice), "alert") if notice else ""


def ended_html(seconds: float) -> str:
    """Return a mark that nobody sees: `page.js` tells the other tabs when it changes."""
    return f'<i data-ended="{seconds}"></i>'


def _strip(kind: str, inner: str, role: str) -> str:
    return f'<div class="strip {kind}" role="{role}">{inner}</div>'


def context_html(usage: ContextUsage | None, words: Words) -> str:
    """Return the context bar: what fills the context, what is left, which turns drop out."""
    if usage is None:
        return ""
    parts: tuple[tuple[str, int, str], ...] = (
        ("system", usage.system, words("context_system")),
        ("history", usage.history, words("context_history")),
        ("query", usage.query, words("context_query")),
    )
    about = "≈ " if usage.is_estimate else ""
    limit = usage.total or max(usage.prompt, 1)
    bars = "".join(
        f'<span class="part {kind}" style="width:{min(count / limit, 1) * 100:.3f}%"></span>'
        for kind, count, _ in parts
    )
    legend = "".join(
        f'<span class="key {kind}">{label} {about}{count:,}</span>' for kind, count, label in parts
    )
    left = words("context_left", left=f"{about}{usage.left:,}", limit=f"{usage.total:,}")
    if not usage.total:
        left = ""  # a remote engine does not tell
    if usage.limit < usage.total:
        left += " · " + words("context_budget", limit=f"{usage.limit:,}")
    return (
        f'<div class="context" title="{escape(left)}"><div class="bar">{bars}</div>'
        f'<div class="legend">{legend}<span class="key left">{left}</span></div>'
        f"{_ntk_html(usage.ntk_alpha, words)}{_dropped_html(usage.dropped, words)}</div>"
    )


def _ntk_html(alpha: int, words: Words) -> str:
    return f'<div class="ntk">{words("context_ntk", alpha=alpha)}</div>' if alpha > 1 else ""


def _dropped_html(dropped: tuple[Message, ...], words: Words) -> str:
    if not dropped:
        return ""
    named = [f"“{escape(_quote(message.content))}”" for message in dropped[:4]]
    more = " …" if len(dropped) > len(named) else ""
    title = words("context_dropped", count=len(dropped))
    return f'<div class="dropped" role="status">{title} {", ".join(named)}{more}</div>'


def _quote(text: str) -> str:
    line = " ".join(text[: QUOTED_CHARACTERS * 4].split())
    return line if len(line) <= QUOTED_CHARACTERS else line[:QUOTED_CHARACTERS] + "…"


def fork_choices(conversation: Conversation) -> list[tuple[str, int]]:
    """Return (label, node id) for every shown message that has other versions."""
    place = {node.id: number for number, node in enumerate(conversation.path, start=1)}
    return [
        (f"{place[node_id]}: {_quote(conversation.node(node_id).content)}", node_id)
        for node_id in conversation.forks
    ]


def version_text(conversation: Conversation, node_id: int | None, words: Words) -> str:
    """Return "Version 2 of 3" for a message, or nothing without other versions."""
    if node_id is None:
        return ""
    versions = conversation.siblings(node_id)
    return words("version", place=versions.index(node_id) + 1, count=len(versions))
