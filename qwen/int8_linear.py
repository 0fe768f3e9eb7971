"""`Int8Linear`: a linear layer on the CPU that keeps weights in 6 bits and multiplies in int8.

Weights have a scale for each group of inputs of an output; activations are quantised to 8 bits in
like groups, each token by itself, so a token's output does not depend on its neighbours. Knows no
model beyond its linear layers; the arithmetic and the layout in memory are in `qwen.cpu_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen.cpu_kernels import CpuKernels


class Int8Linear(nn.Module):
    """A linear layer on packed weights; inference only, float32 in and out.

    Args:
        packed: See `CpuKernels.pack`.
        scales: Likewise.
        bias: (out,) float32.
        in_features: Inputs without padding.
        out_features: Outputs without padding.
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
        out_features: int,
        kernels: CpuKernels,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._kernels, self._multiply = kernels, kernels.linear
        self._weights = (packed, scales, out_features, bias)

    @classmethod
    def from_linears(cls, layers: Sequence[nn.Linear], *, kernels: CpuKernels) -> Int8Linear:
        """Quantise dense layers of the same inputs as one, outputs in order; none is changed."""
        biases = [layer.bias.detach().float() for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers))
        packed, scales = kernels.pack(*(layer.weight for layer in layers))
        return cls(
            packed,
            scales,
            torch.cat(biases) if biases else None,
            in_features=layers[0].in_features,
            out_features=sum(layer.out_features for layer in layers),
            kernels=kernels,
        )

    def forward(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Map the last dimension, and add the result to `out` in place where that is given."""
        if out is not None or (inputs.dim() == 2 and inputs.dtype is torch.float32):
            # The decoder's form: no view, no cast, nothing looked up in a module's dictionaries.
            return self._multiply(inputs.contiguous(), *self._weights, out=out)
        rows = inputs.float().reshape(-1, self.in_features).contiguous()
        product = self._multiply(rows, *self._weights)
        return product.view(*inputs.shape[:-1], self.out_features).to(inputs.dtype)

    def rows(self, start: int, stop: int) -> Int8Rows:
        """Return the layer of some of the outputs; it shares this one's memory."""
        block = self._kernels.row_block
        first, last = start // block, -(-stop // block)
        end = min(last * block, self.out_features)
        layer = Int8Linear(
            self.packed[first:last],
            self.scales[first:last],
            None if self.bias is None else self.bias[first * block : end],
            in_features=self.in_features,
            out_features=end - first * block,
            kernels=self._kernels,
        )
        return Int8Rows(layer, start - first * block, stop - first * block)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.packed.nbytes + self.scales.nbytes + bias


class Int8Rows(nn.Module):
    """Some outputs of a layer whose blocks hold others too."""

    def __init__(self, layer: Int8Linear, start: int, stop: int) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, stop - start
        self._place = slice(start, stop)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the last dimension."""
        outputs: Tensor = self.layer(inputs)[..., self._place]
        return outputs
