"""The sizes of a model from its configuration or the headers of its files; no weight is read.

A configuration's model is built by Transformers on the meta device, where tensors have shapes but
no memory. Knows no name of a checkpoint and no machine.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen.auto import register_qwen
from qwen.checkpoint_files import load_json, weight_files
from qwen.errors import CheckpointDamaged, CheckpointError, CheckpointUnsupported
from qwen.gguf_header import GgufHeader
from qwen.memory_model import ModelShape

#: Names of floating-point types in safetensors and in torch.
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

#: A GGUF file's settings, behind the name of its architecture.
_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "context_length": "context_length",
}


def shape_of_config(values: Mapping[str, Any]) -> ModelShape:
    """Count the parameters of a `config.json`.

    Raises:
        CheckpointDamaged: The values contradict each other or lack sizes.
        CheckpointUnsupported: Of a kind that is not known here, or no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register_qwen()
    auto: Any = AutoModelForCausalLM
    values = {name: value for name, value in values.items() if name != "auto_map"}
    quantization = values.pop("quantization_config", None)
    kind = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **values) if kind in CONFIG_MAPPING else None
        if config is None or type(config) not in auto._model_mapping:
            raise CheckpointUnsupported(
                f"The memory of a model of the kind {kind!r} cannot be counted: it is none that "
                "this version runs. Choose another checkpoint."
            )
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    except CheckpointError:
        raise
    except Exception as error:  # of Transformers' own checks and of torch's, of many types
        raise CheckpointDamaged(
            "The sizes in config.json contradict each other. Fetch this file again."
        ) from error
    shape = _counted(model, config.get_text_config())
    dtype = values.get("dtype") or values.get("torch_dtype")
    if isinstance(dtype, str) and dtype in _STORED.values():
        shape = replace(shape, stored_dtype=dtype)
    return _packed(shape, quantization, model)


def _counted(model: Any, config: Any) -> ModelShape:
    from torch import nn

    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    is_tied = bool(config.tie_word_embeddings)
    head = 0 if output is None or is_tied else output.weight.numel()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not output
    )
    # Tied weights are one tensor twice on the meta device, too, but only once they are loaded.
    total = sum(weight.numel() for weight in model.parameters())
    if is_tied and output is not None and output.weight is not embedding:
        total -= output.weight.numel()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    is_v1 = config.model_type == "qwen"
    return ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // (2 if is_v1 else 1),
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        context_length=read_context_length(config),
        embedding=embedding.numel(),
        head=head,
        linear=linear,
        other=total - embedding.numel() - head - linear,
        caches_int8=bool(getattr(config, "use_cache_quantization", False)),
        model_type=config.model_type,
    )


def _packed(shape: ModelShape, quantization: object, model: Any) -> ModelShape:
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "gptq":
        return shape
    bits, size = quantization.get("bits"), quantization.get("group_size")
    if bits not in (4, 8) or not isinstance(size, int) or not (size > 0 or size == -1):
        raise CheckpointUnsupported(
            f"A GPTQ checkpoint of {bits} bits in groups of {size} is not read. Choose one of 4 or "
            "8 bits."
        )
    dense, wide = _counted_apart(model, quantization, shape)
    size = shape.hidden_size if size == -1 else size
    # Codes, scales of two bytes and packed zeros; the rest is not packed.
    usual = shape.linear - dense - wide
    stored = usual * bits // 8 + usual // size * (2 + bits // 8) + wide + wide // size * 3
    stored += 2 * (shape.parameters - shape.linear + dense)
    shape = replace(shape, linear=usual, other=shape.other + dense + wide)
    return replace(shape, bits=bits, group_size=size, stored_dtype=None, stored_bytes=stored)


def _counted_apart(
    model: Any, quantization: Mapping[str, Any], shape: ModelShape
) -> tuple[int, int]:
    """Count weights that differ from the rest: dense ones, and of 8 bits among ones of 4.

    Both are dense once they are loaded.
    """
    if not quantization.get("dynamic"):
        return 0, 0
    from torch import nn

    from qwen.gptq_format import parse_gptq_config

    config = parse_gptq_config(quantization, name=f"a {shape.model_type} model")
    output = model.get_output_embeddings()
    dense = wide = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is output:
            continue
        own = config.for_layer(name)
        if own is None:
            dense += module.weight.numel()
        elif own.bits != config.bits:
            wide += module.weight.numel()
    return dense, wide


def read_context_length(config: Any) -> int:
    """Return the tokens of prompt and reply that a model is good for, from its config.

    A Qwen v1 model with dynamic NTK was published and measured up to four times the length that
    it was trained on (Qwen's README of September 2023: 8,192 to 32k, 2,048 to 8k).
    """
    config = config.get_text_config()
    if config.model_type != "qwen":
        return int(config.max_position_embeddings)
    stretched: int = config.seq_length * (4 if config.use_dynamic_ntk else 1)
    return max(stretched, config.max_position_embeddings or 0)


def shape_of_folder(folder: Path) -> ModelShape:
    """Count the parameters of the checkpoint in a folder, and see how its files hold them.

    Raises:
        CheckpointDamaged: config.json or a header cannot be read.
        CheckpointUnsupported: As `shape_of_config`.
    """
    shape = shape_of_config(load_json(folder / "config.json"))
    counts, size = _stored_types(folder)
    only = next(iter(counts)) if len(counts) == 1 else None
    return replace(shape, stored_dtype=_STORED.get(only or ""), stored_bytes=size)


def _stored_types(folder: Path) -> tuple[Counter[str], int]:
    """Return how many tensors of each type a folder's weights hold, and the files' bytes."""
    counts: Counter[str] = Counter()
    size = 0
    for name in weight_files(folder):
        path = folder / name
        try:
            size += path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, 1 << 28)))
            counts.update(e["dtype"] for key, e in header.items() if key != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise CheckpointDamaged(
                f"{path} is damaged: it does not begin as a safetensors file does. Fetch this "
                "file again."
            ) from None
    return counts, size


def shape_of_gguf(header: GgufHeader) -> ModelShape:
    """Count the parameters of a GGUF file.

    Raises:
        CheckpointUnsupported: It is no language model with an embedding and attention layers.
    """
    kind = header.values.get("general.architecture")
    try:
        sizes: dict[str, Any] = {
            name: int(header.values[f"{kind}.{key}"]) for name, key in _GGUF_SIZES.items()
        }
        embedding = header.shapes["token_embd.weight"]
    except (KeyError, ValueError):
        raise CheckpointUnsupported(
            f"The memory of a GGUF file of the architecture {kind!r} cannot be counted: it lacks "
            "sizes of a language model. Choose another file."
        ) from None
    matrices = {name: shape for name, shape in header.shapes.items() if len(shape) == 2}
    head = math.prod(matrices.get("output.weight", (0,)))
    linear = sum(math.prod(s) for name, s in matrices.items() if name.startswith("blk."))
    heads = sizes["num_heads"]
    return ModelShape(
        **sizes,
        vocab_size=embedding[-1],
        num_kv_heads=int(header.values.get(f"{kind}.attention.head_count_kv") or heads),
        head_dim=int(
            header.values.get(f"{kind}.attention.key_length") or sizes["hidden_size"] // heads
        ),
        embedding=math.prod(embedding),
        head=head,
        linear=linear,
        other=header.num_weights - math.prod(embedding) - head - linear,
    )
