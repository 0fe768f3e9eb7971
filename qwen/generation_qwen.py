"""What `generate` of Transformers needs for Qwen v1: prompt lengths, stop sequences, `chat`.

Knows the sequences of token ids that `generate` runs on, no layers and no chat format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from qwen.chat import chat, chat_stream
from qwen.errors import InvalidSetting
from qwen.int8_cache import Int8Cache, wants_int8
from qwen.model_inputs import count_tokens, tokens_in

#: As published: far above any logit, also in bfloat16 and float16.
_CERTAIN = 2.0**15


class StopWordsLogitsProcessor(LogitsProcessor):
    """Ends a sequence that ends with one of the stop sequences, prompt included.

    As published the end token comes one step *after* the stop sequence, so both are in the output.

    Args:
        stop_words_ids: Non-empty sequences of token ids.
        eos_token_id: The token that ends a sequence.
    """

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], eos_token_id: int) -> None:
        self._eos = eos_token_id
        self._stops = [list(stop) for stop in stop_words_ids if list(stop) != [eos_token_id]]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raise the score of the end token in the rows, (batch, vocab_size), that are to end."""
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self._stops:
            if len(stop) <= input_ids.shape[1]:
                ended |= (input_ids[:, -len(stop) :] == input_ids.new_tensor(stop)).all(-1)
        certain = scores.clone()
        certain[:, self._eos] = _CERTAIN
        return torch.where(ended[:, None], certain, scores)


class QWenGenerationMixin(GenerationMixin):
    """`GenerationMixin` with the published `stop_words_ids`, `chat` and `chat_stream`."""

    chat = chat
    chat_stream = chat_stream

    def generate(  # type: ignore[override]
        self: Any,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as Transformers does; every sequence keeps the alpha of its prompt.

        Args:
            inputs: Token ids of the prompts, (batch, seq_len), padded on the left.
            generation_config: By default the checkpoint's own.
            stop_words_ids: Token sequences; when a sequence ends with one, its end token follows.
                By default those of the generation configuration.
            logits_processor: More processors.
            **kwargs: As `GenerationMixin.generate`.

        Returns:
            As Transformers.
        """
        config = generation_config if generation_config is not None else self.generation_config
        if stop_words_ids is None:
            stop_words_ids = getattr(config, "stop_words_ids", None)
        eos = kwargs.get("eos_token_id", config.eos_token_id)
        if stop_words_ids and eos is not None:
            first = eos if isinstance(eos, int) else int(torch.as_tensor(eos).flatten()[0])
            stops = StopWordsLogitsProcessor([s for s in stop_words_ids if len(s)], first)
            logits_processor = LogitsProcessorList([*(logits_processor or ()), stops])
        base: Any = super()
        return base.generate(inputs, generation_config, logits_processor=logits_processor, **kwargs)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self: Any,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """State the prompts' lengths before `generate` splits, repeats or re-reads them.

        So every step has the right alpha: of a prompt in chunks, with a static cache (whose mask
        no longer tells the lengths), without a cache, and of every beam. A cache that already
        holds tokens knows its alpha by itself.
        """
        is_new = int(tokens_in(model_kwargs.get("past_key_values"))) == 0
        if self.config.use_dynamic_ntk and model_kwargs.get("prompt_length") is None and is_new:
            embeds = model_kwargs.get("inputs_embeds")
            prompt: Any = input_ids if embeds is None else embeds
            mask = model_kwargs.get("attention_mask")
            model_kwargs["prompt_length"] = count_tokens(prompt, mask)
        base: Any = super()
        expanded: tuple[Tensor, dict[str, Any]] = base._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return expanded

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Cache in int8 where the configuration says so."""
        is_given = model_kwargs.get("past_key_values") is not None
        base: Any = super()
        result = base._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        is_made = not is_given and model_kwargs.get("past_key_values") is not None
        if is_made and wants_int8(self.config):
            kind = generation_config.cache_implementation
            if kind not in (None, "dynamic"):
                raise InvalidSetting(
                    f"cache_implementation={kind!r} and the model's use_cache_quantization are "
                    "two kinds of cache. Leave one of them out."
                )
            model_kwargs["past_key_values"] = Int8Cache(self.config)
        return result

    def _get_candidate_generator(  # type: ignore[override]
        self: Any, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Keep `prompt_length` from the assistant, which may be of any kind and counts itself."""
        others = {key: value for key, value in model_kwargs.items() if key != "prompt_length"}
        base: Any = super()
        return base._get_candidate_generator(model_kwargs=others, **kwargs)
