"""What the next step of the decode loop reads: of which running requests, how many tokens."""

from __future__ import annotations

from collections.abc import Sequence

from qwen.messages import FinishReason
from qwen.reply_steps import Request
from qwen.sequence import SequenceState


class Running:
    """A request that has its turn, and its sequence.

    Attributes:
        quantum: Tokens of its prompt that may still be read before the next prompt's turn.
        ending: Why its reply, which is complete, ends as soon as its last token is read.
        is_read_ahead: Whether its tokens may be read before the host knows them.
    """

    def __init__(self, request: Request, state: SequenceState, *, quantum: int) -> None:
        self.request, self.state, self.quantum = request, state, quantum
        self.ending: FinishReason | None = None
        self.is_read_ahead = True

    @property
    def can_read_ahead(self) -> bool:
        """Whether another token will follow the next one."""
        return self.is_read_ahead and self.request.num_tokens + 1 < self.request.max_tokens


def plan_step(
    running: Sequence[Running], *, chunk: int, budget: int, is_exact: bool
) -> tuple[list[tuple[Running, int]], list[tuple[Running, int]]]:
    """Choose what is read.

    Replies come first. What prompts may take beside them goes to one after the other, so that
    short ones are through soon.

    Args:
        running: In the order of their turns.
        chunk: Tokens of a prompt that are read at once.
        budget: Tokens of all prompts that may be read in this step.
        is_exact: See `qwen.readers.Readers`.

    Returns:
        Replies, one token of each, and prompts with so many tokens.
    """
    replies = [(each, 1) for each in running if each.state.num_unread == 1]
    prompts: list[tuple[Running, int]] = []
    for each in running:
        if each.state.num_unread <= 1:  # none: read ahead
            continue
        size = min(each.state.num_unread, chunk)
        if size > budget:
            # Forms that are not exact reuse whole chunks only, so they are not cut further.
            if prompts and not is_exact:
                break
            size = budget
        if size < 1:
            break
        prompts.append((each, size))
        budget -= size
    return replies, prompts
