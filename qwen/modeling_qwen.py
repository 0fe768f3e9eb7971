"""Qwen v1 (`QWenLMHeadModel`) on the attention and cache interfaces of Transformers 5.

Laid out like Transformers' own models, with the published names of classes and tensors. Differs
from them in two things: the rotary base belongs to a sequence (dynamic NTK, see `qwen.ntk_cache`)
and queries past `seq_length` are sharpened (log-n). `docs/qwen_v1.md` lists where this departs
from the published remote code. Knows no tokenizer and no chat format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from qwen.configuration_qwen import QWenConfig
from qwen.errors import InvalidRequest
from qwen.generation_qwen import QWenGenerationMixin
from qwen.int8_cache import check_model_cache, choose_kv_cache
from qwen.model_inputs import check_inputs, count_tokens, kept_positions, positions_of
from qwen.ntk_cache import sequence_alpha
from qwen.pretrained import PublishedLoading
from qwen.rope import apply_rotary, logn_factor, rotary_tables, scaled_inv_freq

#: cos, sin (batch or 1, seq_len, rotary_dim) and, in evaluation, the log-n factor
#: (batch or 1, seq_len); all float32.
PositionEmbeddings = tuple[Tensor, Tensor, Tensor | None]

_PUBLISHED_BUFFERS = (r"rotary_emb\.inv_freq", r"attn\.masked_bias", r"attn\.logn_tensor")


class QWenRMSNorm(nn.Module):
    """Root mean square norm: normalised in float32, cast back, then weighted."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        exact = hidden_states.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(hidden_states.dtype)


class QWenMLP(nn.Module):
    """Gated MLP. `w2` is the gate and `w1` what it lets through."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map each position by itself."""
        gate = nn.functional.silu(self.w2(hidden_states))
        output: Tensor = self.c_proj(self.w1(hidden_states) * gate)
        return output


class QWenAttention(nn.Module):
    """Multi-head attention with one fused, biased projection to queries, keys and values."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.attention_dropout = config.attn_dropout_prob
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.projection_size, bias=True)
        self.c_proj = nn.Linear(config.projection_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to what is cached and to the new tokens up to each one's own position.

        Args:
            hidden_states: (batch, seq_len, hidden_size).
            position_embeddings: See `PositionEmbeddings`.
            attention_mask: As the attention implementation wants it; None is plain causal.
            past_key_values: Changed: the new keys, rotated, and values are appended.
            **kwargs: For the attention implementation.

        Returns:
            (batch, seq_len, hidden_size), and the attention weights where eager.
        """
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            states.view(*input_shape, -1, self.head_dim).transpose(1, 2)
            for states in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        cos, sin, logn = position_embeddings
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if logn is not None:
            query = query * logn[:, None, :, None]
        query, key = query.to(value.dtype), key.to(value.dtype)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable[..., tuple[Tensor, Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class QWenBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: PositionEmbeddings | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map (batch, seq_len, hidden_size) to the same shape; see `QWenAttention`."""
        attn_output, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        mlp_output: Tensor = self.mlp(self.ln_2(hidden_states))
        return hidden_states + mlp_output


class QWenPreTrainedModel(PublishedLoading, PreTrainedModel):  # type: ignore[no-untyped-call]
    """What all Qwen v1 models share; how they are loaded is in `qwen.pretrained`."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    #: Buffers that some published files hold; they are computed here.
    _keys_to_ignore_on_load_unexpected = [*_PUBLISHED_BUFFERS]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "hidden_states": QWenBlock,
        "attentions": QWenAttention,
    }


class QWenModel(QWenPreTrainedModel):  # type: ignore[no-untyped-call]
    """The layers without the language model's head."""

    _keys_to_ignore_on_load_unexpected = [*_PUBLISHED_BUFFERS, r"lm_head\.weight"]  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_length: Tensor | int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states; the arguments are those of `QWenLMHeadModel.forward`."""
        check_inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            past_key_values,
            prompt_length,
            vocab_size=self.config.vocab_size,
        )
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        check_model_cache(past_key_values, self.config)
        if use_cache and past_key_values is None:
            past_key_values = choose_kv_cache(self.config)()
        if position_ids is None:
            position_ids = positions_of(inputs_embeds, attention_mask, past_key_values)
        if kwargs.get("cache") is not None:
            alpha = self._paged_alpha(position_ids, kwargs["cache"])
        else:
            new_tokens = count_tokens(inputs_embeds, attention_mask)
            alpha = self._alpha(past_key_values, new_tokens, prompt_length)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self._position_embeddings(position_ids, alpha)
        hidden_states = self.drop(inputs_embeds)
        for block in self.h[: self.config.num_hidden_layers]:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _position_embeddings(self, position_ids: Tensor, alpha: Tensor) -> PositionEmbeddings:
        config = self.config
        inv_freq = scaled_inv_freq(alpha, dim=config.rotary_dim, base=config.rotary_emb_base)
        cos, sin = rotary_tables(position_ids, inv_freq)
        sharpened = config.use_logn_attn and not self.training
        return cos, sin, logn_factor(position_ids, config.seq_length) if sharpened else None

    def _alpha(
        self, cache: Cache | None, new_tokens: Tensor, prompt_length: Tensor | int | None
    ) -> Tensor:
        """Find the alpha of each sequence, (batch,) or (1,) float32."""
        if self.training or not self.config.use_dynamic_ntk:
            return torch.ones(1, device=new_tokens.device)
        return sequence_alpha(cache, new_tokens, prompt_length, seq_length=self.config.seq_length)

    def _paged_alpha(self, position_ids: Tensor, cache: Any) -> Tensor:
        """Refuse what continuous batching cannot do: it tells no prompt's length."""
        check_model_cache(cache, self.config)
        if self.config.use_dynamic_ntk and not torch.compiler.is_compiling():
            longest = int(position_ids.max()) + 1
            if longest > self.config.seq_length:
                raise InvalidRequest(
                    f"generate_batch runs Qwen v1 up to {self.config.seq_length:,} tokens of "
                    f"prompt and reply, not {longest:,}. Use generate, or our own engine."
                )
        return torch.ones(1, device=position_ids.device)


class QWenLMHeadModel(QWenPreTrainedModel, QWenGenerationMixin):  # type: ignore[no-untyped-call]
    """The language model: logits, loss, `generate`, `chat` and `chat_stream`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # else guessed from the name of the class, with a warning
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of new tokens that follow what is in the cache.

        Args:
            input_ids: (batch, seq_len), int.
            attention_mask: (batch, cached + seq_len), 1 for tokens and 0 for padding on either
                side; or a mask that is already in the attention implementation's form.
            position_ids: (batch or 1, seq_len), int; by default each token's position in its
                sequence, padding not counted.
            past_key_values: Any cache of Transformers. Changed: the new tokens are appended, and
                the first call fixes the alpha of its sequences.
            inputs_embeds: (batch, seq_len, hidden_size), instead of `input_ids`.
            labels: (batch, seq_len), int, shifted in here; -100 is left out of the loss.
            use_cache: Return a cache; by default as the configuration says.
            logits_to_keep: How many of the last positions, or which ones; 0 is all.
            prompt_length: Tokens of each sequence's *whole* prompt, (batch,) or a number for all.
                Needed by a prompt that comes in several calls: it decides alpha. The cache
                remembers it; passing it again with every call is allowed.
            **kwargs: For the attention implementation and the loss.

        Returns:
            Logits (batch, kept, vocab_size), loss, cache, and what `output_*` asks for.

        Raises:
            InvalidRequest: Ids that the model does not know, no token in a row, a cache without
                the alpha of its sequences.
            PromptTooLong: A static cache has no room left.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_length=prompt_length,
            **kwargs,
        )
        hidden_states = kept_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
