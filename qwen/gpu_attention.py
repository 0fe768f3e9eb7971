"""Rotation and attention on a GPU: of one token of each of several rows, and of prompts.

What a layer needs between its products is one kernel of ours for a step, and for prompts one of
ours and flash attention for all of them at once. Needs Triton, which comes with torch for CUDA on
Linux. Knows no model and no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from qwen import triton_attention
from qwen.decoder_ops import Attend, PromptRows, Rotation
from qwen.gpu_products import IS_COMPILED, chain

#: Programs that occupy a large GPU: attention is cut into parts until there are so many.
_PROGRAMS = 512
#: Positions that a program of the attention reads at a time: of short and long sequences, which is
#: from how many positions on, and shared memory that a block of the GPU then needs.
_BLOCK, _LONG_BLOCK, _LONG, _LONG_BYTES = 64, 128, 2048, 140_000
#: The fewest positions of a part.
_SMALLEST_PART = 128
#: Heads of a token that a program rotates.
_HEADS_AT_ONCE = 8


def compute_rotation(
    positions: Tensor, inv_freq: Tensor, scale: float, logn_length: int | None
) -> Rotation:
    """Compute as `qwen.step_inputs.compute_rotation`, by our kernel."""
    rows, half = inv_freq.shape
    cos, sin = inv_freq.new_empty(2, rows, 2 * half)
    logn = None if logn_length is None else inv_freq.new_empty(rows)
    with torch.cuda.device_of(inv_freq):  # type: ignore[no-untyped-call]
        triton_attention.rotation[(rows,)](
            positions, inv_freq, cos, sin, logn, scale, logn_length or 0,
            HALF=half,
            WIDTH=triton.next_power_of_2(half),
            HAS_LOGN=logn is not None,
            IS_COMPILED=IS_COMPILED,
            num_warps=1,
        )  # fmt: skip
    return Rotation(positions, cos, sin, logn)


def attend_rows(rotation: Rotation, longest: int, scale: float) -> Attend:
    """Prepare a step's attention as `qwen.decoder_ops.attend_masked`, by our kernel.

    Keys and values have the same strides, and are contiguous in their last two dimensions.
    """
    scratch: list[Tensor] = []  # of all layers: one runs after the other

    def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, kv_heads, _, dim = keys.shape
        programs, shared = rows * kv_heads, qkv.shape[1] // dim // kv_heads - 2
        parts, block = _parts(programs, longest), _block(qkv.device, longest)
        if not scratch:
            sums = qkv.new_empty(programs, parts, shared, dim, dtype=torch.float32)
            norms = qkv.new_empty(programs, parts, shared, 2, dtype=torch.float32)
            scratch.extend((sums, norms, qkv.new_zeros(programs, dtype=torch.int32)))
        out = torch.empty(rows, kv_heads * shared * dim, dtype=values.dtype, device=qkv.device)
        with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
            triton_attention.attend_rows[(programs, parts)](
                qkv.contiguous(), keys, values,
                rotation.positions, rotation.cos, rotation.sin, rotation.logn,
                *scratch, out, keys.stride(0), keys.stride(1), scale,
                triton.cdiv(triton.cdiv(longest, parts), block) * block,
                KV_HEADS=kv_heads,
                SHARED=shared,
                PADDED=_padded(shared),
                DIM=dim,
                WIDTH=_padded(dim),
                ROTARY_DIM=rotation.cos.shape[1],
                HAS_LOGN=rotation.logn is not None,
                PARTS=parts,
                BLOCK=block,
                STAGES=2 if values.itemsize == 2 else 1,  # what a processor's memory has room for
                num_warps=4,
                **chain(qkv.device),
            )  # fmt: skip
        return out

    return attend


def attend_prompts(rotation: Rotation, prompts: Sequence[PromptRows], scale: float) -> Attend:
    """Prepare the attention of all new tokens of several sequences at once.

    Args:
        rotation: Of all tokens; its positions lead into a layer's memory, (…, dim), where the
            first head of keys of a sequence begins at `PromptRows.offset`.
        prompts: Of the sequences.
        scale: Factor of the scores.

    Returns:
        What takes keys and values that `has_flash_attention` takes, strides as in `attend_rows`.
    """
    device = rotation.positions.device
    sizes = torch.tensor([0, *(prompt.tokens for prompt in prompts)])
    ends = sizes.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    # Where each one's keys begin; the last number is not looked at.
    offsets = torch.tensor([*(prompt.offset for prompt in prompts), 0], dtype=torch.int32)
    offsets = offsets.to(device, non_blocking=True)
    lengths = torch.tensor([prompt.length for prompt in prompts], dtype=torch.int32)
    lengths = lengths.to(device, non_blocking=True)
    most_tokens = max(prompt.tokens for prompt in prompts)
    longest = max(prompt.length for prompt in prompts)

    def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query = rotate_and_store(qkv, keys[0], values[0], rotation)
        mixed: Tensor = torch.ops.aten._flash_attention_forward(
            query, _positions_first(keys), _positions_first(values), ends, offsets,
            most_tokens, longest, 0.0, True, False, scale=scale, seqused_k=lengths,
        )[0]  # fmt: skip
        return mixed.reshape(len(qkv), -1)

    return attend


def rotate_and_store(qkv: Tensor, keys: Tensor, values: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries and keys of tokens, write keys and values.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * dim).
        keys: (kv_heads, capacity, dim), with the strides of the values, contiguous in the last two
            dimensions; changed.
        values: Likewise.
        rotation: Its positions may lead into memory behind the keys.

    Returns:
        (tokens, heads, dim), queries.
    """
    tokens, (kv_heads, _, dim) = len(qkv), keys.shape
    all_heads = qkv.shape[1] // dim
    heads = all_heads - 2 * kv_heads
    query = torch.empty(tokens, heads, dim, dtype=values.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        triton_attention.rotate_and_store[(tokens, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
            qkv.contiguous(), keys, values,
            rotation.positions, rotation.cos, rotation.sin, rotation.logn, query, keys.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            ROTARY_DIM=rotation.cos.shape[1],
            HAS_LOGN=rotation.logn is not None,
            BLOCK=_HEADS_AT_ONCE,
            num_warps=4,
        )  # fmt: skip
    return query


def _positions_first(memory: Tensor) -> Tensor:
    """View the memory of several rows as (positions, kv_heads, dim), without their bounds.

    Position p of a row lies at the row's offset + p: rows of (…, dim) before its first head's.
    """
    rows, kv_heads, capacity, dim = memory.shape
    count = (rows - 1) * kv_heads * capacity + capacity
    return memory.as_strided((count, kv_heads, dim), (dim, capacity * dim, 1))


def _parts(programs: int, longest: int) -> int:
    """Return into how many parts attention is cut, a power of two."""
    parts = 1
    while parts * programs < _PROGRAMS and parts * 2 * _SMALLEST_PART <= longest:
        parts *= 2
    return parts


def _block(device: torch.device, longest: int) -> int:
    """Return how many positions a program reads at a time."""
    if longest < _LONG or not IS_COMPILED:
        return _BLOCK
    properties: Any = torch.cuda.get_device_properties(device)
    return _LONG_BLOCK if properties.shared_memory_per_block_optin > _LONG_BYTES else _BLOCK


def _padded(size: int) -> int:
    """Return the next size that matrix units take."""
    return max(16, int(triton.next_power_of_2(size)))
