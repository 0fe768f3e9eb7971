"""`Proposals`: the next tokens of replies, chosen on the device, on their way to the host.

A GPU goes on with them before the host knows them. Knows no model and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

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
