"""How long things take lately: tokens, turns; and what follows for prompts and for the queue.

Plain arithmetic on averages that forget; knows no model. The loop's thread takes notes; estimates
may be asked for by any.
"""

from __future__ import annotations

#: Seconds that a step may take while replies are being written: less than half of the pause that a
#: reader of a stream may notice (0.3 s), for a machine that just then is slower.
STEP_SECONDS = 0.12

#: Tokens of prompts that a step reads at least, however slow the machine is. A step of fewer tokens
#: waits for the weights rather than computes, so it says nothing about what a token costs.
MIN_PROMPT_TOKENS = 16

#: Before anything was measured: seconds of a token and of a turn.
_FIRST_TOKEN_SECONDS, _FIRST_TURN_SECONDS = 0.006, 10.0

#: Share of the newest measurement in an average, and where it shows that tokens take longer now.
_NEWEST, _NEWEST_SLOWER = 0.2, 0.5


class Pace:
    """What was measured lately."""

    def __init__(self) -> None:
        self._token_seconds = _FIRST_TOKEN_SECONDS
        self._turn_seconds = _FIRST_TURN_SECONDS

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step that read so many tokens."""
        if num_tokens >= MIN_PROMPT_TOKENS:
            change = seconds / num_tokens - self._token_seconds
            self._token_seconds += change * (_NEWEST_SLOWER if change > 0 else _NEWEST)

    def note_turn(self, seconds: float) -> None:
        """Take note of a request that ran so long."""
        self._turn_seconds += _NEWEST * (seconds - self._turn_seconds)

    def prompt_tokens(self, num_replies: int) -> int:
        """Return how many tokens of prompts a step may read beside so many replies."""
        fitting = int(STEP_SECONDS / max(self._token_seconds, 1e-6)) - num_replies
        return max(fitting, MIN_PROMPT_TOKENS)

    def wait_seconds(self, position: int, num_running: int) -> float:
        """Estimate when the request at a place of the queue begins, from 1."""
        return position * self._turn_seconds / max(num_running, 1)
