"""`Int8Linear`: a linear layer on the CPU that keeps weights in int8 and multiplies in int8.

Weights have a scale for each group of inputs of an output; activations are quantised the same way,
each token by itself, so a token's output does not depend on its neighbours. Knows no model beyond
its linear layers; the arithmetic is in `qwen.cpu_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen.cpu_kernels import CpuKernels


class Int8Linear(nn.Module):
    """A linear layer on int8 weights; inference only, float32 in and out.

    Args:
        packed: (out, padded in) int8; see `CpuKernels.pack`.
        scales: (out, groups) float32.
        bias: (out,) float32.
        in_features: Inputs without padding.
        kernels: What computes.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        *,
        in_features: int,
        kernels: CpuKernels,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._kernels, self._multiply = kernels, kernels.linear
        self._weights = (packed, scales, bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, kernels: CpuKernels) -> Int8Linear:
        """Quantise a dense layer; it is not changed."""
        packed, scales = kernels.pack(linear.weight)
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(packed, scales, bias, in_features=linear.in_features, kernels=kernels)

    def forward(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Map the last dimension, and add the result to `out` in place where that is given."""
        if out is not None or (inputs.dim() == 2 and inputs.dtype is torch.float32):
            # The decoder's form: no view, no cast, nothing looked up in a module's dictionaries.
            return self._multiply(inputs.contiguous(), *self._weights, out=out)
        rows = inputs.float().reshape(-1, self.in_features).contiguous()
        product = self._kernels.linear(rows, self.packed, self.scales, self.bias)
        return product.view(*inputs.shape[:-1], self.out_features).to(inputs.dtype)

    def rows(self, start: int, stop: int) -> Int8Linear:
        """Return the layer of some of the outputs; it shares this one's memory."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Int8Linear(
            self.packed[start:stop],
            self.scales[start:stop],
            bias,
            in_features=self.in_features,
            kernels=self._kernels,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.packed.nbytes + self.scales.nbytes + bias


def stack(layers: list[Int8Linear]) -> Int8Linear:
    """Join layers of the same inputs into one, outputs in order."""
    first = layers[0]
    has_bias = first.bias is not None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) == (len(layers) if has_bias else 0)
    return Int8Linear(
        torch.cat([layer.packed for layer in layers]),
        torch.cat([layer.scales for layer in layers]),
        torch.cat(biases) if has_bias else None,
        in_features=first.in_features,
        kernels=first._kernels,
    )
