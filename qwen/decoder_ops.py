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
from qwen.int8_linear import Int8Linear
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

    def build_mask(self, span: Span) -> Tensor | None:
        """Build what `attend` needs for all layers of a call."""
        ...

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        mask: Tensor | None,
        *,
        scale: float,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the store, attend causally.

        Args:
            qkv: (tokens, (heads + 2 * kv_heads) * dim); may be changed.
            keys: (kv_heads, capacity, dim); changed. Likewise `values`.
            values: See `keys`.
            span: Where the tokens stand.
            mask: From `build_mask`.
            scale: Factor of the scores.

        Returns:
            (tokens, heads * dim).
        """
        ...


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
) -> Tensor:
    """Rotate queries and keys, write keys and values; the arguments are those of `attend`.

    Returns:
        (kv_heads, tokens * heads / kv_heads, dim): queries that share keys behind each other, so
        that keys are never repeated.
    """
    tokens, (kv_heads, _, dim) = qkv.shape[0], keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key, value = (
        states.transpose(0, 1)  # (heads, tokens, dim)
        for states in torch.split(qkv.view(tokens, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    )
    query = apply_rotary(query[None], cos[None], sin[None])[0]
    key = apply_rotary(key[None], cos[None], sin[None])[0]
    if logn is not None:
        query = query * logn[:, None]
    keys.index_copy_(1, positions, key.to(keys.dtype))
    values.index_copy_(1, positions, value.to(values.dtype))
    return query.to(values.dtype).reshape(kv_heads, -1, dim)


def attend_rows(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Span,
    mask: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attend as `DecoderOps.attend` for one token of each of several sequences.

    Args:
        qkv: (rows, (heads + 2 * kv_heads) * dim).
        keys: (rows, kv_heads, capacity, dim); changed. Likewise `values`.
        values: See `keys`.
        span: The rows' places; its `start` is not looked at.
        mask: From `rows_mask`.
        scale: Factor of the scores.

    Returns:
        (rows, heads * dim).
    """
    rows, kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key, value = torch.split(qkv.view(rows, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    cos, sin = span.cos[:, None], span.sin[:, None]
    query = apply_rotary(query[:, :, None], cos, sin)
    key = apply_rotary(key[:, :, None], cos, sin)[:, :, 0]
    if span.logn is not None:
        query = query * span.logn[:, None, None, None]
    places = torch.arange(rows, device=qkv.device)
    keys[places, :, span.positions] = key.to(keys.dtype)
    values[places, :, span.positions] = value.to(values.dtype)
    mixed = scaled_dot_product_attention(
        query.to(values.dtype).reshape(rows, kv_heads, -1, dim),
        keys[:, :, : span.length],
        values[:, :, : span.length],
        attn_mask=mask,
        scale=scale,
    )
    return mixed.reshape(rows, -1)


def rows_mask(span: Span) -> Tensor:
    """Build the mask of `attend_rows`: (rows, 1, 1, length), which slots a row sees."""
    slots = torch.arange(span.length, device=span.positions.device)
    return (slots <= span.positions[:, None])[:, None, None]


class TorchOps:
    """The operations by torch, in the dtype of what they are given.

    Args:
        rotate: `rotate_and_store`, or that compiled.
    """

    def __init__(self, *, rotate: Callable[..., Tensor] = rotate_and_store) -> None:
        self._rotate = rotate

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

    def build_mask(self, span: Span) -> Tensor | None:
        """See `DecoderOps`: (tokens, length), which slots a token sees."""
        slots = torch.arange(span.length, device=span.positions.device)
        return slots <= span.positions[:, None]

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        mask: Tensor | None,
        *,
        scale: float,
    ) -> Tensor:
        """See `DecoderOps`."""
        assert mask is not None
        tokens, dim = qkv.shape[0], keys.shape[2]
        query = self._rotate(qkv, keys, values, span.positions, span.cos, span.sin, span.logn)
        shared = query.shape[1] // tokens
        mixed = scaled_dot_product_attention(
            query[None],
            keys[None, :, : span.length],
            values[None, :, : span.length],
            attn_mask=mask if shared == 1 else mask.repeat(shared, 1),
            scale=scale,
        )
        return mixed.reshape(-1, tokens, dim).transpose(0, 1).reshape(tokens, -1)


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
        return linear(x, out=hidden) if isinstance(linear, Int8Linear) else hidden + linear(x)

    def build_mask(self, span: Span) -> Tensor | None:
        """See `DecoderOps`: the kernel knows what is causal."""
        return None

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        mask: Tensor | None,
        *,
        scale: float,
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
