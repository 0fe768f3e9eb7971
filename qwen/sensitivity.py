"""Which linear layers a model's answers depend on most, and which of them get 8 bits for it.

What rounding one matrix to 4 bits costs is estimated for all of them in one pass: with labels y
drawn from the model's own distribution, KL(dense ‖ rounded) is about ½ · mean((g · ΔW x)²) over
tokens, where g is the gradient of -log p(y) at the layer's output (the Fisher information, to
second order). Knows no files; changes no weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen.backend import ReportProgress
from qwen.gptq_format import GptqConfig, LayerRule
from qwen.gptq_solver import round_to_nearest
from qwen.quantize_layout import BlockLayout

#: Rows that the estimate reads, one of each kind of text, and tokens of each at most.
_ROWS, _TOKENS = 3, 512


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
    model: Any,
    layout: BlockLayout,
    ids: Tensor,
    *,
    group_size: int,
    report: ReportProgress,
) -> list[Part]:
    """Estimate what each part of a model loses in 4 bits.

    Args:
        model: The dense one, without gradients.
        layout: Of the model.
        ids: (rows, seq_len) int64; the first few rows are read.
        group_size: Of the rounding.
        report: Is told what is being done.
    """
    blocks = model.get_submodule(layout.layers)
    paths = [(index, name) for index in range(len(blocks)) for name in layout.linears]
    linears = {path: blocks[path[0]].get_submodule(path[1]) for path in paths}
    watch = _Watch(group_size)
    hooks = [linear.register_forward_hook(watch.hook(path)) for path, linear in linears.items()]
    rows = ids[:_ROWS, :_TOKENS]
    try:
        for number, row in enumerate(rows, start=1):
            _backward(model, layout, row, seed=number)
            report(f"Looking which layers need 8 bits: text {number} of {len(rows)} read")
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Part(
            layer=index,
            names=names,
            size=sum(linears[index, name].weight.numel() for name in names),
            loss=sum(watch.losses[index, name] for name in names) / rows.numel(),
        )
        for index in range(len(blocks))
        for names in parts_of(layout)
    ]


@dataclass(slots=True)
class _Watch:
    group_size: int
    losses: dict[tuple[int, str], float] = field(default_factory=dict)

    def hook(self, path: tuple[int, str]) -> Any:
        """Return a forward hook that adds a linear layer's loss when the gradient comes back."""
        self.losses[path] = 0.0

        def forward(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Any = linear.weight
            rounded = round_to_nearest(weight, group_size=self.group_size).dequantize()
            with torch.no_grad():
                change = inputs[0].float() @ (weight.float() - rounded).t()

            def backward(gradient: Tensor) -> None:
                felt = (gradient.float() * change).sum(-1)
                self.losses[path] += float(felt.square().sum()) / 2

            output.register_hook(backward)

        return forward


def _backward(model: Any, layout: BlockLayout, row: Tensor, *, seed: int) -> None:
    """Send back the gradient of -log p of labels that the model draws itself."""
    head = model.get_submodule(layout.head).weight
    row = row.to(head.device)
    embedded = model.get_submodule(layout.embedding)(row[None]).requires_grad_()
    with torch.enable_grad():
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False)[0]
    with torch.no_grad():
        chances = nn.functional.linear(hidden[0], head).float().softmax(-1)
        generator = torch.Generator(head.device).manual_seed(seed)
        drawn = torch.multinomial(chances, 1, generator=generator)
        chances.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=chances.dtype))
        gradient = (chances.to(head.dtype) @ head)[None]
    hidden.backward(gradient)
