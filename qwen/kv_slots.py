"""Keys and values of several sequences side by side in one memory, for a step that reads them all.

Each sequence has a slot; the used slots are always the first ones, without a gap. All slots have
the same room, which doubles when one sequence needs more, but not beyond what is expected of any,
and so does their number. What only sequences needed that have left is given back when something
grows. Knows no model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, zeros

from qwen.kv_store import KvStore, rounded_capacity


class KvSlots:
    """The memory. Not for several threads at once.

    Args:
        num_layers: Of the model.
        num_kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        dtype: Of what is kept.
        device: Where it is kept.
        capacity: Positions of each slot to have room for from the start.
        max_capacity: See `KvStore`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        max_capacity: int | None = None,
    ) -> None:
        self.max_capacity = max_capacity
        self._used: list[KvSlot] = []
        self._first_capacity = capacity = rounded_capacity(capacity, max_capacity)
        # Blank, for attention that reads unused room, masked: nothing times a chance NaN is NaN.
        shape = (2, num_layers, 1, num_kv_heads, capacity, head_dim)
        self.data = zeros(shape, dtype=dtype, device=device)

    @property
    def used(self) -> tuple[KvSlot, ...]:
        """The slots that sequences have, by their index."""
        return tuple(self._used)

    @property
    def capacity(self) -> int:
        """Positions that every slot has room for."""
        return self.data.shape[4]

    @property
    def place(self) -> int:
        """Where the memory begins; another number after it has grown."""
        return self.data.data_ptr()

    def layer(self, index: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (count, num_kv_heads, capacity, head_dim) each.

        Args:
            index: Of the layer.
            count: Of the first slots; None is all that there is memory for.
        """
        return self.data[0, index, :count], self.data[1, index, :count]

    def offset(self, slot: KvSlot) -> int:
        """Return how many rows of a layer's memory, (…, head_dim), lie before a slot."""
        kv_heads, capacity = self.data.shape[3:5]
        return slot.index * kv_heads * capacity

    def take(self, capacity: int) -> KvSlot:
        """Give a sequence a slot with room for so many positions."""
        self.grow(len(self._used) + 1, capacity)
        slot = KvSlot(self, len(self._used))
        self._used.append(slot)
        return slot

    def release(self, slot: KvSlot) -> None:
        """Take a slot back; the last sequence moves into the gap."""
        last = self._used.pop()
        if last is not slot:
            self._used[slot.index] = last
            target = self.data[:, :, slot.index, :, : last.length]
            target.copy_(self.data[:, :, last.index, :, : last.length])
            last.index, slot.index = slot.index, last.index
        # What is left behind is masked, but no NaN may be among it.
        self.data[:, :, slot.index].zero_()

    def grow(self, slots: int, capacity: int) -> None:
        """Have so many slots and positions at least.

        Raises:
            ValueError: The memory may not grow so far.
        """
        if self.max_capacity is not None and capacity > self.max_capacity:
            raise ValueError(f"{capacity} positions in slots of at most {self.max_capacity}")
        old, used = self.data, self._used
        if slots <= old.shape[2] and capacity <= old.shape[4]:
            return
        shape = list(old.shape)
        shape[2] = 1 << (max(slots, len(used)) - 1).bit_length()
        longest = max((slot.length for slot in used), default=0)
        expected = max((slot.expected or math.inf for slot in used), default=math.inf)
        usual = 2 * old.shape[4] if capacity > old.shape[4] else old.shape[4]
        wanted = int(min(usual, max(expected, self._first_capacity)))
        # One more than the longest has, whatever it said: where its next one is written.
        shape[4] = rounded_capacity(max(capacity, longest + 1, wanted), self.max_capacity)
        self.data = zeros(shape, dtype=old.dtype, device=old.device)
        self.data[:, :, : len(used), :, :longest] = old[:, :, : len(used), :, :longest]


class KvSlot(KvStore):
    """A sequence's part of `KvSlots`."""

    def __init__(self, slots: KvSlots, index: int) -> None:
        self.length, self.index = 0, index
        self.expected = None
        self._slots, self._max_capacity = slots, slots.max_capacity

    def reserve(self, length: int) -> None:
        """See `KvStore.reserve`; all slots grow."""
        self._slots.grow(1, length)

    @property
    def place(self) -> int:
        """See `KvStore.place`."""
        return self._slots.place

    @property
    def _memory(self) -> Tensor:
        return self._slots.data[:, :, self.index]
