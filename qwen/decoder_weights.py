"""A loaded Transformers model → the weights of the decoder, by reference, with fused projections.

The one place that knows how Qwen v1 and the Qwen2 layout name their parts. Where projections of the
same input are joined, the model's own layers become views of the joined memory, so that no weight
is held twice (of 4-bit ones the scales are) and the model still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen.cpu_kernels import CpuKernels
from qwen.int8_linear import Int8Linear, Int8Rows
from qwen.mapped_memory import drop_pages
from qwen.quantized import Int4Linear

LinearMap = Callable[..., Tensor]


class DecoderUnsupported(Exception):
    """The decoder does not run this model; the text says why, for the log."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: four linear maps and two norms."""

    input_norm: Tensor
    qkv: LinearMap
    attention_output: LinearMap
    mlp_norm: Tensor
    gate_up: LinearMap
    down: LinearMap

    @property
    def linears(self) -> tuple[LinearMap, ...]:
        """The linear maps, in the order in which they are used."""
        return self.qkv, self.attention_output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model.

    Attributes:
        embedding: (vocab_size, hidden_size).
        layers: In order.
        norm: Of the last hidden states.
        head: Hidden states → logits.
        eps: Of all norms.
        num_kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        scale: Factor of the attention's scores.
        inv_freq: (rotary_dim / 2,), of a Qwen2 layout; None is Qwen v1.
        rotary_scale: Factor of cosines and sines.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: LinearMap
    eps: float
    num_kv_heads: int
    head_dim: int
    scale: float
    inv_freq: Tensor | None
    rotary_scale: float

    @property
    def linears(self) -> tuple[LinearMap, ...]:
        """All linear maps."""
        return (self.head, *(linear for layer in self.layers for linear in layer.linears))


def check_model(model: Any) -> None:
    """Refuse models that the decoder does not run.

    Raises:
        DecoderUnsupported: With the reason.
    """
    kind = getattr(model.config, "model_type", None)
    if kind not in ("qwen", "qwen2") or not isinstance(model, nn.Module):
        raise DecoderUnsupported(f"models of type {kind} have no decoder")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise DecoderUnsupported(f"its weights lie on {', '.join(sorted(devices))}")
    if any(type(parameter.data) is not Tensor for parameter in model.parameters()):
        raise DecoderUnsupported("its weights are shared out over several processes")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise DecoderUnsupported("it has an adapter that is not merged")
    if kind == "qwen2":
        _check_qwen2(model)


def _check_qwen2(model: Any) -> None:
    others = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise DecoderUnsupported(f"it has layers of {', '.join(sorted(others))}")
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope not in ("default", "linear", "yarn", "llama3"):
        raise DecoderUnsupported(f"its rotary embedding is of type {rope}")


def collect_weights(model: Any, *, kernels: CpuKernels | None) -> DecoderWeights:
    """Collect a model's weights; changes the model where projections are joined or quantised.

    Args:
        model: One that `check_model` passes.
        kernels: Quantise dense layers for these kernels, each in the place of the
            dense one; None leaves them as they are.
    """
    is_v1 = model.config.model_type == "qwen"
    parts = _qwen1_layers(model) if is_v1 else _qwen2_layers(model)
    dtype = torch.float32 if kernels else model.dtype
    layers = tuple(
        LayerWeights(
            input_norm=_vector(norms[0], dtype),
            qkv=_joined(attention, "qkv", kernels),
            attention_output=_joined(attention, "output", kernels),
            mlp_norm=_vector(norms[1], dtype),
            gate_up=_joined(mlp, "gate_up", kernels),
            down=_joined(mlp, "down", kernels),
        )
        for norms, attention, mlp in parts
    )
    config, base = model.config, model.transformer if is_v1 else model.model
    heads = config.num_attention_heads
    head_dim = config.head_dim if is_v1 else base.layers[0].self_attn.head_dim
    rotary = None if is_v1 else base.rotary_emb
    return DecoderWeights(
        embedding=model.get_input_embeddings().weight.detach(),
        layers=layers,
        norm=_vector(base.ln_f if is_v1 else base.norm, dtype),
        head=_joined({"head": [(model, "lm_head")]}, "head", kernels),
        eps=config.layer_norm_epsilon if is_v1 else config.rms_norm_eps,
        num_kv_heads=heads if is_v1 else config.num_key_value_heads,
        head_dim=head_dim,
        scale=base.h[0].attn.scaling if is_v1 else base.layers[0].self_attn.scaling,
        inv_freq=None if rotary is None else rotary.inv_freq.float(),
        rotary_scale=1.0 if rotary is None else float(rotary.attention_scaling),
    )


#: Where a linear layer is: the module that holds it, and its name there.
_Place = tuple[nn.Module, str]
_Layer = tuple[tuple[Any, Any], dict[str, list[_Place]], dict[str, list[_Place]]]


def _qwen1_layers(model: Any) -> list[_Layer]:
    return [
        (
            (block.ln_1, block.ln_2),
            {"qkv": [(block.attn, "c_attn")], "output": [(block.attn, "c_proj")]},
            {
                "gate_up": [(block.mlp, "w2"), (block.mlp, "w1")],
                "down": [(block.mlp, "c_proj")],
            },
        )
        for block in model.transformer.h
    ]


def _qwen2_layers(model: Any) -> list[_Layer]:
    return [
        (
            (layer.input_layernorm, layer.post_attention_layernorm),
            {
                "qkv": [(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")],
                "output": [(layer.self_attn, "o_proj")],
            },
            {
                "gate_up": [(layer.mlp, "gate_proj"), (layer.mlp, "up_proj")],
                "down": [(layer.mlp, "down_proj")],
            },
        )
        for layer in model.model.layers
    ]


def _vector(norm: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = norm.weight.detach().to(dtype).contiguous()
    return weight


def _joined(part: dict[str, list[_Place]], name: str, kernels: CpuKernels | None) -> LinearMap:
    """Return one map for the layers of a part, which become views of its memory."""
    places = part[name]
    layers: list[Any] = [getattr(parent, child) for parent, child in places]
    if all(type(layer) is nn.Linear for layer in layers):
        if kernels is not None:
            return _join_int8(places, layers, kernels)
        return layers[0] if len(layers) == 1 else _join_dense(layers)
    if not all(
        isinstance(layer, nn.Linear | Int4Linear | Int8Linear | Int8Rows) for layer in layers
    ):
        raise DecoderUnsupported(f"its {name} is a {type(layers[0]).__name__}")
    if len(layers) == 1:
        only: LinearMap = layers[0]
        return only
    return Int4Linear.joined(layers) if Int4Linear.can_join(layers) else SideBySide(layers)


def _join_int8(places: list[_Place], layers: list[nn.Linear], kernels: CpuKernels) -> Int8Linear:
    joined = Int8Linear.from_linears(layers, kernels=kernels)
    start = 0
    for (parent, child), layer in zip(places, layers, strict=True):
        is_whole = len(layers) == 1
        view = joined if is_whole else joined.rows(start, start + layer.out_features)
        setattr(parent, child, view)
        if not _is_embedding(parent, layer.weight):
            drop_pages(layer.weight)
        start += layer.out_features
    return joined


def _is_embedding(parent: nn.Module, weight: Tensor) -> bool:
    """Tell whether an output matrix is also the embedding of the model that holds it."""
    get: Any = getattr(parent, "get_input_embeddings", None)
    return get is not None and get().weight.data_ptr() == weight.data_ptr()


def _join_dense(layers: list[nn.Linear]) -> nn.Linear:
    first = layers[0]
    sizes = [layer.out_features for layer in layers]
    has_bias = first.bias is not None
    with torch.no_grad():
        joined = nn.Linear(first.in_features, sum(sizes), bias=has_bias, device="meta")
        for name in ("weight", "bias") if has_bias else ("weight",):
            whole = torch.cat([getattr(layer, name) for layer in layers])
            setattr(joined, name, nn.Parameter(whole, requires_grad=False))
            for layer, view in zip(layers, torch.split(whole, sizes), strict=True):
                getattr(layer, name).data = view
    return joined


class SideBySide(nn.Module):
    """Layers of the same input that cannot be joined, for example of different precisions."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the last dimension by each layer and concatenate the results."""
        return torch.cat([part(inputs) for part in self.parts], dim=-1)
