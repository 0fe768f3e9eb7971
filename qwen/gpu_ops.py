"""`GpuOps`: the decoder's operations for one token, whose linear layers are our Triton kernels.

Imported only where Triton is; see `qwen.gpu_products`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qwen.decoder_ops import TorchOps
from qwen.gpu_products import can_multiply, can_multiply_int4, multiply_row, multiply_row_int4
from qwen.int4_kernels import COMPUTE_DTYPE
from qwen.quantized import Int4Linear


class GpuOps(TorchOps):
    """The operations for one row on a GPU; layers that our kernels do not take run as they are."""

    def linear(self, linear: Callable[..., Tensor], x: Tensor, add: Tensor | None = None) -> Tensor:
        """See `DecoderOps`."""
        result = _multiply(linear, x, add=add)
        return super().linear(linear, x, add) if result is None else result

    def gated(self, linear: Callable[..., Tensor], x: Tensor) -> Tensor:
        """See `DecoderOps`."""
        has_bias = getattr(linear, "bias", None) is not None
        result = None if has_bias else _multiply(linear, x, is_gated=True)
        return super().gated(linear, x) if result is None else result


def _multiply(
    linear: Callable[..., Tensor], x: Tensor, *, add: Tensor | None = None, is_gated: bool = False
) -> Tensor | None:
    """Map x by a kernel of ours; None if none of them takes the layer."""
    if type(linear) is nn.Linear and can_multiply(linear.weight):
        dense: Tensor = multiply_row(x, linear.weight, linear.bias, add, is_gated)
        return dense
    if isinstance(linear, Int4Linear) and x.dtype == COMPUTE_DTYPE:
        sizes = {"out_features": linear.out_features, "in_features": linear.in_features}
        if can_multiply_int4(**sizes, group=linear.group):
            few_bits: Tensor = multiply_row_int4(
                x, linear.packed, linear.scales, linear.bias, add, is_gated
            )
            return few_bits
    return None
