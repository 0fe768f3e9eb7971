"""Tokens and their log-probabilities, until the text that they stand behind is shown.

A token may be held back with a character that is incomplete or with what may become a stop string;
its log-probability would tell what it is. Pure; knows no tokenizer and no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token, and how many characters of the reply stand before it."""

    start: int
    token_id: int
    logprobs: TokenLogprobs


class TokenLog:
    """Holds one reply's tokens back for as long as their text is."""

    def __init__(self) -> None:
        self._held: deque[LoggedToken] = deque()
        self._decoded = 0
        self._shown = 0

    def add(self, token_id: int, logprobs: TokenLogprobs) -> None:
        """Add the next token, before its text passes `count`."""
        self._held.append(LoggedToken(self._decoded, token_id, logprobs))

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        """Pass the decoded texts on, of which every token adds one."""
        for text in texts:
            self._decoded += len(text)
            yield text

    def show(self, text: str) -> tuple[LoggedToken, ...]:
        """Return the tokens behind a text that is now shown, in part or as a whole."""
        self._shown += len(text)
        return tuple(self._take(before=self._shown))

    def rest(self) -> tuple[LoggedToken, ...]:
        """Return the tokens that are left, of a reply that did not end at a stop string."""
        return tuple(self._take(before=self._decoded + 1))

    def _take(self, *, before: int) -> Iterator[LoggedToken]:
        while self._held and self._held[0].start < before:
            yield self._held.popleft()
