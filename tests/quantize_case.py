"""Tiny checkpoints to quantise, and what became of them."""

from __future__ import annotations

from tiny_layouts import weights_of, write_qwen2
from tiny_v1 import write_tiny_v1

from qwen.gptq_format import GptqConfig, GptqTensors, dequantize
from qwen.loading import load_folder
from qwen.quantize import quantize_checkpoint
from qwen.quantize_options import QuantizeOptions


def write_sources(folder):
    """Write a dense checkpoint of each layout."""
    write_tiny_v1(folder / "qwen")
    write_qwen2(folder / "qwen2", intermediate_size=128)
    return folder


def options(**changes):
    """Those of a tiny checkpoint, in 4 bits everywhere unless a test asks for more."""
    tiny = {"group_size": 32, "samples": 6, "sequence_length": 48, "max_loss": None}
    return QuantizeOptions(**tiny | changes)


def run(source, target, report=lambda step, **_: None, **changes):
    return quantize_checkpoint(source, target, options(**changes), device="cpu", report=report)


def linears_of(weights):
    return sorted(name.removesuffix(".qweight") for name in weights if name.endswith(".qweight"))


def dequantised(folder, group_size=32):
    """The weights of a quantised checkpoint as a dense one would hold them, float32."""
    weights = weights_of(folder)
    config = GptqConfig(group_size=group_size)
    for name in linears_of(weights):
        parts = ("qweight", "qzeros", "scales", "g_idx")
        tensors = GptqTensors(*(weights.pop(f"{name}.{part}") for part in parts))
        weights[f"{name}.weight"] = dequantize(tensors, config)
    return {name: tensor.float() for name, tensor in weights.items()}


def load_dequantised(dense, quantised):
    """The dense model with a quantised checkpoint's weights."""
    model, _ = load_folder(dense)
    model.load_state_dict(dequantised(quantised))
    return model


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
