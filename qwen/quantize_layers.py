"""One layer of a model: what its linear layers read, and their weights quantised in that order.

Each linear layer is solved for the inputs that it gets from the quantised layers before it (true
sequential), so what those have lost is known to it. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen.errors import CheckpointDamaged
from qwen.gptq_solver import (
    QuantizedWeight,
    SolverOptions,
    output_error,
    round_to_nearest,
    solve,
)
from qwen.quantize_layout import BlockLayout, LayerArguments

#: Sizes of the products that the second moment is summed from.
_MOMENT_TOKENS, _MOMENT_COLUMNS = 4096, 512


@dataclass(slots=True)
class QuantizedLayer:
    """What became of a layer.

    Attributes:
        weights: By the names of the linear layers within the block.
        biases: Those that were changed, float32.
        errors: Mean squared change of each one's output, relative to the output's own.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class _Moments:
    """First and second moment of a linear layer's inputs, in float64.

    Args:
        inputs: (tokens, inputs) float32 on the host.
        counts: (tokens,) how much each one counts.
        device: Where to compute.
    """

    def __init__(self, inputs: Tensor, counts: Tensor, device: torch.device) -> None:
        width = inputs.shape[1]
        second = torch.zeros(width, width, dtype=torch.float64, device=device)
        first = torch.zeros(width, dtype=torch.float64, device=device)
        for part, part_counts in zip(_parts(inputs), _parts(counts), strict=True):
            tokens = part.to(device)
            weighted = tokens * part_counts.to(device)[:, None]
            first += weighted.sum(0, dtype=torch.float64)
            # Symmetric: what lies right of the diagonal's blocks is not computed.
            for start in range(0, width, _MOMENT_COLUMNS):
                end = start + _MOMENT_COLUMNS
                second[start:end, :end] += weighted[:, start:end].t() @ tokens[:, :end]
        total = counts.sum(dtype=torch.float64).to(device)
        self.mean = first / total
        self.hessian = (second.tril() + second.tril(-1).t()) / total


@torch.no_grad()
def round_layer(block: nn.Module, layout: BlockLayout, *, group_size: int) -> QuantizedLayer:
    """Round the weights of a block to nearest, without looking at inputs."""
    done = QuantizedLayer()
    for name in layout.linears:
        linear: Any = block.get_submodule(name)
        done.weights[name] = round_to_nearest(linear.weight, group_size=group_size)
    return done


@torch.no_grad()
def quantize_layer(
    block: nn.Module,
    layout: BlockLayout,
    hidden_states: Tensor,
    arguments: LayerArguments,
    *,
    options: SolverOptions,
    in_8_bits: Collection[str] = (),
) -> QuantizedLayer:
    """Quantise the linear layers of a block one after another.

    Args:
        block: Float32; changed: its weights become what the codes mean.
        layout: Names of its parts.
        hidden_states: (rows, seq_len, hidden_size) float32 on the host; changed in place to what
            the quantised block makes of them.
        arguments: What the block is called with besides.
        options: For the solver.
        in_8_bits: Names of linear layers that are rounded to 8 bits, which loses next to nothing.

    Raises:
        CheckpointDamaged: A linear layer's weights or inputs are not finite.
    """
    work = _Layer(block, layout, hidden_states, arguments, options, in_8_bits)
    work.quantize(layout.query_key_value, work.normed(layout.attention_norm))
    work.quantize_into_residual(layout.attention_out, work.collect(work.attended))
    work.quantize(layout.gate_up, work.normed(layout.mlp_norm))
    work.quantize_into_residual(layout.mlp_out, work.collect(work.gated))
    return work.done


class _Caught(Exception):
    """Ends a forward pass at a linear layer, with its inputs."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _Layer:
    def __init__(
        self,
        block: nn.Module,
        layout: BlockLayout,
        hidden_states: Tensor,
        arguments: LayerArguments,
        options: SolverOptions,
        in_8_bits: Collection[str],
    ) -> None:
        self._in_8_bits = frozenset(in_8_bits)
        self._block = block
        self._layout = layout
        self._hidden = hidden_states
        self._arguments = arguments
        self._options = options
        self._device = next(block.parameters()).device
        self.done = QuantizedLayer()

    def _rows(self) -> Iterator[Tensor]:
        for row in self._hidden:
            yield row[None].to(self._device)

    def normed(self, norm: str) -> Callable[[Tensor], Tensor]:
        return self._block.get_submodule(norm)

    def attended(self, row: Tensor) -> Tensor:
        """Return what the attention's output projection reads."""
        layout = self._layout
        normed = self.normed(layout.attention_norm)(row)
        return self._caught(
            layout.attention, layout.attention_out, hidden_states=normed, **self._arguments
        )

    def gated(self, row: Tensor) -> Tensor:
        """Return what the MLP's output projection reads."""
        layout = self._layout
        return self._caught(layout.mlp, layout.mlp_out, self.normed(layout.mlp_norm)(row))

    def _caught(self, module: str, linear: str, *args: Any, **kwargs: Any) -> Tensor:
        def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Caught(inputs[0])

        hook = self._block.get_submodule(linear).register_forward_pre_hook(catch)
        try:
            self._block.get_submodule(module)(*args, **kwargs)
        except _Caught as caught:
            return caught.inputs
        finally:
            hook.remove()
        raise AssertionError(f"{module} runs {linear}")

    def collect(self, inputs_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a linear layer reads, (tokens, inputs) on the host."""
        return torch.cat([inputs_of(row)[0].cpu() for row in self._rows()])

    def quantize(self, names: tuple[str, ...], inputs_of: Callable[[Tensor], Tensor]) -> None:
        """Quantise linear layers that read the same inputs."""
        if self._in_8_bits.issuperset(names):
            self._round(names)
            return
        inputs = self.collect(inputs_of)
        self._quantize(names, _Moments(inputs, torch.ones(len(inputs)), self._device))

    def quantize_into_residual(self, name: str, inputs: Tensor) -> None:
        """Quantise a linear layer that adds to the hidden states, and let it do so."""
        linear = self._block.get_submodule(name)
        residual = self._hidden.flatten(0, 1)
        if name in self._in_8_bits:
            self._round((name,))
        else:
            sizes = [
                (before + linear(part.to(self._device)).cpu()).pow(2).mean(-1)
                for before, part in zip(_parts(residual), _parts(inputs), strict=True)
            ]
            self._quantize((name,), _Moments(inputs, _counts(torch.cat(sizes)), self._device))
        for before, part in zip(_parts(residual), _parts(inputs), strict=True):
            before += linear(part.to(self._device)).cpu()

    def _round(self, names: tuple[str, ...]) -> None:
        for name in names:
            linear: Any = self._block.get_submodule(name)
            rounded = round_to_nearest(linear.weight, group_size=self._options.group_size, bits=8)
            self.done.weights[name] = rounded
            linear.weight.copy_(rounded.dequantize())

    def _quantize(self, names: tuple[str, ...], moments: _Moments) -> None:
        """Solve linear layers that read the same inputs as one, which is as exact and faster."""
        linears: list[Any] = [self._block.get_submodule(name) for name in names]
        hessian = moments.hessian
        corrects_bias = all(linear.bias is not None for linear in linears)
        if corrects_bias:  # a bias makes up for what all inputs have in common
            hessian = hessian - torch.outer(moments.mean, moments.mean)
        if not hessian.isfinite().all():
            raise CheckpointDamaged(
                f"{names[0]} reads values that are no finite numbers. Fetch the checkpoint's "
                "safetensors files again."
            )
        solved = solve(torch.cat([linear.weight for linear in linears]), hessian, self._options)
        rows = [len(linear.weight) for linear in linears]
        codes, scales = torch.split(solved.codes, rows), torch.split(solved.scales, rows)
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            own = QuantizedWeight(codes[index], scales[index], solved.group_size)
            weight = own.dequantize()
            self.done.weights[name] = own
            self.done.errors[name] = output_error(linear.weight, weight, hessian)
            if corrects_bias:
                lost = (linear.weight - weight).double() @ moments.mean
                linear.bias.copy_(linear.bias + lost.float())
                self.done.biases[name] = linear.bias.clone()
            linear.weight.copy_(weight)


def _parts(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, _MOMENT_TOKENS)


def _counts(sizes: Tensor) -> Tensor:
    """Weigh tokens by what an error would do to them.

    The next norm divides by the residual's size, and the first token of a text has activations
    that are hundreds of times larger in most models. Counted as it is, it would outweigh all
    others; divided by the square of its size, it would be one of many, though every other token
    attends to it in every later layer, so that its errors reach them all. Divided by the size it
    counts as much as some hundred tokens, and being always nearly the same costs others little.

    Args:
        sizes: (tokens,) mean square of each token's hidden state.
    """
    return (sizes.median() / sizes.clamp_min(1e-12)).sqrt()
