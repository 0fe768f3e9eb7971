"""What the published Qwen v1 computes, written a second time: slow, plain, one sequence, no cache.

Follows docs/qwen_v1.md and what the golden data say of the published code; shares no code with
`qwen/`. Sums are in float64; only the rotary angles are in float32, in which checkpoints were
trained. Also makes up checkpoints: random tensors under the published names.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 96,
    "seq_length": 32,
    "max_position_embeddings": 256,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "use_flash_attn": "auto",
    "no_bias": True,
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": True,
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "onnx_safe": None,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "transformers_version": "4.32.0",
}


def random_weights(config, seed=0):
    """Make up all tensors, large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=None):
        return torch.randn(shape, generator=generator) * (scale or 1.5 / math.sqrt(shape[-1]))

    hidden, half = config["hidden_size"], config["intermediate_size"] // 2
    shapes = {"attn.c_proj": (hidden, hidden), "mlp.w1": (half, hidden), "mlp.w2": (half, hidden)}
    shapes["mlp.c_proj"] = (hidden, half)
    weights = {
        "transformer.wte.weight": draw(config["vocab_size"], hidden, scale=1.0),
        "transformer.ln_f.weight": 1 + draw(hidden, scale=0.3),
        "lm_head.weight": draw(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            weights[f"{prefix}{norm}.weight"] = 1 + draw(hidden, scale=0.3)
        weights[prefix + "attn.c_attn.weight"] = draw(3 * hidden, hidden)
        weights[prefix + "attn.c_attn.bias"] = draw(3 * hidden, scale=0.3)
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = draw(*shape)
            if not config["no_bias"]:
                weights[f"{prefix}{name}.bias"] = draw(shape[0], scale=0.3)
    return weights


def write_checkpoint(folder: Path, config, weights):
    """Write `config.json` and two shards with their index, as the hub publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        tensors = {name: weights[name] for name in part}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def alpha_of(prompt_length, config):
    """Tell by how much the rotary base of a prompt is stretched."""
    if not config["use_dynamic_ntk"]:
        return 1
    doublings = math.ceil(math.log2(prompt_length / config["seq_length"]) + 1)
    return max(2**doublings - 1, 1)


def reference_logits(weights, config, ids, prompt_length=None, rows=None):
    """Compute the logits of one sequence, (rows, vocab_size), in evaluation.

    Args:
        weights: By the published names.
        config: The keys of config.json.
        ids: A list of token ids: the prompt and what was generated after it.
        prompt_length: How many of them are the prompt; by default all.
        rows: Only of so many last positions, which one layer allows; by default all.
    """
    assert rows is None or config["num_hidden_layers"] == 1
    w = {name: tensor.double() for name, tensor in weights.items()}
    alpha = alpha_of(prompt_length or len(ids), config)
    x = w["transformer.wte.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        part = {
            name.removeprefix(f"transformer.h.{layer}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        rows = rows or len(ids)
        attended = _attention(_norm(x, part["ln_1.weight"], config), part, config, alpha, rows)
        x = x[-rows:] + attended
        x = x + _mlp(_norm(x, part["ln_2.weight"], config), part)
    return _norm(x, w["transformer.ln_f.weight"], config) @ w["lm_head.weight"].T


def reference_reply(weights, config, prompt, count):
    """Continue a prompt greedily by so many tokens, with a whole forward for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference_logits(weights, config, ids, len(prompt))[-1].argmax()))
    return ids[len(prompt) :]


def _norm(x, weight, config):
    return x / (x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt() * weight


def _linear(x, part, name):
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0.0)


def _mlp(x, part):
    gate = _linear(x, part, "mlp.w2")
    gate = gate / (1 + torch.exp(-gate))
    return _linear(_linear(x, part, "mlp.w1") * gate, part, "mlp.c_proj")


def _attention(x, part, config, alpha, rows):
    length, size = len(x), config["kv_channels"]
    fused = _linear(x, part, "attn.c_attn")
    is_future = torch.arange(length)[None] > torch.arange(length - rows, length)[:, None]
    outputs = []
    for head in range(config["num_attention_heads"]):
        start = head * size
        q, k, v = (
            fused[:, offset + start : offset + start + size]
            for offset in (0, config["hidden_size"], 2 * config["hidden_size"])
        )
        q, k = _rotate(q, config, alpha), _rotate(k, config, alpha)
        if config["use_logn_attn"]:
            q = q * _logn(length, config)
        scores = q[-rows:] @ k.T
        if config["scale_attn_weights"]:
            scores = scores / math.sqrt(size)
        outputs.append(torch.softmax(scores.masked_fill(is_future, -math.inf), dim=-1) @ v)
    return _linear(torch.cat(outputs, dim=-1), part, "attn.c_proj")


def _rotate(x, config, alpha):
    dim = int(config["kv_channels"] * config["rotary_pct"])
    base = config["rotary_emb_base"] * alpha ** (dim / (dim - 2))
    positions = torch.arange(len(x), dtype=torch.float32)
    columns = list(x.unbind(-1))
    for i in range(dim // 2):
        angle = (positions * torch.tensor(base ** (-2 * i / dim), dtype=torch.float32)).double()
        first, second = x[:, i], x[:, i + dim // 2]
        columns[i] = first * angle.cos() - second * angle.sin()
        columns[i + dim // 2] = second * angle.cos() + first * angle.sin()
    return torch.stack(columns, dim=-1)


def _logn(length, config):
    seq_length = config["seq_length"]
    factors = [
        math.log(p + 1) / math.log(seq_length) if p + 1 > seq_length else 1.0 for p in range(length)
    ]
    return torch.tensor(factors, dtype=torch.float64)[:, None]
