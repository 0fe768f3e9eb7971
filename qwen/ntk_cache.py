"""Where the alpha of dynamic NTK lives: with the cache of the sequences that it belongs to.

Cached keys are stored rotated, so all later tokens of a sequence must be rotated with the alpha of
its prompt. The first layer of a cache carries it, one number a row, and moves it with the rows in
beam search; nothing is kept on the model, which many requests share. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from qwen.errors import InvalidRequest
from qwen.model_inputs import tokens_in
from qwen.rope import ntk_alpha


class NtkLayer:
    """What is added to a cache layer: the alpha of each row, (batch,) float32."""

    ntk_alpha: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of `beam_idx`, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.ntk_alpha is not None:
            self.ntk_alpha = self.ntk_alpha.index_select(0, beam_idx.to(self.ntk_alpha.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.ntk_alpha is not None:
            self.ntk_alpha = self.ntk_alpha.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.ntk_alpha is not None:
            self.ntk_alpha = self.ntk_alpha[indices.to(self.ntk_alpha.device)]


class NtkDynamicLayer(NtkLayer, DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that knows the alpha of its sequences."""


class NtkStaticLayer(NtkLayer, StaticLayer):  # type: ignore[no-untyped-call]
    """A `StaticLayer` that knows the alpha of its sequences."""


def sequence_alpha(
    cache: Cache | None,
    new_tokens: Tensor,
    prompt_length: Tensor | int | None,
    *,
    seq_length: int,
) -> Tensor:
    """Find the alpha of each sequence; the first call on a cache fixes it for all later ones.

    Args:
        cache: What the new tokens follow. Changed: it remembers the alpha.
        new_tokens: (batch,), int; how many new tokens each sequence has in this call.
        prompt_length: Tokens of each whole prompt, (batch,) or a number for all; None means that
            the first call on the cache has the whole prompt. Wins over what the cache remembers.
        seq_length: Tokens that the model was trained on.

    Returns:
        (batch,), float32.

    Raises:
        InvalidRequest: The cache was not filled by a Qwen v1 model, or is of another batch.
    """
    past = 0 if cache is None else tokens_in(cache)
    if prompt_length is not None:
        alpha = ntk_alpha(_lengths(prompt_length, like=new_tokens), seq_length)
    elif isinstance(past, int) and past > 0:
        assert cache is not None
        return _recall(cache, new_tokens.shape[0], seq_length).to(new_tokens.device)
    else:
        alpha = ntk_alpha(new_tokens, seq_length)
    if cache is None:
        return alpha
    if prompt_length is None and isinstance(past, Tensor):
        # The length of a static cache is a tensor once it was used, and 0 again after `reset`.
        known = _recall(cache, new_tokens.shape[0], seq_length).to(new_tokens.device)
        alpha = torch.where(past == 0, alpha, known)
    _remember(cache, alpha)
    return alpha


def _lengths(prompt_length: Tensor | int, *, like: Tensor) -> Tensor:
    lengths = torch.as_tensor(prompt_length, device=like.device)
    if lengths.shape not in ((), (1,), like.shape):
        raise InvalidRequest(
            f"prompt_length has the shape {tuple(lengths.shape)}, but the batch is of "
            f"{like.shape[0]} sequences. Pass one number for each, or one for all."
        )
    return lengths.expand(like.shape)


def _recall(cache: Cache, batch_size: int, seq_length: int) -> Tensor:
    layer: Any = cache.layers[0]
    alpha: Tensor | None = getattr(layer, "ntk_alpha", None)
    if alpha is None:
        past = tokens_in(cache)
        if isinstance(past, int) and past <= seq_length:  # then the prompt was no longer either
            return torch.ones(batch_size, device=layer.device)
        raise InvalidRequest(
            "The cache does not tell how long the prompts were that it began with. Pass their "
            "lengths as prompt_length."
        )
    if alpha.shape[0] != batch_size:
        raise InvalidRequest(
            f"The cache holds {alpha.shape[0]} sequences, but {batch_size} are to be continued. "
            "Pass the next tokens of all of them."
        )
    return alpha


def _remember(cache: Cache, alpha: Tensor) -> None:
    layer = _first_layer(cache)
    known = getattr(layer, "ntk_alpha", None)
    if torch.compiler.is_compiling() and known is not None and known.shape == alpha.shape:
        # In place: a CUDA graph may reuse the memory of its outputs, of a static input never.
        known.copy_(alpha)
    else:
        layer.ntk_alpha = alpha


def _first_layer(cache: Cache) -> Any:
    layers: list[Any] = cache.layers
    new_layer: Any = NtkDynamicLayer
    if not layers:  # a DynamicCache made without a configuration grows its layers when used
        layers.append(new_layer())
    elif not layers[0].is_initialized:
        if type(layers[0]) is DynamicLayer:
            layers[0] = new_layer()
        elif type(layers[0]) is StaticLayer:
            layers[0] = NtkStaticLayer(layers[0].max_cache_len)
    return layers[0]
