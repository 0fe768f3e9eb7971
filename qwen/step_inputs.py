"""`StepInputs`: what differs from step to step of a CUDA graph, in places that stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qwen.decoder import Piece, RotaryTable
from qwen.decoder_ops import Rotation
from qwen.kv_slots import KvSlot
from qwen.rope import logn_factor, rotary_tables

#: What computes as `compute_rotation` does.
ComputeRotation = Callable[[Tensor, Tensor, float, int | None], Rotation]


class StepInputs:
    """Tokens, positions and frequencies of a step's rows.

    Attributes:
        ids: (rows,), int64; likewise `positions`.

    Args:
        rows: Of the step.
        table: Of any sequence of the model.
    """

    def __init__(self, rows: int, table: RotaryTable) -> None:
        device = table.inv_freq.device
        self._all = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.ids, self.positions, self._places = self._all
        # Written on the CPU, from where they cross at once without waiting; the next step's are
        # written while these may still cross.
        is_pinned = device.type == "cuda"
        self._staged = [
            torch.zeros(3, rows, dtype=torch.int64, pin_memory=is_pinned) for _ in range(2)
        ]
        self._inv_freq = table.inv_freq.repeat(rows, 1)
        self._tables: list[RotaryTable | None] = [None] * rows
        self._scale, self._logn_length = table.scale, table.logn_length

    def write(
        self, pieces: Mapping[int, Piece], used: Sequence[KvSlot], tokens: Tensor | None
    ) -> None:
        """Write the next step's.

        A row without a token writes to the next free position of its slot, where it does no harm.

        Args:
            pieces: By their rows; without ids if the tokens are on the device.
            used: All slots.
            tokens: (pieces,), int64, in the order of the pieces; None takes their ids.
        """
        ids, positions, places = ([0] * len(self._tables) for _ in range(3))
        positions[: len(used)] = [slot.length for slot in used[: len(self._tables)]]
        for place, (row, piece) in enumerate(pieces.items()):
            if tokens is None:
                (ids[row],) = piece.ids
            places[row] = place
            table = piece.sequence.table
            if self._tables[row] is not table:
                self._tables[row] = table
                self._inv_freq[row].copy_(table.inv_freq)
        self._staged.reverse()
        self._staged[0].numpy()[:] = ids, positions, places
        self._all.copy_(self._staged[0], non_blocking=True)
        if tokens is not None:
            torch.index_select(tokens, 0, self._places, out=self.ids)

    def rotation(self, compute: ComputeRotation) -> Rotation:
        """Compute how the tokens are rotated."""
        return compute(self.positions, self._inv_freq, self._scale, self._logn_length)


def compute_rotation(
    positions: Tensor, inv_freq: Tensor, scale: float, logn_length: int | None
) -> Rotation:
    """Compute how one token a row is rotated.

    Args:
        positions: (rows,).
        inv_freq: (rows, rotary_dim / 2).
        scale: See `RotaryTable`.
        logn_length: Likewise.
    """
    cos, sin = rotary_tables(positions[:, None], inv_freq)
    logn = None if logn_length is None else logn_factor(positions, logn_length)
    return Rotation(positions, cos[:, 0] * scale, sin[:, 0] * scale, logn)
