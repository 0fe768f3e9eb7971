"""All layers of a quantised model on the CPU, as one call of the kernels.

The order of what a layer computes is that of `qwen.decoder`, written down once more in the kernels
(`run_layers`), so that a step crosses from Python to them once: with a call for each operation, a
program with busy threads waited for Python's lock 500 times a step. Equal by test.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwen.cpu_kernels import CpuKernels
from qwen.decoder_ops import Span
from qwen.decoder_weights import DecoderWeights, LinearMap
from qwen.int8_linear import Int8Linear
from qwen.kernel_arguments import KernelLayers, NewTokens, PackedLinear
from qwen.kv_store import KvStore


class Int8Layers:
    """The layers of one model.

    Args:
        weights: All linear layers of its layers are `Int8Linear`; see `is_int8`.
        kernels: What computes.
    """

    def __init__(self, weights: DecoderWeights, kernels: CpuKernels) -> None:
        self._kernels, self._eps, self._scale = kernels, weights.eps, weights.scale
        self._layers = KernelLayers(
            [(layer.input_norm, layer.mlp_norm) for layer in weights.layers],
            [[_packed(linear) for linear in layer.linears] for layer in weights.layers],
            kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
        )

    def run(self, hidden: Tensor, spans: Sequence[Span], stores: Sequence[KvStore]) -> None:
        """Compute the last hidden states of new tokens in place, and write their keys and values.

        Args:
            hidden: (tokens of all spans, hidden_size), float32; changed.
            spans: Where the tokens of each sequence stand.
            stores: The sequences' own; have room for them.
        """
        new = [
            NewTokens(
                len(span.positions), span.start, *store.layer(0), span.cos, span.sin, span.logn
            )
            for span, store in zip(spans, stores, strict=True)
        ]
        self._kernels.run_layers(hidden, self._layers, new, eps=self._eps, scale=self._scale)


def is_int8(weights: DecoderWeights) -> bool:
    """Tell whether all layers can run as `Int8Layers`."""
    linears = (linear for layer in weights.layers for linear in layer.linears)
    return all(isinstance(linear, Int8Linear) for linear in linears)


def _packed(linear: LinearMap) -> PackedLinear:
    assert isinstance(linear, Int8Linear)
    return PackedLinear(
        linear.packed, linear.scales, linear.bias, linear.out_features, linear.in_features
    )
