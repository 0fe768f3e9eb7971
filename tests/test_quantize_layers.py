"""How a layer's tokens are weighed."""

from __future__ import annotations

import torch

from qwen.gptq_solver import SolverOptions, round_to_nearest, solve
from qwen.quantize_layers import _counts, _Moments


def test_first_token_with_huge_activations_keeps_its_output_and_the_others_too():
    """Every token attends to it, so its errors reach them all."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    mixing = torch.randn(256, 256, generator=generator) / 16
    huge = torch.randn(256, generator=generator) * 150

    def read(rows):
        tokens = torch.randn(rows, 128, 256, generator=generator) @ mixing
        tokens[:, 0] = huge * (1 + 0.01 * torch.randn(rows, 1, generator=generator))
        return tokens

    def changes(quantized):
        change = (other @ (weight - quantized).t()).square().sum(-1)
        size = (other @ weight.t()).square().sum(-1)
        return change[:, 0].sum() / size[:, 0].sum(), change[:, 1:].sum() / size[:, 1:].sum()

    tokens, other = read(24).flatten(0, 1), read(4)
    counts = _counts((tokens @ weight.t()).square().mean(-1))
    hessian = _Moments(tokens, counts, torch.device("cpu")).hessian
    options = SolverOptions(64, damp_percent=0.3, rounds=1)
    first, others = changes(solve(weight, hessian, options).dequantize())
    first_rounded, others_rounded = changes(round_to_nearest(weight, group_size=64).dequantize())
    assert first < first_rounded / 20
    assert others < 0.8 * others_rounded
