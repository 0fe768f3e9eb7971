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

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map x, and add to the result; may change `add`."""
        ...

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Map x to gates and, behind them, as many numbers; compute silu(gate) * number."""
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


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where new tokens of one or several sequences stand, and how they are rotated.

    Attributes:
        positions: (tokens,), int64.
        cos: (tokens, rotary_dim), float32; likewise `sin`.
        logn: (tokens,), float32: factors of the queries; None is 1.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    logn: Tensor | None


@dataclass(frozen=True, slots=True)
class PromptRows:
    """A sequence whose new tokens are read beside those of others.

    Attributes:
        tokens: New ones.
        length: Positions that the last of them sees.
        offset: Where its keys begin in the memory of all sequences.
    """

    tokens: int
    length: int
    offset: int


#: A layer's attention, rotation included: queries, keys and values of new tokens,
#: (tokens, (heads + 2 * kv_heads) * dim), and the memory of all keys and of all values,
#: (rows, kv_heads, capacity, dim), to which the new ones are written → (tokens, heads * dim).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_masked(rotation: Rotation, longest: int, scale: float) -> Attend:
    """Prepare a step's attention by torch: of one new token of each row.

    Args:
        rotation: Of the rows' tokens.
        longest: More than any position; may be more than there is room for.
        scale: Factor of the scores.
    """
    positions = rotation.positions
    rows = torch.arange(len(positions), device=positions.device)
    mask = torch.arange(longest, device=positions.device) <= positions[:, None]

    def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv_heads, dim = keys.shape[1], keys.shape[3]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        query, key, value = (
            states[:, :, None]  # (rows, heads, 1, dim)
            for states in torch.split(
                qkv.view(len(qkv), -1, dim), [heads, kv_heads, kv_heads], dim=1
            )
        )
        cos, sin = rotation.cos[:, None], rotation.sin[:, None]
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if rotation.logn is not None:
            query = query * rotation.logn[:, None, None, None]
        keys[rows, :, positions] = key[:, :, 0].to(keys.dtype)
        values[rows, :, positions] = value[:, :, 0].to(values.dtype)
        mixed = scaled_dot_product_attention(
            query.to(values.dtype).reshape(len(qkv), kv_heads, -1, dim),
            keys[:, :, :longest],
            values[:, :, :longest],
            attn_mask=mask[:, None, None, : keys.shape[2]],
            scale=scale,
        )
        return mixed.reshape(len(qkv), -1)

    return attend


class TorchOps:
    """The operations by torch, in the dtype of what they are given."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        return rms_norm(x, weight.shape, weight, eps)

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        if add is None:
            return linear(x)
        if type(linear) is nn.Linear and linear.bias is None:
            return add.addmm_(x, linear.weight.t())
        return add + linear(x)

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        gate, up = self.linear(linear, x).chunk(2, dim=-1)
        return silu(gate) * up

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
        assert mask is not None
        (heads, tokens, dim), kv_heads = query.shape, keys.shape[0]
        shared = heads // kv_heads
        is_causal = isinstance(mask, CausalBias)
        keys, values = keys[:, : span.length], values[:, : span.length]
        if shared > 1 and not is_causal:  # keys that are shared are not repeated for it
            query, mask = query.reshape(kv_heads, -1, dim), mask.repeat(shared, 1)
        elif shared > 1 and not has_flash_attention(query):
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


def has_flash_attention(states: Tensor) -> bool:
    """Tell whether torch's flash attention takes (…, dim): 16 bits on a GPU, from Ampere on."""
    if not states.is_cuda or states.itemsize != 2 or states.shape[-1] % 8:
        return False
    major, _ = torch.cuda.get_device_capability(states.device)
    return major >= 8


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

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        if add is None:
            return linear(x)
        return linear(x, out=add) if isinstance(linear, Int8Linear) else add + linear(x)

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        return self._kernels.silu_mul(linear(x))

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
