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
        self._both = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.ids, self.positions = self._both[0], self._both[1]
        # Written on the CPU, from where they cross at once without waiting.
        self._staged = torch.zeros(2, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host = self._staged.numpy()
        self._inv_freq = table.inv_freq.repeat(rows, 1)
        self._tables: list[RotaryTable | None] = [None] * rows
        self._scale, self._logn_length = table.scale, table.logn_length

    def write(self, pieces: Mapping[int, Piece], used: Sequence[KvSlot]) -> None:
        """Write the next step's.

        A row without a token writes to the next free position of its slot, where it does no harm.
        """
        ids, positions = [0] * len(self._tables), [0] * len(self._tables)
        positions[: len(used)] = [slot.length for slot in used[: len(self._tables)]]
        for row, piece in pieces.items():
            (ids[row],) = piece.ids
            table = piece.sequence.table
            if self._tables[row] is not table:
                self._tables[row] = table
                self._inv_freq[row].copy_(table.inv_freq)
        self._host[:] = ids, positions
        self._both.copy_(self._staged, non_blocking=True)

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
