"""What the CPU kernels are given: plain values, and the C structures made of them.

A structure holds places in memory, not the tensors: whoever makes one keeps those. Knows no kernel
and no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_P, _L = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The next tokens of one sequence.

    Attributes:
        tokens: How many.
        start: Position of the first one.
        keys: (kv_heads, capacity, `CpuKernels.position_room`), int16, in the kernels' own order
            within each `position_block`; written from `start` on. The capacity is whole blocks.
        values: As `keys`.
        cos: (tokens, rotary_dim).
        sin: As `cos`.
        logn: (tokens,), factors of the queries; None is 1.
    """

    tokens: int
    start: int
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    logn: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer: weights of `CpuKernels.pack`, and a bias (outputs,) or none."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    outputs: int
    inputs: int


class CHeads(ctypes.Structure):
    """`Heads`: how many of queries and of keys, and the size of one."""

    _fields_ = (("queries", _L), ("keys", _L), ("dim", _L))


class CSequence(ctypes.Structure):
    """`Sequence`: see `NewTokens`."""

    _fields_ = (
        *(("tokens", _L), ("start", _L), ("capacity", _L), ("keys", _P), ("values", _P)),
        *(("cos", _P), ("sin", _P), ("logn", _P)),
    )

    @classmethod
    def of(cls, new: NewTokens) -> CSequence:
        """Point at new tokens."""
        tensors = new.keys, new.values, new.cos, new.sin, new.logn
        return cls(new.tokens, new.start, new.keys.shape[1], *map(_place, tensors))


class CWeights(ctypes.Structure):
    """`Weights`: see `PackedLinear`."""

    _fields_ = (("packed", _P), ("scales", _P), ("bias", _P), ("outputs", _L), ("inputs", _L))

    @classmethod
    def of(cls, linear: PackedLinear) -> CWeights:
        """Point at a linear layer."""
        tensors = linear.packed, linear.scales, linear.bias
        return cls(*map(_place, tensors), linear.outputs, linear.inputs)


class CLayer(ctypes.Structure):
    """`Layer`: see `KernelLayers`."""

    _fields_ = (
        *(("input_norm", _P), ("mlp_norm", _P), ("qkv", CWeights), ("attention_output", CWeights)),
        *(("gate_up", CWeights), ("down", CWeights)),
    )


class KernelLayers:
    """The layers of a model as `CpuKernels.run_layers` takes them; holds their memory.

    Args:
        norms: Of each layer, before attention and before the MLP: (hidden_size,) each.
        linears: Of each layer: queries, keys and values; attention's output; gate and up; down.
        kv_heads: Heads of keys and values.
        head_dim: Size of a head.
    """

    def __init__(
        self,
        norms: Sequence[tuple[Tensor, Tensor]],
        linears: Sequence[Sequence[PackedLinear]],
        *,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self._held = (tuple(norms), tuple(map(tuple, linears)))
        queries = linears[0][0].outputs // head_dim - 2 * kv_heads
        self.heads = CHeads(queries, kv_heads, head_dim)
        rows = [
            CLayer(*map(_place, both), *map(CWeights.of, four))
            for both, four in zip(norms, linears, strict=True)
        ]
        self.table = (CLayer * len(rows))(*rows)


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
