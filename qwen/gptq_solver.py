"""Weights → 4-bit codes and scales that change a layer's output least.

Minimises tr((W - Q) H (W - Q)ᵀ) for a linear layer with weights W and the second moment H of its
inputs, over codes 0…15 and one scale for each group of inputs: Q = (codes - 8) · scale. The first
pass is GPTQ (Frantar et al., arXiv:2210.17323) in the form that QuIP (Chee et al.,
arXiv:2307.13304) proved equal to it, rounding with feedback from one triangular factor of H, so
nothing is inverted. Then codes (coordinate descent) and scales (least squares) are improved in
turn; each step can only lower the error. Knows no model, no files and no packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen.gptq_format import Bits

#: Codes are 0…15; the zero point of symmetric weights is the code 8.
LOWEST, HIGHEST, ZERO = 0, 15, 8

#: Fractions of the scale that would just reach a group's largest weight.
_SHRINKS = tuple(1 - 0.025 * step for step in range(21))
#: A row that would have to change by more is one of which little is left.
_MAX_GAIN = 1.1
_BLOCK = 128
#: Rows of which the scales are solved at once; bounds the memory, (rows, groups, inputs).
_SCALE_ROWS = 128


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weights as codes and scales.

    Attributes:
        codes: (outputs, inputs) uint8 of 0…15, or with 8 bits 0…255.
        scales: (outputs, groups) float16; negative ones are meant.
        group_size: Inputs that share a scale.
        bits: Of a code.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    bits: Bits = 4

    @property
    def zero(self) -> int:
        """The code that means 0."""
        return 1 << (self.bits - 1)

    def dequantize(self) -> Tensor:
        """Return (outputs, inputs) float32."""
        wide = self.scales.float().repeat_interleave(self.group_size, dim=1)
        return (self.codes.float() - self.zero) * wide


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """How hard the solver tries.

    Attributes:
        group_size: Inputs that share a scale; must divide their number.
        damp_percent: Of the mean of H's diagonal, added to it: calibration text is a sample, and
            what it does not show must not be given up.
        rounds: How often scales and codes are improved after the first pass.
    """

    group_size: int = 128
    damp_percent: float = 0.01
    rounds: int = 3


def round_to_nearest(weight: Tensor, *, group_size: int, bits: Bits = 4) -> QuantizedWeight:
    """Round each weight by itself, with the scale that reaches its group's largest weight.

    Args:
        weight: (outputs, inputs), float.
        group_size: Must divide the inputs.
        bits: Of a code.
    """
    middle = 1 << (bits - 1)
    groups = _grouped(weight, group_size)
    scales = _storable(groups.abs().amax(-1) / (middle - 1))
    levels = (groups / scales[..., None]).round_().clamp_(-middle, middle - 1)
    codes = (levels + middle).to(torch.uint8).reshape(weight.shape)
    return QuantizedWeight(codes, scales.half(), group_size, bits)


def solve(weight: Tensor, hessian: Tensor, options: SolverOptions) -> QuantizedWeight:
    """Quantise a weight matrix for the inputs that a layer really gets.

    Args:
        weight: (outputs, inputs), finite.
        hessian: (inputs, inputs) float64, finite: the mean of x xᵀ over the inputs; not changed.
            Inputs that are always zero are taken.
        options: See there.
    """
    weight = weight.float()
    hessian = _damped(hessian, options.damp_percent)
    search = _Search(weight, hessian.float(), options.group_size)
    search.choose_scales()
    search.round_with_feedback(hessian)
    for _ in range(options.rounds):
        search.solve_scales()
        search.improve_codes()
    search.restore_gain()
    return search.result()


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return the mean square of the change of the output, relative to the output's own.

    Args:
        weight: (outputs, inputs), float.
        quantized: Likewise, after quantisation.
        hessian: (inputs, inputs), undamped.
    """
    difference, exact = (weight - quantized).double(), weight.double()
    hessian = hessian.double()
    change = ((difference @ hessian) * difference).sum()
    return float(change / ((exact @ hessian) * exact).sum().clamp_min(1e-30))


def _damped(hessian: Tensor, damp_percent: float) -> Tensor:
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not mean > 0:  # nothing was seen: every weight is rounded by itself
        diagonal.fill_(1.0)
        return hessian
    # Half by each input's own size, so that small inputs keep what they have in common with others;
    # half by the mean, so that inputs that were never seen are solved for too.
    diagonal.add_(diagonal * (damp_percent / 2) + mean * (damp_percent / 2))
    return hessian


class _Search:
    """The state of one matrix's solution: codes and scales, changed step by step."""

    def __init__(self, weight: Tensor, hessian: Tensor, group_size: int) -> None:
        self.weight = weight
        self.hessian = hessian
        self.group_size = group_size
        self.scales = torch.ones(
            weight.shape[0], weight.shape[1] // group_size, device=weight.device
        )
        self.levels = torch.zeros_like(weight)  # codes - 8

    def choose_scales(self) -> None:
        """Try scales of both signs for each group; inputs that matter more weigh more.

        A negative scale gives the level -8 to a group's largest weight where that is positive.
        """
        groups = _grouped(self.weight, self.group_size)
        importance = self.hessian.diagonal().reshape(1, -1, self.group_size)
        highest, lowest = groups.amax(-1), groups.amin(-1)
        ends = torch.where(highest > -lowest, highest, lowest) / (LOWEST - ZERO)
        plain = groups.abs().amax(-1) / (HIGHEST - ZERO)
        best = torch.full_like(ends, torch.inf)
        for full in (ends, plain):
            for shrink in _SHRINKS:
                scales = _storable(full * shrink)
                levels = _rounded(groups, scales[..., None]) - ZERO
                error = (groups - levels * scales[..., None]).square_().mul_(importance).sum(-1)
                better = error < best
                best = torch.where(better, error, best)
                self.scales = torch.where(better, scales, self.scales)

    def round_with_feedback(self, hessian: Tensor) -> None:
        """Round column after column, each with what the ones before it have left over.

        The columns with the largest inputs come first; the order is free because the scales are
        fixed before, and it is forgotten after.
        """
        order = hessian.diagonal().argsort(descending=True)
        factor = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1)).flip(0, 1)
        feedback = (factor / factor.diagonal()).float()
        feedback.fill_diagonal_(0)
        self._sweep(feedback, order)

    def improve_codes(self) -> None:
        """Give each column its best codes while all others stay."""
        feedback = self.hessian / self.hessian.diagonal()
        feedback.fill_diagonal_(0)
        self._sweep(feedback, torch.arange(feedback.shape[0], device=feedback.device))

    def _sweep(self, feedback: Tensor, order: Tensor) -> None:
        """Visit all columns; feedback[i, j] is how an error in column i moves the aim of j."""
        weight = self.weight[:, order]
        levels = self.levels[:, order]
        groups = order // self.group_size
        rest = weight - levels * self.scales[:, groups]
        for start, end in _blocks(len(order)):
            aims = weight[:, start:end] + rest @ feedback[:, start:end]
            inner = feedback[start:end, start:end]
            for column in range(end - start):
                at = start + column
                scale = self.scales[:, groups[at]]
                level = _rounded(aims[:, column], scale) - ZERO
                left = weight[:, at] - level * scale
                aims[:, column + 1 :].addr_(left - rest[:, at], inner[column, column + 1 :])
                rest[:, at] = left
                levels[:, at] = level
        self.levels[:, order] = levels

    def solve_scales(self) -> None:
        """Give each row its best scales while the codes stay."""
        size = self.group_size
        count = self.scales.shape[1]
        for start, end in _blocks(len(self.weight), _SCALE_ROWS):
            levels = self.levels[start:end].reshape(-1, count, size)
            rows = self.hessian.reshape(count, size, -1)
            # (rows, groups, inputs): what each group alone adds to the gradient.
            pulled = torch.einsum("rgk,gki->rgi", levels, rows)
            matrix = torch.einsum(
                "rgck,rck->rgc", pulled.reshape(len(levels), count, count, size), levels
            )
            aim = torch.einsum("rgi,ri->rg", pulled, self.weight[start:end])
            matrix = matrix.double()
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(diagonal.mean(-1, keepdim=True) * 1e-6 + 1e-30)
            solved = torch.linalg.solve(matrix, aim.double()).float()
            usable = solved.isfinite() & (levels != 0).any(-1)
            self.scales[start:end] = torch.where(usable, _storable(solved), self.scales[start:end])

    def restore_gain(self) -> None:
        """Scale each row so that it has as much as before along the dense weights.

        The least error makes Q too small (the best guess of a value lies nearer to 0 than the
        value). That is little in one layer, but the same way in all of them, for every token, and
        adds up; other errors cancel. Taken from the weights alone: measured with H, half as much is
        found, and half as much lost more of what a whole model knows on other text.
        """
        quantized = self.levels * self.scales.repeat_interleave(self.group_size, dim=1)
        aim = self.weight.square().sum(1, dtype=torch.float64)
        gain = aim / (quantized * self.weight).sum(1, dtype=torch.float64)
        gain = torch.where(gain.isfinite(), gain, 1.0).clamp(1 / _MAX_GAIN, _MAX_GAIN)
        self.scales = _storable(self.scales * gain.float()[:, None])

    def result(self) -> QuantizedWeight:
        codes = (self.levels + ZERO).to(torch.uint8)
        return QuantizedWeight(codes, self.scales.half(), self.group_size)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    return weight.float().reshape(weight.shape[0], -1, group_size)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest codes, as floats."""
    return (weight / scale).round_().add_(ZERO).clamp_(LOWEST, HIGHEST)


def _storable(scales: Tensor) -> Tensor:
    """Return scales as float16 holds them, and none that is zero."""
    stored = scales.half().float()
    smallest = torch.finfo(torch.float16).tiny
    sign = torch.where(stored < 0, -1.0, 1.0)
    return torch.where(stored.abs() < smallest, sign * smallest, stored)


def _blocks(count: int, size: int = _BLOCK) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)
