"""config.json and generation_config.json from one layout to the other, and what is refused.

Knows what each layout can express: the same network up to the trained length. Beyond it only
Qwen v1 stretches its rotary base (dynamic NTK) and sharpens its queries (log-n), which the Qwen2
layout cannot say. Knows no tensors and no tokenizer file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from qwen.checkpoint_files import load_json
from qwen.configuration_qwen import QWenConfig
from qwen.convert_map import Layout, ModelSizes
from qwen.errors import CheckpointDamaged, CheckpointUnsupported, InvalidRequest, QwenError

MODEL_TYPES: dict[str, Layout] = {"qwen": "qwen1", "qwen2": "qwen2"}
#: Qwen2 without biases on queries, keys and values: goes to Qwen v1, with zeros for them.
LLAMA = "llama"
LAYOUT_NAMES: dict[Layout, str] = {"qwen1": "Qwen v1", "qwen2": "Qwen2"}

#: Why models that are close to Qwen2 are none.
_NOT_QWEN2 = {
    "qwen3": "normalises queries and keys (q_norm, k_norm)",
    "qwen2_moe": "chooses among experts",
    "qwen3_moe": "chooses among experts",
    LLAMA: "has no biases on queries, keys and values and a tokenizer of its own",
}
#: Switches of Qwen v1 that the Qwen2 layout ignores, kept there for the way back.
_LONG_CONTEXT = ("use_dynamic_ntk", "use_logn_attn")
#: Of generation_config.json: what only Qwen v1 knows, and what is written anew.
_GENERATION_V1 = ("chat_format", "max_window_size", "max_context_size", "max_generate_size")
_GENERATION_IDS = ("stop_words_ids", "bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_NOTES = ("transformers_version", "_from_model_config")
#: As published for Qwen v1; without it Transformers ends a reply after 20 tokens.
_MAX_NEW_TOKENS = 512
#: Values of a quantisation that name modules, and so would name those of the other layout.
_NAMES_MODULES = ("modules_in_block_to_quantize", "modules_to_not_convert", "dynamic")


@dataclass(frozen=True, slots=True)
class SourceModel:
    """What a source's configuration says.

    Attributes:
        trained_length: Tokens up to which both layouts are the same model.
        quantization: Its `quantization_config`; None when the weights are not quantised.
    """

    config: Any
    to: Layout
    sizes: ModelSizes
    trained_length: int
    generation: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None

    @property
    def is_raw(self) -> bool:
        """Whether Qwen v1 files say that this is a base model, without a chat format."""
        return self.generation.get("chat_format") == "raw"

    @property
    def keeps_tokenizer(self) -> bool:
        """Whether the tokenizer is another family's, which no layout of Qwen can express."""
        return bool(self.config.model_type == LLAMA)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Ids of the tokens that end texts and messages."""

    endoftext: int
    im_start: int
    im_end: int


def read_source(folder: Path, *, to: Layout) -> SourceModel:
    """Read what a source is.

    Raises:
        CheckpointDamaged: Its config.json contradicts itself.
        CheckpointUnsupported: The target's layout cannot express it; the message says what.
        InvalidRequest: It has the target's layout already.
    """
    raw = load_json(folder / "config.json")
    _check_layout(raw.get("model_type"), folder, to)
    is_llama = raw["model_type"] == LLAMA
    kind = QWenConfig if to == "qwen2" else LlamaConfig if is_llama else Qwen2Config
    try:
        config: Any = kind.from_pretrained(folder, local_files_only=True)
    except QwenError:
        raise
    except Exception as error:  # of the checks of types, one class for each
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise CheckpointDamaged(
            f"{folder / 'config.json'} is damaged: {reason}. Fetch this file again."
        ) from error
    for problem in _problems_of_qwen1(config) if to == "qwen2" else _problems_of_qwen2(config):
        raise CheckpointUnsupported(f"{folder} cannot be converted: {problem}")
    quantization = _read_quantization(folder, raw)
    generation = folder / "generation_config.json"
    source = SourceModel(
        config=config,
        to=to,
        sizes=_sizes(config, to, quantization),
        trained_length=config.seq_length if to == "qwen2" else config.max_position_embeddings,
        generation=load_json(generation) if generation.exists() else {},
        quantization=quantization,
    )
    if source.generation.get("chat_format", "chatml") not in ("chatml", "raw"):
        raise CheckpointUnsupported(
            f"{generation} names the chat format '{source.generation['chat_format']}', which is "
            "not known. Set chat_format to chatml, or to raw for a base model."
        )
    return source


def _check_layout(model_type: Any, folder: Path, to: Layout) -> None:
    if model_type == LLAMA and to == "qwen1":
        return
    layout = MODEL_TYPES.get(model_type)
    if layout is None:
        why = _NOT_QWEN2.get(model_type)
        raise CheckpointUnsupported(
            f"{folder} cannot be converted: its model_type is '{model_type}'"
            + (f", which {why}" if why else "")
            + ". Only Qwen v1 ('qwen') and Qwen2 ('qwen2': Qwen1.5, Qwen2, Qwen2.5) can express "
            "each other; choose one of these."
        )
    if layout == to:
        raise InvalidRequest(
            f"{folder} has the {LAYOUT_NAMES[to]} layout already. Use it as it is, or choose the "
            "other layout."
        )


def _problems_of_qwen1(config: QWenConfig) -> Iterator[str]:
    if config.rotary_pct != 1:
        yield f"only {config.rotary_pct} of each head is rotated, in Qwen2 all of it is."
    if not config.scale_attn_weights:
        yield "its attention scores are not scaled (scale_attn_weights), those of Qwen2 are."
    if not config.no_bias:
        yield "all its linear layers have biases (no_bias is false), in Qwen2 only q, k and v do."


def _problems_of_qwen2(config: Any) -> Iterator[str]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim * heads != config.hidden_size:
        yield (
            f"{heads} heads of {head_dim} are not its hidden size of {config.hidden_size}; in Qwen "
            "v1 they always are."
        )
    if not 0 < kv_heads <= heads or heads % kv_heads:
        yield f"its {heads} heads cannot share {kv_heads} heads of keys and values evenly."
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", False) or layer_types - {"full_attention"}:
        yield "it attends through a sliding window (use_sliding_window), Qwen v1 to everything."
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, Qwen v1's is silu."
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            yield f"it has biases ({key}) where Qwen v1 has none."
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        yield (
            f"its rotary positions are stretched by '{rope_type}' (rope_scaling); Qwen v1 has only "
            "its own dynamic NTK. Remove rope_scaling from config.json to convert the model as it "
            "was trained."
        )


def _read_quantization(folder: Path, raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = raw.get("quantization_config")
    older = folder / "quantize_config.json"  # of AutoGPTQ, before config.json had the key
    if not found and older.exists():
        found = load_json(older) | {"quant_method": "gptq"}
    if not found:
        return None
    method, bits = found.get("quant_method"), found.get("bits")
    if method != "gptq" or bits not in (2, 4, 8):
        raise CheckpointUnsupported(
            f"{folder} is quantised by '{method}' with {bits} bits; only GPTQ with 2, 4 or 8 bits "
            "is converted without loss. Convert the unquantised checkpoint."
        )
    for key in _NAMES_MODULES:
        if found.get(key):
            raise CheckpointUnsupported(
                f"{folder} quantises some layers only ({key} in its quantization_config), whose "
                "names differ in the other layout. Convert the unquantised checkpoint."
            )
    mapping: Mapping[str, Any] = found
    return mapping


def _sizes(config: Any, to: Layout, quantization: Mapping[str, Any] | None) -> ModelSizes:
    is_v1 = to == "qwen2"
    heads = config.num_attention_heads
    bits = quantization["bits"] if quantization else None
    head_dim = config.hidden_size // heads
    if bits and head_dim * bits % 32:
        raise CheckpointUnsupported(
            f"Heads of {head_dim} channels of {bits} bits share packed numbers, so they cannot be "
            "taken apart. Convert the unquantised checkpoint."
        )
    return ModelSizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads if is_v1 else config.num_key_value_heads,
        mlp=config.intermediate_size // (2 if is_v1 else 1),
        vocabulary=config.vocab_size,
        packed_bits=bits,
        is_tied=bool(config.tie_word_embeddings),
    )


def build_config(
    source: SourceModel, *, dtype: str, ends: EndTokens | None, is_chat: bool
) -> dict[str, Any]:
    """Build the content of the target's config.json.

    Args:
        source: What is converted.
        dtype: Of the unpacked weights, as torch names it.
        ends: For readers that take the end token from here; None keeps the source's tokenizer.
        is_chat: Whether replies end with a message.
    """
    build = _qwen2_config if source.to == "qwen2" else _qwen1_config
    config = build(source) | {"torch_dtype": dtype}  # the key that every release reads
    if ends is None:
        del config["tokenizer_class"]
    elif source.to == "qwen2":
        config["eos_token_id"] = ends.im_end if is_chat else ends.endoftext
        config["pad_token_id"] = ends.endoftext
    if source.quantization:
        config["quantization_config"] = dict(source.quantization)
    return config


def _qwen2_config(source: SourceModel) -> dict[str, Any]:
    config = source.config
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size // 2,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "rope_theta": config.rotary_emb_base,  # Transformers 5 puts it into rope_parameters
        "rms_norm_eps": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attn_dropout_prob,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        **{key: getattr(config, key) for key in _LONG_CONTEXT},
    }


def _qwen1_config(source: SourceModel) -> dict[str, Any]:
    config = source.config
    base = float(config.rope_parameters["rope_theta"])
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size * 2,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_emb_base": int(base) if base.is_integer() else base,
        "rotary_pct": 1.0,
        **{key: getattr(config, key, True) for key in _LONG_CONTEXT},
        "use_flash_attn": "auto",
        "layer_norm_epsilon": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attn_dropout_prob": config.attention_dropout,
        "emb_dropout_prob": 0.0,
        "scale_attn_weights": True,
        "no_bias": True,
        "bf16": False,
        "fp16": False,
        "fp32": False,
        "onnx_safe": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "tokenizer_class": "QWenTokenizer",
    }


def build_generation_config(
    source: SourceModel, *, ends: EndTokens | None, is_chat: bool
) -> dict[str, Any]:
    """Build the content of the target's generation_config.json: the same sampling, other ends."""
    if ends is None:
        return dict(source.generation)
    dropped = {*_GENERATION_V1, *_GENERATION_IDS, *_GENERATION_NOTES}
    sampling = {key: value for key, value in source.generation.items() if key not in dropped}
    if source.to == "qwen2":
        replies = [ends.im_end, ends.im_start, ends.endoftext]
        eos = replies if is_chat else ends.endoftext
        return sampling | {"eos_token_id": eos, "pad_token_id": ends.endoftext}
    ids = {"eos_token_id": ends.endoftext, "pad_token_id": ends.endoftext}
    sampling = {"max_new_tokens": _MAX_NEW_TOKENS} | sampling | ids
    if not is_chat:
        return sampling | {"chat_format": "raw", "stop_words_ids": [[ends.endoftext]]}
    return sampling | {
        "chat_format": "chatml",
        # As published for 8,192 tokens (6,144): the rest is for the query and the reply.
        "max_window_size": source.trained_length * 3 // 4,
        "stop_words_ids": [[ends.im_end], [ends.im_start]],
    }
