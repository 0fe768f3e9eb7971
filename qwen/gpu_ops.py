"""`GpuOps`: the decoder's operations for a step on a GPU, by our Triton kernels.

Imported only where Triton is; see `qwen.gpu_products`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qwen.decoder_ops import TorchOps
from qwen.gpu_products import (
    MAX_INT4_ROWS,
    can_multiply,
    can_multiply_int4,
    gate,
    multiply_row,
    multiply_rows_int4,
    rms_norm,
)
from qwen.int4_kernels import COMPUTE_DTYPE
from qwen.quantized import Int4Linear


class GpuOps(TorchOps):
    """The operations for few rows; layers that our kernels do not take run as they are."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `DecoderOps`."""
        return rms_norm(x, weight, eps)

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        result = _multiply(linear, x, add=add)
        return super().linear(linear, x, add) if result is None else result

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        has_bias = getattr(linear, "bias", None) is not None
        result = None if has_bias else _multiply(linear, x, is_gated=True)
        return gate(super().linear(linear, x)) if result is None else result


def _multiply(
    linear: Callable[..., Tensor], x: Tensor, *, add: Tensor | None = None, is_gated: bool = False
) -> Tensor | None:
    """Map x by a kernel of ours; None if none of them takes the layer and so many rows."""
    if type(linear) is nn.Linear and len(x) == 1 and can_multiply(linear.weight):
        return multiply_row(x, linear.weight, linear.bias, add, is_gated=is_gated)
    if isinstance(linear, Int4Linear) and len(x) <= MAX_INT4_ROWS and x.dtype == COMPUTE_DTYPE:
        sizes = {"out_features": linear.out_features, "in_features": linear.in_features}
        if can_multiply_int4(**sizes, group=linear.group):
            weights = linear.packed, linear.scales, linear.bias
            return multiply_rows_int4(x, *weights, add, is_gated=is_gated)
    return None
