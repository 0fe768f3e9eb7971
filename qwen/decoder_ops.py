"""What the decoder computes besides linear layers: norm, attention over a store, gated activation.

Two sets of the same operations: `TorchOps` for any device and dtype, whose shapes alone decide what
runs, so that a step can be captured as a CUDA graph; and `CpuOps` on our own kernels. Knows no
weights and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from qwen.cpu_kernels import CpuKernels
from qwen.rope import apply_rotary


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of a call, and how they are placed.

    Attributes:
        start: Position of the first one.
        length: Slots of the store that are looked at: at least `start` and the new tokens; a
            bucket that is larger when one CUDA graph serves several lengths.
        positions: (tokens,), int64, on the device.
        cos: (tokens, rotary_dim), float32; likewise `sin`.
        logn: (tokens,), float32: factors of the queries; None is 1.
    """

    start: int
    length: int
    positions: Tensor
    cos: Tensor
    sin: Tensor
    logn: Tensor | None


class DecoderOps(Protocol):
    """The operations; hidden states are (tokens, hidden_size)."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise rows in float32 and weight them."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Compute silu(gate) * up from both side by side."""
        ...

    def add_linear(self, hidden: Tensor, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Compute hidden + linear(x); may change `hidden`."""
        ...

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, span: Span, *, scale: float
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the store, attend causally.

        Args:
            qkv: (tokens, (heads + 2 * kv_heads) * dim); may be changed.
            keys: (kv_heads, capacity, dim); changed. Likewise `values`.
            values: See `keys`.
            span: Where the tokens stand.
            scale: Factor of the scores.

        Returns:
            (tokens, heads * dim).
        """
        ...


class TorchOps:
    """The operations by torch, in the dtype of what they are given."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        return weight * exact.to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `DecoderOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def add_linear(self, hidden: Tensor, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        return hidden + linear(x)

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, span: Span, *, scale: float
    ) -> Tensor:
        """See `DecoderOps`."""
        tokens, (kv_heads, _, dim) = qkv.shape[0], keys.shape
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query, key, value = (
            states.transpose(0, 1)  # (heads, tokens, dim)
            for states in qkv.view(tokens, -1, dim).tensor_split((heads, heads + kv_heads), dim=1)
        )
        cos, sin = span.cos[None], span.sin[None]
        query, key = apply_rotary(query[None], cos, sin)[0], apply_rotary(key[None], cos, sin)[0]
        if span.logn is not None:
            query = query * span.logn[:, None]
        keys.index_copy_(1, span.positions, key.to(keys.dtype))
        values.index_copy_(1, span.positions, value.to(values.dtype))
        # Queries that share keys lie behind each other, so that keys are never repeated.
        shared = heads // kv_heads
        grouped = query.to(value.dtype).reshape(kv_heads, shared * tokens, dim)
        slots = torch.arange(span.length, device=qkv.device)
        is_seen = (slots <= span.positions[:, None]).repeat(shared, 1)  # (shared * tokens, length)
        mixed = scaled_dot_product_attention(
            grouped[None],
            keys[None, :, : span.length],
            values[None, :, : span.length],
            attn_mask=is_seen,
            scale=scale,
        )
        return mixed.view(heads, tokens, dim).transpose(0, 1).reshape(tokens, heads * dim)


class CpuOps:
    """The operations by our kernels, in float32.

    Args:
        kernels: See `qwen.cpu_kernels`.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        return self._kernels.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `DecoderOps`."""
        return self._kernels.silu_mul(gate_up)

    def add_linear(self, hidden: Tensor, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        return linear(x, out=hidden)

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, span: Span, *, scale: float
    ) -> Tensor:
        """See `DecoderOps`."""
        return self._kernels.attend(
            qkv,
            keys,
            values,
            start=span.start,
            cos=span.cos,
            sin=span.sin,
            logn=span.logn,
            scale=scale,
        )
