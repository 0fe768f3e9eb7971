"""Finished sequences kept for the next prompt that begins with the same tokens.

Least recently used, bounded by bytes. Knows no model: what is kept is opaque. Every method may be
called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeptSequence(Generic[T]):
    """A sequence and what was read of it.

    Attributes:
        ids: The tokens that were read, in order.
        key: What must be equal for the sequence to be of use, for example its NTK alpha.
        nbytes: Memory that it holds.
        state: The caller's.
    """

    ids: tuple[int, ...]
    key: object
    nbytes: int
    state: T


@dataclass(frozen=True, slots=True)
class FoundPrefix(Generic[T]):
    """A kept sequence that begins like a prompt.

    Attributes:
        num_common: Leading tokens that both share.
        is_taken: It is the caller's now; else it stays kept and may only be copied from, before
            anything else is asked of the cache.
    """

    kept: KeptSequence[T]
    num_common: int
    is_taken: bool


class PrefixCache(Generic[T]):
    """Keeps sequences up to a number of bytes.

    Args:
        max_bytes: What all kept sequences may hold together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: list[KeptSequence[T]] = []  # the least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        with self._lock:
            return self._held()

    def take(self, ids: Sequence[int], *, key: object) -> FoundPrefix[T] | None:
        """Find the sequence that shares the most leading tokens with a prompt.

        It is taken out, so that nobody shares it, unless the prompt has less than half of it: a
        stranger who has the same system prompt must not cost somebody their conversation.

        Args:
            ids: The prompt.
            key: See `KeptSequence`.

        Returns:
            None if no sequence shares a token.
        """
        with self._lock:
            best, most = None, 0
            for kept in self._kept:
                count = common_prefix(kept.ids, ids) if kept.key == key else 0
                if count >= max(most, 1):  # of equals the last, the most recent one
                    best, most = kept, count
            if best is None:
                return None
            is_taken = 2 * most >= len(best.ids)
            if is_taken:
                self._kept = [kept for kept in self._kept if kept is not best]
            return FoundPrefix(best, most, is_taken)

    def put(self, kept: KeptSequence[T]) -> None:
        """Keep a sequence and let go of the least recently used ones beyond the bound.

        A sequence that is the beginning of this one is of no more use and goes too.
        """
        if kept.nbytes > self._max_bytes or not kept.ids:
            return
        with self._lock:
            self._kept = [
                other
                for other in self._kept
                if other.key != kept.key or other.ids != kept.ids[: len(other.ids)]
            ]
            self._kept.append(kept)
            self._shrink(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Let go of the least recently used sequences beyond so many bytes."""
        with self._lock:
            self._shrink(max_bytes)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept = []

    def _shrink(self, max_bytes: int) -> None:
        while self._kept and self._held() > max_bytes:
            del self._kept[0]

    def _held(self) -> int:
        return sum(kept.nbytes for kept in self._kept)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the leading tokens that two sequences share."""
    shorter = min(len(first), len(second))
    if tuple(first[:shorter]) == tuple(second[:shorter]):
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])
