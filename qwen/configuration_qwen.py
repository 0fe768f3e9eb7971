"""The configuration of a Qwen v1 checkpoint (`model_type` "qwen") under its published key names.

Reads the files of both releases: August 2023 (`n_embd`, `n_layer`, ...) and later. Knows no torch
and no weights. What is published stays as it is: keys are never renamed in what is saved, and keys
that nobody here knows survive.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from qwen.errors import CheckpointDamaged, InvalidSetting

#: The published switches of the precision, at most one of them true, and torch's names for them.
PRECISION_FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class QWenConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes and switches of a Qwen v1 model.

    Args:
        intermediate_size: Twice the width of the MLP: `w1` and `w2` are half as wide each.
        kv_channels: Size of a head; None is `hidden_size / num_attention_heads`.
        seq_length: Tokens that the model was trained on. Dynamic NTK and log-n start past it.
        max_position_embeddings: What the publisher says that the model can read; no limit here.
        rotary_pct: Part of a head that is rotated.
        use_dynamic_ntk: Stretch the rotary base for prompts longer than `seq_length`.
        use_logn_attn: Sharpen the queries past `seq_length`.
        use_flash_attn: True asks for FlashAttention 2; "auto" and False take torch's own kernels.
        use_cache_quantization: Cache keys and values in int8, see `qwen.int8_cache`.
        use_cache_kernel: Published, without effect: the int8 cache needs no kernel file.
        bf16: Precision of the weights when nothing else is asked for; likewise `fp16`, `fp32`.
        no_bias: Whether all linear layers but `c_attn` are without bias.
        pad_token_id: For `generate`, which prefers that of its generation config.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    #: How a model is cut over the processes of a group; see `qwen.tensor_parallel`.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "packed_qkv_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.w1": "colwise",
        "h.*.mlp.w2": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    #: The names of August 2023, and `head_dim`, by which Transformers asks.
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "attn_pdrop": "attn_dropout_prob",
        "embd_pdrop": "emb_dropout_prob",
        "head_dim": "kv_channels",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int | None = None
    intermediate_size: int = 22016
    seq_length: int = 8192
    max_position_embeddings: int | None = 8192
    rotary_emb_base: float = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: bool | str = "auto"
    use_cache: bool = True
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    emb_dropout_prob: float = 0.0
    attn_dropout_prob: float = 0.0
    scale_attn_weights: bool = True
    no_bias: bool = True
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    tokenizer_class: str | None = "QWenTokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.kv_channels is None and self.num_attention_heads:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        for problem in self._problems():
            raise CheckpointDamaged(
                f"The model's configuration is inconsistent: {problem} Fetch config.json again, "
                "or correct it."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a file's keys; a precision flag among the keyword arguments replaces theirs.

        Raises:
            InvalidSetting: More than one precision is asked for.
            CheckpointDamaged: The keys contradict each other.
        """
        asked = [name for name in PRECISION_FLAGS if kwargs.get(name)]
        if len(asked) > 1:
            raise InvalidSetting(
                f"Only one precision can be chosen, not {' and '.join(asked)}. Leave out the "
                "others."
            )
        if asked:
            kwargs |= {name: name in asked for name in PRECISION_FLAGS}
        return super().from_dict(config_dict, **kwargs)

    @property
    def rotary_dim(self) -> int:
        """Size of the rotated part of a head."""
        return int(self._head_dim * self.rotary_pct)

    @property
    def projection_size(self) -> int:
        """Width of queries, keys and values over all heads."""
        return self._head_dim * self.num_attention_heads

    @property
    def flagged_dtype(self) -> str | None:
        """Name in torch of the precision that a flag asks for; None: the device decides."""
        return next((dtype for flag, dtype in PRECISION_FLAGS.items() if getattr(self, flag)), None)

    def ntk_alpha(self, prompt_length: int) -> int:
        """Tell by how much the rotary base is stretched for a prompt of so many tokens."""
        if not self.use_dynamic_ntk:
            return 1
        doublings = (max(prompt_length, 1) - 1) // self.seq_length
        return int(2 ** (doublings.bit_length() + 1) - 1)

    @property
    def _head_dim(self) -> int:
        assert self.kv_channels is not None
        return self.kv_channels

    def _problems(self) -> list[str]:
        problems = []
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if not _is_count(getattr(self, key)):
                problems.append(f"{key} must be a positive whole number, not {getattr(self, key)}.")
        if problems:
            return problems
        if not _is_count(self.kv_channels) or self.projection_size != self.hidden_size:
            problems.append(
                f"kv_channels ({self.kv_channels}) times num_attention_heads "
                f"({self.num_attention_heads}) must equal hidden_size ({self.hidden_size})."
            )
        elif (
            not _is_number(self.rotary_pct)
            or self.rotary_dim % 2
            or not 2 < self.rotary_dim <= self._head_dim
        ):
            problems.append(
                f"rotary_pct ({self.rotary_pct}) of kv_channels ({self.kv_channels}) must be an "
                "even number above 2 and no larger than the head."
            )
        if not _is_count(self.intermediate_size) or self.intermediate_size % 2:
            problems.append(
                f"intermediate_size ({self.intermediate_size}) must be even: w1 and w2 are half of "
                "it wide each."
            )
        if not _is_count(self.seq_length) or self.seq_length < 2:
            problems.append(f"seq_length must be at least 2 tokens, not {self.seq_length}.")
        if not _is_number(self.rotary_emb_base) or self.rotary_emb_base <= 0:
            problems.append(
                f"rotary_emb_base must be a positive number, not {self.rotary_emb_base}."
            )
        if sum(bool(getattr(self, flag)) for flag in PRECISION_FLAGS) > 1:
            problems.append("at most one of bf16, fp16 and fp32 can be true.")
        return problems


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
