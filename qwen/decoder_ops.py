"""What the decoder computes: norm, linear layers, attention over a store, gated activation.

Two sets of the same operations: `TorchOps` for any device and dtype, whose shapes alone decide what
runs, so that a step can be captured as a CUDA graph; and `CpuOps` on our own kernels. A third is
`qwen.gpu_ops`. Knows no weights and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from qwen.cpu_kernels import CpuKernels
from qwen.int8_linear import Int8Linear
from qwen.rope import apply_rotary


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of a call, and how they are placed.

    Attributes:
        start: Position of the first one.
        length: Slots of the store that are looked at: `start` and the new tokens.
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

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map x, and add to the result; may change `add`."""
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
        (heads, tokens, dim), queries; heads that share keys behind each other.
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
    return query.to(values.dtype)


def place_rows(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
) -> Tensor:
    """Rotate one token of each of several sequences, and write keys and values to their places.

    Args:
        qkv: (rows, (heads + 2 * kv_heads) * dim).
        keys: (places, dim), the memory of all rows; changed. Likewise `values`.
        values: See `keys`.
        places: (rows * kv_heads,), int64: where each row's keys go.
        cos: (rows, 1, rotary_dim), float32; likewise `sin`.
        sin: See `cos`.
        logn: (rows, 1), float32; None is 1.

    Returns:
        (rows, kv_heads, heads / kv_heads, dim), queries.
    """
    rows, dim = qkv.shape[0], keys.shape[1]
    kv_heads = places.shape[0] // rows
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key, value = torch.split(qkv.view(rows, -1, 1, dim), [heads, kv_heads, kv_heads], dim=1)
    query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    if logn is not None:
        query = query * logn[:, :, None, None]
    keys.index_copy_(0, places, key.reshape(-1, dim).to(keys.dtype))
    values.index_copy_(0, places, value.reshape(-1, dim).to(values.dtype))
    return query.to(values.dtype).reshape(rows, kv_heads, -1, dim)


#: A layer's attention of one token of each row: queries, keys and values → as the queries.
AttendRows = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_masked(positions: Tensor, longest: int, scale: float) -> AttendRows:
    """Prepare a step's attention by torch.

    Args:
        positions: (rows,), int64: of each row's token.
        longest: More than any position.
        scale: Factor of the scores.

    Returns:
        What takes (rows, kv_heads, shared, dim) queries, and keys and values
        (rows, kv_heads, capacity, dim).
    """
    mask = torch.arange(longest, device=positions.device) <= positions[:, None]

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query,
            keys[:, :, :longest],
            values[:, :, :longest],
            attn_mask=mask[:, None, None],
            scale=scale,
        )

    return attend


class TorchOps:
    """The operations by torch, in the dtype of what they are given."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        return rms_norm(x, weight.shape, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `DecoderOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        if add is None:
            return linear(x)
        if type(linear) is nn.Linear and linear.bias is None:
            return torch.addmm(add, x, linear.weight.t())
        return add + linear(x)

    def build_mask(self, span: Span) -> Tensor | None:
        """See `DecoderOps`: (tokens, length), which slots a token sees; on a GPU without memory."""
        if span.positions.is_cuda:
            return causal_lower_right(len(span.positions), span.length)
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
        query = rotate_and_store(qkv, keys, values, span.positions, span.cos, span.sin, span.logn)
        return self.attend_stored(query, keys, values, span, mask, scale=scale)

    def attend_stored(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        mask: Tensor | None,
        *,
        scale: float,
    ) -> Tensor:
        """Attend as `attend`, with queries (heads, tokens, dim) that are rotated."""
        assert mask is not None
        (heads, tokens, dim), kv_heads = query.shape, keys.shape[0]
        shared = heads // kv_heads
        is_causal = isinstance(mask, CausalBias)
        keys, values = keys[:, : span.length], values[:, : span.length]
        if shared > 1 and not is_causal:  # keys that are shared are not repeated for it
            query, mask = query.reshape(kv_heads, -1, dim), mask.repeat(shared, 1)
        elif shared > 1 and not _has_flash_attention(query):
            # What is causal without it takes as many keys as queries.
            keys, values = (states.repeat_interleave(shared, 0) for states in (keys, values))
        mixed = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=len(query) != len(keys),
        )
        return mixed.reshape(heads, tokens, dim).transpose(0, 1).reshape(tokens, -1)


def _has_flash_attention(query: Tensor) -> bool:
    """Tell whether torch's flash attention takes queries: 16 bits, from Ampere on."""
    major, _ = torch.cuda.get_device_capability(query.device)
    return query.dtype != torch.float32 and major >= 8


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

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        if add is None:
            return linear(x)
        return linear(x, out=add) if isinstance(linear, Int8Linear) else add + linear(x)

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
