"""Which linear layers a model's answers depend on most, and which of them get 8 bits for it.

What rounding one matrix to 4 bits costs is estimated for all of them in one pass: with labels y
drawn from the model's own distribution, KL(dense ‖ rounded) is about ½ · mean((g · ΔW x)²) over
tokens, where g is the gradient of -log p(y) at the layer's output (the Fisher information, to
second order). Writes no files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen.backend import ReportProgress
from qwen.errors import CheckpointDamaged
from qwen.gptq_format import GptqConfig, LayerRule
from qwen.gptq_solver import round_to_nearest
from qwen.quantize_layout import BlockLayout, DenseCheckpoint, LayerArguments

#: Rows that the estimate reads, one of each kind of text, and tokens of each at most.
_ROWS, _TOKENS = 3, 512
#: Rows of the output matrix that are in float32 at once.
_HEAD_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Part:
    """Linear layers of a block that read the same inputs; some readers make one matrix of them.

    Attributes:
        layer: Index of the block.
        names: Within the block.
        size: Weights.
        loss: What rounding them to 4 bits costs, nats a token.
    """

    layer: int
    names: tuple[str, ...]
    size: int = 0
    loss: float = 0.0


def parts_of(layout: BlockLayout) -> tuple[tuple[str, ...], ...]:
    """Return the linear layers of a block by what they read."""
    return (
        layout.query_key_value,
        (layout.attention_out,),
        layout.gate_up,
        (layout.mlp_out,),
    )


def choose_parts(parts: Sequence[Part], *, max_loss: float) -> list[Part]:
    """Choose those that get 8 bits: as few weights as leave no more loss than that, about."""
    chosen = sorted(parts, key=lambda part: part.loss / part.size, reverse=True)
    left = 0.0
    while chosen and left + chosen[-1].loss <= max_loss:
        left += chosen.pop().loss
    return chosen


def build_rules(layout: BlockLayout, chosen: Sequence[Part], *, group_size: int) -> dict[str, Any]:
    """Build GPTQModel's `dynamic` for parts in 8 bits; one pattern for each kind of part."""
    rules = []
    for names in parts_of(layout):
        layers = sorted(part.layer for part in chosen if part.names == names)
        if layers:
            numbers = "|".join(map(str, layers))
            paths = "|".join(map(re.escape, names))
            pattern = rf"{re.escape(layout.layers)}\.({numbers})\.({paths})$"
            rules.append(LayerRule(re.compile(pattern), GptqConfig(8, group_size)))
    dynamic: dict[str, Any] = GptqConfig(rules=tuple(rules)).to_dict().get("dynamic", {})
    return dynamic


def measure_parts(
    dense: DenseCheckpoint,
    ids: Tensor,
    *,
    group_size: int,
    device: str,
    report: ReportProgress,
) -> list[Part]:
    """Estimate what each part of a model loses in 4 bits.

    Of the model one layer is in memory at a time, twice in float32; of the text the hidden states
    before every layer.

    Args:
        dense: The checkpoint.
        ids: (rows, seq_len) int64; the first few rows are read.
        group_size: Of the rounding.
        device: Where to compute.
        report: Is told what is being done.

    Raises:
        CheckpointDamaged: What a layer gives is not finite.
    """
    hidden = dense.embed(ids[:_ROWS, :_TOKENS]).to(device)
    arguments = dense.arguments(hidden[:1])
    before = []
    for index in range(dense.count):
        report("Reading a text", done=index, total=dense.count, unit="layers")
        before.append(hidden)
        block = dense.load_layer(index, device=device)
        with torch.no_grad():
            hidden = torch.cat([_run(block, row[None], arguments) for row in hidden])
        if not hidden.isfinite().all():
            raise CheckpointDamaged(
                f"{dense.layout.layers}.{index} gives values that are no finite numbers. Fetch the "
                "checkpoint's safetensors files again."
            )
    gradient = _gradient_at_end(dense, hidden)
    parts: list[Part] = []
    for index in reversed(range(dense.count)):
        report("Looking what it depends on", done=len(before), total=dense.count, unit="layers")
        block = dense.load_layer(index, device=device).requires_grad_(False)
        watch = _Watch(block, dense.layout, group_size)
        inputs = before[index]
        for row in range(len(inputs)):
            leaf = inputs[row : row + 1].detach().requires_grad_()
            output = _run(block, leaf, arguments)
            (found,) = torch.autograd.grad(output, leaf, gradient[row : row + 1])
            gradient[row] = found[0]
        parts += watch.finish(index, tokens=gradient.shape[:2].numel())
    return parts


def _run(block: Any, hidden: Tensor, arguments: LayerArguments) -> Tensor:
    output = block(hidden, **arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _Watch:
    """Adds up what rounding costs while gradients come back through a block."""

    def __init__(self, block: Any, layout: BlockLayout, group_size: int) -> None:
        self._layout = layout
        self._linears = {name: block.get_submodule(name) for name in layout.linears}
        self._losses = dict.fromkeys(self._linears, 0.0)
        self._hooks = [
            linear.register_forward_hook(self._hook(name, linear.weight, group_size))
            for name, linear in self._linears.items()
        ]

    def _hook(self, name: str, weight: Tensor, group_size: int) -> Any:
        lost = (weight - round_to_nearest(weight, group_size=group_size).dequantize()).t()

        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            change = inputs[0].detach() @ lost

            def backward(gradient: Tensor) -> None:
                self._losses[name] += float((gradient * change).sum(-1).square().sum()) / 2

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    def finish(self, layer: int, *, tokens: int) -> list[Part]:
        for hook in self._hooks:
            hook.remove()
        return [
            Part(
                layer=layer,
                names=names,
                size=sum(self._linears[name].weight.numel() for name in names),
                loss=sum(self._losses[name] for name in names) / tokens,
            )
            for names in parts_of(self._layout)
        ]


def _gradient_at_end(dense: DenseCheckpoint, hidden: Tensor) -> Tensor:
    """Return the gradient of -log p of labels that the model draws, at (rows, seq_len, hidden).

    The head's rows are read in pieces, which in float32 would be large together.
    """
    norm, head = dense.load_end(device=str(hidden.device))
    generator = torch.Generator(hidden.device).manual_seed(0)
    gradients = []
    for row in hidden:
        leaf = row.detach().requires_grad_()
        last = norm(leaf)
        parts = torch.split(head, _HEAD_ROWS)
        with torch.no_grad():
            logits = torch.cat([last @ part.float().t() for part in parts], dim=-1)
            chances = logits.softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            chances.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=chances.dtype))
            pieces = zip(torch.split(chances, _HEAD_ROWS, dim=1), parts, strict=True)
            back = torch.stack([piece @ part.float() for piece, part in pieces]).sum(0)
        gradients += torch.autograd.grad(last, leaf, back)
    return torch.stack(gradients)
