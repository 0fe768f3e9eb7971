"""`GpuOps`: the decoder's operations on a GPU, by our Triton kernels.

Imported only where Triton is; see `qwen.gpu_products`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from torch import Tensor, nn

from qwen.decoder_ops import TorchOps
from qwen.gpu_products import (
    MAX_INT4_ROWS,
    can_multiply,
    can_multiply_int4,
    gate,
    multiply_many_int4,
    multiply_row,
    multiply_rows_int4,
    rms_norm,
)
from qwen.int4_kernels import COMPUTE_DTYPE
from qwen.quantized import Int4Linear


class GpuOps(TorchOps):
    """The operations by our kernels; layers that they do not take run as they are."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        return rms_norm(x, weight, eps)

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        if _is_dense_row(linear, x):
            return multiply_row(x, linear.weight, linear.bias, add)
        if _is_int4(linear, x):
            multiply = multiply_rows_int4 if len(x) <= MAX_INT4_ROWS else multiply_many_int4
            return multiply(x, linear.packed, linear.scales, linear.bias, add)
        return super().linear(linear, x, add)

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        if getattr(linear, "bias", None) is None:
            if _is_dense_row(linear, x):
                return multiply_row(x, linear.weight, is_gated=True)
            if _is_int4(linear, x) and len(x) <= MAX_INT4_ROWS:
                return multiply_rows_int4(x, linear.packed, linear.scales, is_gated=True)
        return gate(self.linear(linear, x))


def _is_dense_row(linear: Callable[..., Tensor], x: Tensor) -> TypeGuard[nn.Linear]:
    """Tell whether x is a row that `multiply_row` takes."""
    return type(linear) is nn.Linear and len(x) == 1 and can_multiply(linear.weight)


def _is_int4(linear: Callable[..., Tensor], x: Tensor) -> TypeGuard[Int4Linear]:
    """Tell whether our kernels take a 4-bit layer and its input."""
    if not isinstance(linear, Int4Linear) or x.dtype != COMPUTE_DTYPE:
        return False
    sizes = {"out_features": linear.out_features, "in_features": linear.in_features}
    return can_multiply_int4(**sizes, group=linear.group)
