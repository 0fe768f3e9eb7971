"""How much is served at a time: one frozen value. Knows no model and no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What one server takes on at once.

    Attributes:
        max_running: Replies that are written at the same time; None is 8 on a CPU and 32 on a GPU.
        max_waiting: Requests that may wait behind them; one more is refused.
        cache_bytes: Memory for keys and values of running and of kept sequences together; None is
            enough for one whole context and 512 MiB more, and on a GPU at least half of what is
            free once the model is loaded.
    """

    max_running: int | None = None
    max_waiting: int = 64
    cache_bytes: int | None = None


DEFAULT_LIMITS = ServingLimits()
