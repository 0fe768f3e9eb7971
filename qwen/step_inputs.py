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
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._numbers_and_positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._numbers, self.positions = self._numbers_and_positions
        # Written on the CPU, from where they cross at once without waiting.
        self._staged = torch.zeros(2, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._has_crossed: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._has_crossed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._inv_freq = table.inv_freq.repeat(rows, 1)
        self._tables: list[RotaryTable | None] = [None] * rows
        self._scale, self._logn_length = table.scale, table.logn_length

    def write(
        self, pieces: Mapping[int, Piece], used: Sequence[KvSlot], tokens: Tensor | None
    ) -> None:
        """Write the next step's.

        A row without a token writes to the next free position of its slot, where it does no harm.

        Args:
            pieces: By their rows.
            used: All slots.
            tokens: (n,), int64, on the device: those that are read; the pieces' ids are places in
                it. None reads the ids.
        """
        numbers, positions = [0] * len(self._tables), [0] * len(self._tables)
        positions[: len(used)] = [slot.length for slot in used[: len(self._tables)]]
        for row, piece in pieces.items():
            (numbers[row],) = piece.ids
            table = piece.sequence.table
            if self._tables[row] is not table:
                self._tables[row] = table
                self._inv_freq[row].copy_(table.inv_freq)
        if self._has_crossed is not None:
            self._has_crossed.synchronize()  # what was written before
        self._staged.numpy()[:] = numbers, positions
        self._numbers_and_positions.copy_(self._staged, non_blocking=True)
        if self._has_crossed is not None:
            self._has_crossed.record()
        if tokens is None:
            self.ids.copy_(self._numbers)
        else:
            torch.index_select(tokens, 0, self._numbers, out=self.ids)

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
