"""`Proposals`: the next tokens of replies, chosen on the device, on their way to the host.

A GPU goes on with them before the host knows them. Knows neither models nor requests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qwen.attempt import attempt
from qwen.errors import QwenError
from qwen.sampling import Sampler, propose_rows

T = TypeVar("T")


class Proposals(Generic[T]):
    """What `qwen.sampling.propose_rows` computed for several groups of owners.

    Attributes:
        owners: Whose tokens they are.

    Args:
        groups: Owners and their rows, all on one device; at least one.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[T], Tensor]]) -> None:
        self.owners = [owner for owners, _ in groups for owner in owners]
        self._groups = groups
        flat = [rows.flatten() for _, rows in groups]
        self._arrive = _begin_copy(torch.cat(flat) if len(flat) > 1 else flat[0])

    def tokens(self) -> Tensor:
        """Return the owners' tokens, (owners,), int64, on the device."""
        tokens = [rows[:, 1] for _, rows in self._groups]
        return (torch.cat(tokens) if len(tokens) > 1 else tokens[0]).long()

    def __iter__(self) -> Iterator[tuple[T, list[float]]]:
        """Wait for the device; yield each owner and its row, for its sampler's `accept`."""
        values, first = self._arrive(), 0
        for owners, rows in self._groups:
            for owner in owners:
                yield owner, values[first : first + rows.shape[1]]
                first += rows.shape[1]


#: Owners whose samplers are alike, and what `propose_rows` computed for them.
Group = tuple[list[T], Tensor]


def propose(
    rows: Sequence[tuple[T, Sampler, Tensor]], *, by_kind: bool
) -> tuple[list[Group[T]], list[tuple[T, QwenError]]]:
    """Choose the next tokens of replies, without waiting for the device.

    Args:
        rows: Owners, their samplers, and their logits (vocab_size,).
        by_kind: Choose those with like samplers at once; else each by itself.

    Returns:
        What was chosen, and the owners for whom it could not be, with the reason.
    """
    alike: dict[Hashable, list[tuple[T, Sampler, Tensor]]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(row[1].key if by_kind else place, []).append(row)
    groups: list[Group[T]] = []
    failures: list[tuple[T, QwenError]] = []
    left = list(alike.values())
    for like in left:
        owners, samplers, logits = (list(column) for column in zip(*like, strict=True))
        chosen, failure = attempt(lambda: propose_rows(samplers, _stack(logits)))  # noqa: B023
        if chosen is not None:
            groups.append((owners, chosen))
        elif len(like) > 1:  # one of them may be the culprit
            left += [[row] for row in like]
        else:
            assert failure is not None
            failures.append((owners[0], failure))
    return groups, failures


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows; a single one is not copied."""
    return torch.stack(tuple(rows)) if len(rows) > 1 else rows[0][None]


def _begin_copy(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy to the host; returns what waits for it, and for nothing that comes later."""
    if not values.is_cuda:
        return values.tolist
    copied = values.to("cpu", non_blocking=True)  # into pinned memory
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def arrive() -> list[float]:
        event.synchronize()
        result: list[float] = copied.tolist()
        return result

    return arrive
