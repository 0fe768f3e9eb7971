"""Rotary position embedding with Qwen v1's dynamic NTK scaling, and its log-n attention scaling.

Pure tensor functions; knows no model, no cache and no configuration. Rotary embedding: Su et al.,
arXiv:2104.09864, in the half-split layout. NTK-aware scaling of the base (bloc97, 2023) in steps
that follow the prompt's length, and log-n scaling of the queries (Su, 2021), both as the Qwen v1
checkpoints were published with (Bai et al., arXiv:2309.16609, section 2.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Doublings of `seq_length` that `ntk_alpha` tells apart; 2,048 tokens doubled so often are 2^42.
_MAX_DOUBLINGS = 31


def ntk_alpha(prompt_length: Tensor, seq_length: int) -> Tensor:
    """Compute by how much the rotary base is stretched for prompts of these lengths.

    The published max(2^ceil(log2(n / seq_length) + 1) - 1, 1): 1 up to `seq_length`, then 3 up to
    its double, 7 up to its fourfold, and so on. Counted in integers, so that no length near a
    boundary falls on its wrong side.

    Args:
        prompt_length: (batch,), int; tokens of each whole prompt.
        seq_length: Tokens that the model was trained on.

    Returns:
        (batch,), float32.
    """
    doublings = torch.arange(_MAX_DOUBLINGS, device=prompt_length.device)
    exceeded = prompt_length[..., None].long() > seq_length * 2**doublings
    return (2.0 ** (exceeded.sum(-1) + 1) - 1).float()


def scaled_inv_freq(alpha: Tensor, *, dim: int, base: float) -> Tensor:
    """Compute the inverse frequencies of a base stretched by alpha.

    base' = base * alpha^(dim / (dim - 2)), inv_freq_i = base'^(-2i / dim).

    Args:
        alpha: (batch,), float; from `ntk_alpha`.
        dim: Size of the rotated part of a head.
        base: `rotary_emb_base` of the checkpoint.

    Returns:
        (batch, dim / 2), float32.
    """
    stretched = (base * alpha.to(_exact_float(alpha)) ** (dim / (dim - 2))).float()
    exponents = torch.arange(0, dim, 2, device=alpha.device).float() / dim
    return 1.0 / stretched[..., None] ** exponents


def rotary_tables(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that rotate queries and keys.

    Always float32: in bfloat16 neighbouring positions above 256 would fall together.

    Args:
        position_ids: (batch or 1, seq_len), int.
        inv_freq: (batch or 1, dim / 2), float32; from `scaled_inv_freq`.

    Returns:
        Two tensors (batch, seq_len, dim), float32.
    """
    angles = position_ids[..., None].float() * inv_freq[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def logn_factor(position_ids: Tensor, seq_length: int) -> Tensor:
    """Compute by how much the queries at these positions are sharpened.

    log(p + 1) / log(seq_length) past `seq_length`, else 1. Computed, not looked up: the published
    table ends at 32,767 positions.

    Args:
        position_ids: (batch or 1, seq_len), int; counted from 0.
        seq_length: Tokens that the model was trained on, at least 2.

    Returns:
        (batch or 1, seq_len), float32.
    """
    numbers = (position_ids + 1).to(_exact_float(position_ids)).log() / math.log(seq_length)
    return numbers.clamp(min=1.0).float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys; the part of a head beyond `dim` passes through.

    Args:
        x: (batch, num_heads, seq_len, head_dim), float of any precision.
        cos: (batch or 1, seq_len, dim), float32.
        sin: As `cos`.

    Returns:
        As `x`, but float32: the caller casts when nothing more is to be multiplied.
    """
    dim = cos.shape[-1]
    x, rest = x[..., :dim].float(), x[..., dim:].float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = x * cos[:, None] + turned * sin[:, None]
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def _exact_float(like: Tensor) -> torch.dtype:
    """Choose float64, in which the published code computes bases and logs; MPS has none."""
    return torch.float32 if like.device.type == "mps" else torch.float64
