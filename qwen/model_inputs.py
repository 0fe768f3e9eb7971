"""What a forward pass is given: checks with named errors, positions and lengths.

The checks read values, which waits for a GPU: they are left out while compiling and, on a GPU, for
calls of a single token. Knows no model; a cache is anything with `get_seq_length`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen.errors import InvalidRequest, PromptTooLong


def check_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    prompt_length: Tensor | int | None,
    *,
    vocab_size: int,
) -> None:
    """Refuse inputs that would give wrong numbers or fail without a name.

    Args:
        input_ids: (batch, seq_len), int; or None.
        inputs_embeds: (batch, seq_len, hidden_size), float; or None.
        attention_mask: (batch, cached + seq_len), or any other form that Transformers knows.
        cache: A cache of Transformers, or None.
        prompt_length: (batch,) or a number, int; None means that the prompt is whole.
        vocab_size: Rows of the embedding.

    Raises:
        InvalidRequest: With what to mend.
        PromptTooLong: There is no room in the cache.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise InvalidRequest("Pass exactly one of input_ids and inputs_embeds.")
    if given.shape[0] == 0 or given.shape[1] == 0:
        raise InvalidRequest("The prompt is empty. Pass at least one token.")
    past = tokens_in(cache)
    if attention_mask is not None and attention_mask.ndim == 2 and isinstance(past, int):
        _check_mask_length(attention_mask, past, given.shape[1])
    if torch.compiler.is_compiling() or (given.device.type != "cpu" and given.shape[1] == 1):
        return
    if input_ids is not None:
        _check_ids(input_ids, vocab_size)
    # A chunk of a padded prompt may be padding only in some rows.
    if prompt_length is not None:
        _check_lengths(torch.as_tensor(prompt_length).flatten())
    elif attention_mask is not None and attention_mask.ndim == 2:
        _check_lengths(attention_mask.bool().sum(-1))
    if cache is not None:
        _check_room(cache, int(past), given.shape[1])


def tokens_in(cache: Any) -> int | Tensor:
    """Count the tokens of each row of a cache, padding included; a tensor if it is static."""
    length: int | Tensor = 0 if cache is None else cache.get_seq_length()
    return length


def positions_of(inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    """Compute the position of each new token within its own sequence, padding not counted.

    Args:
        inputs_embeds: (batch, seq_len, hidden_size).
        attention_mask: (batch, cached + seq_len), or any other form: then nothing is padding.
        cache: What the new tokens follow, or None.

    Returns:
        (batch or 1, seq_len), int64. Padding on the left is at 0.
    """
    columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + tokens_in(cache)
    if attention_mask is None or attention_mask.ndim != 2:
        return columns[None]
    mask = attention_mask.to(inputs_embeds.device).bool()
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]


def count_tokens(inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count the tokens of each sequence of a prompt, (batch,) int64, padding not counted.

    A mask may be longer, as for a whole static cache; what is behind the prompt does not count.
    """
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask.to(inputs.device)[:, : inputs.shape[1]].bool().sum(-1)
    return torch.full(inputs.shape[:1], inputs.shape[1], device=inputs.device)


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    unknown = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if unknown.numel():
        raise InvalidRequest(
            f"The token id {int(unknown[0])} is not one of the model's {vocab_size:,}. The "
            "tokenizer does not belong to this model."
        )


def _check_mask_length(attention_mask: Tensor, past: int, seq_len: int) -> None:
    if attention_mask.shape[1] < past + seq_len:
        raise InvalidRequest(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but there are "
            f"{past + seq_len}: {past} in the cache and {seq_len} new ones. Pass a mask for all."
        )


def _check_lengths(lengths: Tensor) -> None:
    empty = (lengths < 1).nonzero()
    if empty.numel():
        raise InvalidRequest(
            f"Row {int(empty.flatten()[0])} of the batch has no token at all. Leave empty "
            "sequences out, and mark tokens with 1 in attention_mask."
        )


def _check_room(cache: Any, past: int, seq_len: int) -> None:
    room = cache.get_max_length(0)
    if 0 <= room < past + seq_len:
        raise PromptTooLong(
            f"The cache has room for {room:,} tokens, but {past + seq_len:,} are needed. Make it "
            "larger, or shorten the prompt."
        )


def kept_positions(hidden_states: Tensor, logits_to_keep: Tensor | int) -> Tensor:
    """Return the hidden states whose logits are wanted, in the sense of Transformers 5.23.

    Args:
        hidden_states: (batch, seq_len, hidden_size).
        logits_to_keep: How many of the last positions (0 is all), or which ones: (n,) for every
            row, (batch, n) for each, or a mask (batch, seq_len), which leaves no batch dimension.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]
