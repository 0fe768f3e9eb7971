"""GPTQ checkpoints, rounded to nearest from dense ones, and their dense twins."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen.gptq_format import GptqConfig, GptqTensors, dequantize, pack_codes, pack_zeros

WEIGHTS = "model.safetensors"
#: The linear layers of both layouts.
LINEARS = re.compile(r"\.(c_attn|c_proj|w1|w2|[qkvo]_proj|(up|gate|down)_proj)\.weight$")
#: As the published Qwen-7B-Chat-Int4 says it.
PUBLISHED = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}


def round_weight(weight, config, *, bias=None):
    """Round (out, in) float weights to GPTQ tensors, each group by itself."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    index = config.group_index(inputs).long()
    top = (1 << config.bits) - 1
    scales, zeros = [], []
    for group in range(config.groups(inputs)):
        part = weight[:, index == group].float()
        if config.sym:
            scale = part.abs().amax(1) * 2 / top
            zero = torch.full_like(scale, (top + 1) / 2)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / top
            zero = (-low / scale).round()
        scales.append(scale)
        zeros.append(zero)
    scale, zero = torch.stack(scales).half(), torch.stack(zeros).clamp(0, top)
    codes = (weight.t().float() / scale.float()[index] + zero[index]).round().clamp(0, top)
    return GptqTensors(
        qweight=pack_codes(codes.to(torch.uint8), bits=config.bits),
        qzeros=pack_zeros(zero.to(torch.uint8), bits=config.bits),
        scales=scale,
        g_idx=config.group_index(inputs),
        bias=torch.zeros(outputs, dtype=torch.float16) if bias is None else bias.half(),
    )


def quantize_folder(source, target, config=None, *, only=LINEARS, zero_biases=True):
    """Write a GPTQ checkpoint of a dense one, as AutoGPTQ does it: every layer has a bias.

    Returns:
        The new folder, and a dense one with the weights that it means.
    """
    config = config or GptqConfig(group_size=32)
    dense = Path(target).with_name(f"{Path(target).name}-dense")
    tensors = load_file(source / WEIGHTS)
    twin = dict(tensors)
    for name in [name for name in tensors if only.search(name)]:
        path = name.removesuffix(".weight")
        own = config.for_layer(path)
        if own is None:
            continue
        stored = round_weight(tensors.pop(name), own, bias=tensors.pop(f"{path}.bias", None))
        twin[name] = dequantize(stored, own)
        if f"{path}.bias" in twin:
            twin[f"{path}.bias"] = stored.bias.float()
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            if part != "bias" or zero_biases or f"{path}.bias" in twin:
                tensors[f"{path}.{part}"] = getattr(stored, part)
    for folder, weights in ((target, tensors), (dense, twin)):
        shutil.copytree(source, folder)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    written = config.to_dict()
    keys = {"bits", "group_size", "sym", "dynamic"} & written.keys()
    settings = PUBLISHED | {key: written[key] for key in keys}
    edit_json(Path(target) / "config.json", quantization_config=settings)
    return Path(target), dense


def edit_json(path, **changes):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
