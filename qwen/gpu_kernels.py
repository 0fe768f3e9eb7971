"""What decoding on a GPU spends its time on, by our Triton kernels.

One row times a dense or a 4-bit matrix, and the attention of one token of each of several rows:
torch's own reach half of the memory's speed there (docs/performance.md). And a prompt's rotation,
which is twenty calls of torch. Needs Triton, which comes with torch for CUDA on Linux. Knows no
model and no module.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qwen import triton_kernels
from qwen.int4_kernels import COMPUTE_DTYPE

#: Whether kernels are compiled; Triton's interpreter runs them on a CPU, in tests.
_IS_COMPILED = not triton.knobs.runtime.interpret

#: Outputs and inputs that a program of the dense kernel reads at a time: 98 % of what the memory
#: of an H200 gives for the large matrices of a 7B model.
_DENSE_BLOCK = {"ROWS": 2, "COLUMNS": 1024, "num_warps": 4}

#: The packed form's tiles, which the 4-bit kernel knows: outputs, and inputs, a group's.
_TILE_OUTPUTS, _TILE_INPUTS = 8, 128
#: From so many outputs on: tiles of outputs and groups of inputs that a program of the 4-bit
#: kernel reads at a time, and its warps. The fastest on an H200 for the matrices of a 7B model.
#: `maxnreg` decides how early the compiler lets weights be loaded, and how many programs fit.
_INT4_BLOCKS: tuple[tuple[int, dict[str, int]], ...] = (
    (16384, {"TILES": 8, "GROUPS": 4, "num_warps": 4, "maxnreg": 128}),
    (8192, {"TILES": 4, "GROUPS": 8, "num_warps": 8}),
    (0, {"TILES": 4, "GROUPS": 8, "num_warps": 8, "maxnreg": 255}),
)

#: Programs that occupy a large GPU: attention is cut into parts until there are so many.
_PROGRAMS = 512
#: Positions that a program of the attention reads at a time, and the fewest of a part.
_BLOCK, _SMALLEST_PART = 64, 128
#: Heads of a token that a program rotates.
_HEADS_AT_ONCE = 8


def can_multiply(weight: Tensor) -> bool:
    """Tell whether `multiply_row` takes a matrix, (outputs, inputs)."""
    return weight.is_contiguous() and weight.shape[0] % _DENSE_BLOCK["ROWS"] == 0


def can_multiply_int4(*, out_features: int, in_features: int, group: int) -> bool:
    """Tell whether `multiply_row_int4` takes a 4-bit matrix of these sizes."""
    tiles = max(block["TILES"] for _, block in _INT4_BLOCKS)
    whole = in_features % _TILE_INPUTS == 0 and out_features % (tiles * _TILE_OUTPUTS) == 0
    return whole and group == _TILE_INPUTS


@torch.library.custom_op("qwen::multiply_row", mutates_args=())
def multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias + add.

    Args:
        x: (1, inputs), contiguous, of any floating dtype, as all the others.
        weight: (outputs, inputs) that `can_multiply`.
        bias: (outputs,).
        add: (1, outputs).

    Returns:
        (1, outputs).
    """
    outputs, inputs = weight.shape
    out = x.new_empty(1, outputs)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_kernels.dense_row[(outputs // _DENSE_BLOCK["ROWS"],)](
            x.contiguous(), weight, bias, add, out, inputs, bias is not None, add is not None,
            **_DENSE_BLOCK,
        )  # fmt: skip
    return out


@torch.library.custom_op("qwen::multiply_row_int4", mutates_args=())
def multiply_row_int4(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, add: Tensor | None
) -> Tensor:
    """Multiply as `qwen.int4_kernels.multiply`, a GPU's packed form, and add.

    Args:
        x: (1, inputs) bfloat16; sizes that `can_multiply_int4`.
        packed: See `qwen.int4_kernels.pack`.
        scales: See `qwen.int4_kernels.multiply`.
        bias: (outputs,).
        add: (1, outputs).

    Returns:
        (1, outputs) bfloat16.
    """
    assert x.dtype == COMPUTE_DTYPE
    outputs, inputs = scales.shape[1], x.shape[1]
    block = next(block for least, block in _INT4_BLOCKS if outputs >= least)
    out = x.new_empty(1, outputs)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_kernels.int4_row[(outputs // (block["TILES"] * _TILE_OUTPUTS),)](
            x.contiguous().view(torch.int32), packed, scales.view(torch.int32), bias, add, out,
            inputs, outputs, bias is not None, add is not None, IS_COMPILED=_IS_COMPILED, **block,
        )  # fmt: skip
    return out


@multiply_row.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(1, weight.shape[0])


@multiply_row_int4.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    return x.new_empty(1, scales.shape[1])


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, longest: int, scale: float
) -> Tensor:
    """Let one token of each row attend to the row's positions up to its own.

    Args:
        query: (rows, kv_heads, shared, dim), contiguous.
        keys: (rows, kv_heads, capacity, dim), contiguous in its last two dimensions.
        values: Likewise, with the strides of the keys.
        positions: (rows,), int64, on the device; less than `longest`.
        longest: What is launched is good for so many positions.
        scale: Factor of the scores.

    Returns:
        As the query.
    """
    rows, kv_heads, shared, dim = query.shape
    programs = rows * kv_heads
    parts = 1
    while parts * programs < _PROGRAMS and parts * 2 * _SMALLEST_PART <= longest:
        parts *= 2
    chunk = triton.cdiv(triton.cdiv(longest, parts), _BLOCK) * _BLOCK
    out = torch.empty_like(query)
    sums = norms = out
    if parts > 1:
        sums = query.new_empty(programs, parts, shared, dim, dtype=torch.float32)
        norms = query.new_empty(programs, parts, shared, 2, dtype=torch.float32)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        triton_kernels.attend_part[(programs, parts)](
            query, keys, values, positions, sums, norms, out,
            keys.stride(0), keys.stride(1), scale, chunk, parts,
            KV_HEADS=kv_heads,
            SHARED=shared,
            PADDED=_padded(shared),
            DIM=dim,
            WIDTH=_padded(dim),
            BLOCK=_BLOCK,
            IS_WHOLE=parts == 1,
            STAGES=2 if query.itemsize == 2 else 1,  # what a processor's memory has room for
            num_warps=4,
        )  # fmt: skip
        if parts > 1:
            triton_kernels.attend_join[(programs * shared,)](
                sums, norms, out,
                SHARED=shared, DIM=dim, WIDTH=_padded(dim), PARTS=parts, num_warps=4,
            )  # fmt: skip
    return out


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
) -> Tensor:
    """Rotate queries and keys, write keys and values, as `qwen.decoder_ops.rotate_and_store`.

    Positions may lead into memory behind the keys, as `qwen.kv_slots.KvSlots.offset` does. Keys and
    values have the same strides, and are contiguous in their last two dimensions.
    """
    tokens, (kv_heads, _, dim) = len(qkv), keys.shape
    all_heads = qkv.shape[1] // dim
    heads = all_heads - 2 * kv_heads
    query = torch.empty(heads, tokens, dim, dtype=values.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        triton_kernels.rotate_and_store[(tokens, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
            qkv.contiguous(), keys, values, positions, cos, sin, logn, query,
            tokens, keys.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            ROTARY_DIM=cos.shape[1],
            HAS_LOGN=logn is not None,
            BLOCK=_HEADS_AT_ONCE,
            num_warps=4,
        )  # fmt: skip
    return query


def _padded(size: int) -> int:
    """Return the next size that matrix units take."""
    return max(16, int(triton.next_power_of_2(size)))
