"""Keys and values of one sequence, in memory that is allocated ahead.

Positions are written once and read in place; a longer sequence doubles the room. Knows no model and
no attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, empty, zeros

#: Positions that a store has room for at least, and by which it is rounded up.
BLOCK = 256

#: Positions that are copied whole: kernels keep them in an order of their own.
_COPIED = 16


class KvStore:
    """Rotated keys and values of all layers. Not for several threads at once.

    Args:
        num_layers: Of the model.
        num_kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        dtype: Of what is kept.
        device: Where it is kept.
        capacity: Positions to have room for from the start.
        max_capacity: Positions beyond which the store does not grow; None is no limit.
        is_blank: Fill unused room with zeros, for attention that reads it, masked: nothing times
            a chance NaN is NaN.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = BLOCK,
        max_capacity: int | None = None,
        is_blank: bool = False,
    ) -> None:
        self.length = 0
        #: Positions that will probably be wanted: doubling stops there.
        self.expected: int | None = None
        self._max_capacity = max_capacity
        self._allocate = zeros if is_blank else empty
        rounded = self._rounded(capacity)
        shape = (2, num_layers, num_kv_heads, rounded, head_dim)
        self._data = self._allocate(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._memory.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all room, used or not."""
        return self._memory.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (num_kv_heads, capacity, head_dim) each, to write to.

        Positions from `length` on hold nothing that means anything.
        """
        return self._memory[0, index], self._memory[1, index]

    def reserve(self, length: int) -> None:
        """Make room for so many positions; what `layer` returned before is then out of date.

        Raises:
            ValueError: The store may not grow so far.
        """
        if self._max_capacity is not None and length > self._max_capacity:
            raise ValueError(f"{length} positions in a store of at most {self._max_capacity}")
        if length <= self.capacity:
            return
        shape = list(self._data.shape)
        doubled = 2 * self.capacity
        if self.expected is not None:
            doubled = min(doubled, self.expected)
        shape[3] = self._rounded(max(length, doubled))
        grown = self._allocate(shape, dtype=self._data.dtype, device=self._data.device)
        copied = _whole(self.length)
        grown[:, :, :, :copied] = self._data[:, :, :, :copied]
        self._data = grown

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; the room is kept."""
        assert 0 <= length <= self.length
        self.length = length

    def copy(self, length: int | None = None) -> KvStore:
        """Return a store with the same first positions, all by default, and room for few more."""
        length = self.length if length is None else length
        memory = self._memory
        _, num_layers, num_kv_heads, _, head_dim = memory.shape
        other = KvStore(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=memory.dtype,
            device=memory.device,
            capacity=max(length, 1),
            max_capacity=self._max_capacity,
        )
        other.assign(self, length)
        return other

    def assign(self, other: KvStore, length: int) -> None:
        """Take over the first `length` positions of a store of the same model."""
        assert 0 <= length <= other.length
        self.length = 0
        self.reserve(length)
        copied = _whole(length)
        self._memory[:, :, :, :copied] = other._memory[:, :, :, :copied]
        self.length = length

    @property
    def place(self) -> int:
        """Where the memory begins; another number after the store has grown."""
        return self._memory.data_ptr()

    @property
    def _memory(self) -> Tensor:
        """(2, num_layers, num_kv_heads, capacity, head_dim), keys first."""
        return self._data

    def _rounded(self, length: int) -> int:
        return rounded_capacity(length, self._max_capacity)


def rounded_capacity(length: int, max_capacity: int | None) -> int:
    """Round positions up to whole blocks, up to the most that there may be."""
    rounded = -(-length // BLOCK) * BLOCK
    return rounded if max_capacity is None else min(rounded, _whole(max_capacity))


def _whole(length: int) -> int:
    return -(-length // _COPIED) * _COPIED
