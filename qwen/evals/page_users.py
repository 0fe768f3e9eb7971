"""A user of the running web app, over HTTP as a browser would be one. Measures one reply."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qwen.errors import BackendFailed
from qwen.evals.streaming import SYSTEM, page_messages, send_event

#: How the page begins what it shows in small type: where a message stands, figures of a reply.
_NOTE = "<small"
_TOKENS = re.compile(r"([\d,]+) tokens? ·|([\d,]+) token\(s\) ·")


@dataclass(frozen=True, slots=True)
class PageReply:
    """What a user saw of one reply; times are seconds of the monotonic clock.

    Attributes:
        asked: When it was asked for.
        changes: When its text grew.
        ended: When it was whole.
        tokens: As its note says.
    """

    asked: float
    changes: tuple[float, ...]
    ended: float
    tokens: int

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return self.changes[0] - self.asked

    @property
    def speed(self) -> float:
        """Tokens per second after the first text."""
        return (self.tokens - 1) / (self.changes[-1] - self.changes[0])

    def pause(self, begin: float, end: float) -> float:
        """Return the longest time without new text within a span of time; 0 after the reply."""
        end = min(end, self.changes[-1])
        within = [begin, *(t for t in self.changes if begin <= t <= end), end]
        return max(after - before for before, after in pairwise(within)) if begin < end else 0.0


class PageUser:
    """Asks the page; each question in a session of its own. May be used from several threads.

    Args:
        url: Of the app, with a slash at its end.
    """

    def __init__(self, url: str) -> None:
        import httpx

        self._client = httpx.Client(
            base_url=url + "gradio_api/queue/",
            timeout=None,
            limits=httpx.Limits(max_connections=None),
        )
        self._event, self._chat = send_event(httpx.get(url + "config").json())

    def ask(
        self,
        question: str,
        tokens: int,
        *,
        seed: int = 1,
        leave_after: int = 0,
        pause: float = 0.0,
    ) -> PageReply:
        """Ask and read the reply.

        Args:
            question: The message.
            tokens: Of the reply at most.
            seed: Of its choices.
            leave_after: Close the connection after so many changes; 0 stays to the end.
            pause: Seconds that this reader lets pass before each further look.

        Raises:
            BackendFailed: The page shows no reply, or an error instead of its end.
        """
        page = uuid.uuid4().hex
        # The message, the browser's storage, the page's session, the controls in their order.
        values = [question, None, None, SYSTEM, 0.7, 0.8, 20, 1.05, tokens, seed]
        asked = time.monotonic()
        self._client.post(
            "join", json={"data": values, "fn_index": self._event, "session_hash": page}
        ).raise_for_status()
        changes: list[float] = []
        view, text = _View(), ""
        with self._client.stream("GET", "data", params={"session_hash": page}) as lines:
            for message in page_messages(lines.iter_lines()):
                if message["msg"] == "process_completed":
                    break
                time.sleep(pause)
                if message["msg"] != "process_generating":
                    continue
                shown = view.take(message["output"]["data"][self._chat])
                if shown and not shown.lstrip().startswith(_NOTE) and shown != text:
                    text = shown
                    changes.append(time.monotonic())
                    if len(changes) == leave_after:
                        return PageReply(asked, tuple(changes), changes[-1], 0)
        found = _TOKENS.search(text)
        if not changes or found is None:
            raise BackendFailed(f"The page ended a reply with: {view.text()[-200:] or 'nothing'}")
        count = int((found[1] or found[2]).replace(",", ""))
        return PageReply(asked, tuple(changes[:-1]) or (changes[0],), changes[-1], count)


class _View:
    """The chat as a browser has it: sent whole once, then as differences."""

    def __init__(self) -> None:
        self._value: Any = None

    def take(self, data: Any) -> str:
        """Take over what the page sent; return the text of a reply that is shown last."""
        from gradio_client.utils import apply_diff

        self._value = data if self._value is None else apply_diff(self._value, data)
        return self.text()

    def text(self) -> str:
        value = self._value
        if isinstance(value, dict):
            value = value.get("value")
        if not value or value[-1]["role"] != "assistant":
            return ""
        content = value[-1]["content"]
        return content if isinstance(content, str) else str(content[0].get("text", content))


def ask_at_once(user: PageUser, questions: Sequence[str], tokens: int) -> list[PageReply]:
    """Let as many users as there are questions ask at the same time."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: user.ask(question, tokens), questions))


def total_speed(replies: Sequence[PageReply]) -> float:
    """Return the tokens per second of all replies together, prompts included."""
    begun, ended = min(r.asked for r in replies), max(r.ended for r in replies)
    return sum(reply.tokens for reply in replies) / (ended - begun)
