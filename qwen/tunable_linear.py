"""A quantised linear layer that has gradients, and tensors that are tuned relative to their size.

Gradients go to the scales, and on request to the codes: straight through the rounding, as if it
were not there. Knows no models and no files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen.gptq_solver import HIGHEST, LOWEST, ZERO


class _Dequantize(torch.autograd.Function):
    """(codes, scales) → weights, without keeping anything as large as the weights in float32."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.group_size = group_size
        levels = _levels(codes, group_size)
        return levels.mul_(scales[..., None]).to(dtype).reshape(codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        gradient = _grouped(gradients[0].float(), ctx.group_size)
        to_scales = (gradient * _levels(codes, ctx.group_size)).sum(-1)
        to_codes = None
        if ctx.needs_input_grad[0]:
            inside = (codes > LOWEST - 0.5) & (codes < HIGHEST + 0.5)
            to_codes = (gradient * scales[..., None]).flatten(1) * inside
        return to_codes, to_scales, None, None


def _levels(codes: Tensor, group_size: int) -> Tensor:
    """Return codes - zero, (outputs, groups, group_size) float32."""
    rounded = (
        codes.float() if not codes.is_floating_point() else codes.round().clamp_(LOWEST, HIGHEST)
    )
    return _grouped(rounded.sub_(ZERO), group_size)


def _grouped(matrix: Tensor, group_size: int) -> Tensor:
    return matrix.reshape(len(matrix), -1, group_size)


class TunableLinear(nn.Module):
    """A linear layer whose weights are codes times scales.

    Args:
        codes: (outputs, inputs) uint8.
        scales: (outputs, groups) float.
        bias: (outputs,) float, or none.
        dtype: Of the weights when they are multiplied.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self._dtype = dtype

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def release_codes(self, weight: Tensor, *, margin: float) -> None:
        """Let the codes be tuned, each from near the weight that it stands for."""
        scales = self.scales.repeat_interleave(self.group_size, dim=1)
        codes = self.codes.float()
        reach = 0.5 - margin
        exact = (weight.float() / scales + ZERO).clamp(codes - reach, codes + reach)
        del self.codes
        self.codes = nn.Parameter(torch.where(exact.isfinite(), exact, codes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        dequantize: Any = _Dequantize.apply
        scales = self.scales  # computed anew by every look at it
        group_size = self.codes.shape[1] // scales.shape[1]
        weight = dequantize(self.codes, scales, group_size, self._dtype)
        bias = None if self.bias is None else self.bias.to(self._dtype)
        return nn.functional.linear(inputs.to(self._dtype), weight, bias)


class RelativeChange(nn.Module):
    """A tensor as a start and a change in units of its own size, so that one rate fits all.

    Args:
        start: What it is before.
        smallest: Entries smaller than this change as if they were as large.
    """

    def __init__(self, start: Tensor, smallest: float) -> None:
        super().__init__()
        self.start: Tensor
        self.unit: Tensor
        self.register_buffer("start", start.clone())
        self.register_buffer("unit", start.abs().clamp_min(smallest))

    def forward(self, change: Tensor) -> Tensor:
        """Return the tensor that a change makes."""
        return self.start + self.unit * change

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the change that makes the start."""
        return torch.zeros_like(value)
