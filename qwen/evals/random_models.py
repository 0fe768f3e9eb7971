"""Qwen v1 models of the published sizes with random weights: speed does not depend on values.

Sizes: config.json of the published Qwen-1.8B, 7B, 14B and 72B (late 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwen.configuration_qwen import QWenConfig

#: What a `--random` size is made of; `tiny` is for dry runs on a CPU.
SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "tiny": {"hidden_size": 256, "layers": 2, "heads": 2, "ffn": 512, "seq_length": 2048},
        "1.8b": {"hidden_size": 2048, "layers": 24, "heads": 16, "ffn": 11008, "seq_length": 8192},
        "7b": {"hidden_size": 4096, "layers": 32, "heads": 32, "ffn": 22016, "seq_length": 8192},
        "14b": {"hidden_size": 5120, "layers": 40, "heads": 40, "ffn": 27392, "seq_length": 2048},
        "72b": {"hidden_size": 8192, "layers": 80, "heads": 64, "ffn": 49152, "seq_length": 32768},
    }
)

_GROUP = 128


def random_config(size: str) -> QWenConfig:
    """Return the configuration of a published size, good for 32,768 tokens."""
    shape = SIZES[size]
    return QWenConfig(
        vocab_size=152064 if size in ("14b", "72b") else 151936,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["ffn"],
        seq_length=shape["seq_length"],
        max_position_embeddings=32768,
        kv_channels=128,
        use_dynamic_ntk=size != "72b",
        use_logn_attn=size != "72b",
        no_bias=True,
        tie_word_embeddings=False,
    )


def build_random_model(
    size: str,
    *,
    device: str,
    dtype: torch.dtype,
    weights: Literal["dense", "int4"] = "dense",
    seed: int = 0,
) -> Any:
    """Build a `QWenLMHeadModel` with normally distributed weights, in evaluation mode.

    Args:
        size: A key of `SIZES`.
        device: Where it is made; nothing of it is ever elsewhere.
        dtype: Of everything that is not in 4 bits.
        weights: "int4" puts the layers' linears in 4 bits, groups of 128, as published.
        seed: Of the weights.
    """
    from qwen.modeling_qwen import QWenLMHeadModel

    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model: Any = QWenLMHeadModel(random_config(size))
    if weights == "int4":
        for block in model.transformer.h:
            for name, layer in list(block.named_modules()):
                if isinstance(layer, nn.Linear):
                    block.set_submodule(name, _random_int4(layer, generator, dtype))
    for name, tensor in list(model.named_parameters()):
        if tensor.is_meta:
            values = torch.empty(tensor.shape, dtype=dtype, device=device)
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(_filled(values, name, generator), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, left
    return model.eval()


def _filled(values: Tensor, name: str, generator: torch.Generator) -> Tensor:
    if ".ln_" in name:
        return values.fill_(1.0)
    return values.normal_(0.0, 0.02, generator=generator)


def _random_int4(layer: nn.Linear, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
    from qwen.quantized import Int4Linear

    device = generator.device
    shape = (layer.in_features, layer.out_features)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device, generator=generator)
    groups = (layer.in_features // _GROUP, layer.out_features)
    bias = None
    if layer.bias is not None:
        bias = torch.zeros(layer.out_features, dtype=dtype, device=device)
    return Int4Linear(
        codes,
        torch.full(groups, 0.004, device=device),
        torch.full(groups, 8, dtype=torch.uint8, device=device),
        group_size=_GROUP,
        bias=bias,
    )
