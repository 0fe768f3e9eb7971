"""A step's products on a GPU, and what stands between them, by our Triton kernels.

One row times a dense matrix, and any rows times a 4-bit one: decoding spends its time on few rows,
and torch's own kernels leave memory's speed on the table there (docs/performance.md). Needs
Triton, which comes with torch for CUDA on Linux. Knows no model and no module.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from qwen import triton_products
from qwen.int4_kernels import COMPUTE_DTYPE

#: Whether kernels are compiled; Triton's interpreter runs them on a CPU, in tests.
IS_COMPILED = not triton.knobs.runtime.interpret

#: Outputs and inputs that a program of the dense kernel reads at a time.
_DENSE_BLOCK = {"ROWS": 2, "COLUMNS": 2048, "num_warps": 8}

#: The packed form's tiles, which the 4-bit kernel knows: outputs, and inputs, a group's.
_TILE_OUTPUTS, _TILE_INPUTS = 8, 128
#: Up to so many inputs and from so many outputs on: groups that a program of the 4-bit kernel
#: reads at a time, each by a warp, and pairs of tiles. The fastest on an H200 for the matrices of
#: 7B and 14B. The weights of a program are meant to lie in registers, and `maxnreg` decides how
#: many programs fit beside each other: too few registers, and the compiler moves some to memory.
_INT4_BLOCKS: tuple[tuple[int, int, dict[str, int]], ...] = (
    (4096, 16384, {"PAIRS": 2, "GROUPS": 4}),
    (4096, 8192, {"PAIRS": 1, "GROUPS": 4, "maxnreg": 168}),
    (4096, 0, {"PAIRS": 1, "GROUPS": 8, "maxnreg": 128}),
    (5120, 8192, {"PAIRS": 1, "GROUPS": 8, "maxnreg": 128}),
    (5120, 0, {"PAIRS": 1, "GROUPS": 4, "maxnreg": 168}),
    (12288, 0, {"PAIRS": 1, "GROUPS": 8, "maxnreg": 128}),
    (16384, 0, {"PAIRS": 1, "GROUPS": 8}),
    (32768, 0, {"PAIRS": 1, "GROUPS": 16, "maxnreg": 128}),
)
#: Rows that the 4-bit kernel takes at a time, and up to how many it is the fastest way.
_INT4_ROWS, MAX_INT4_ROWS = 8, 32

#: Rows of 128 weights that a program unpacks.
_UNPACKED_ROWS = 16

#: Gates that a program computes.
_GATES_AT_ONCE = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows in float32 and weight them; x (rows, size), weight (size,)."""
    rows, size = x.shape
    out = torch.empty_like(x)
    width = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_products.rms_norm[(rows,)](
            x.contiguous(), weight, out, size, eps,
            WIDTH=width, num_warps=min(max(width // 512, 1), 16), **chain(x.device),
        )  # fmt: skip
    return out


def gate(x: Tensor) -> Tensor:
    """Compute silu(gate) * other of rows, (rows, size) of (rows, 2 * size)."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, size)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_products.gate[(rows, triton.cdiv(size, _GATES_AT_ONCE))](
            x.contiguous(), out, size, BLOCK=_GATES_AT_ONCE, num_warps=4, **chain(x.device)
        )
    return out


def can_multiply(weight: Tensor) -> bool:
    """Tell whether `multiply_row` takes a matrix, (outputs, inputs)."""
    return weight.is_contiguous() and len(weight) % (2 * _DENSE_BLOCK["ROWS"]) == 0


def multiply_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    is_gated: bool = False,
) -> Tensor:
    """Compute x @ weight.T + bias + add, or silu(gates) * others.

    Args:
        x: (1, inputs), of any floating dtype, as all the others.
        weight: (outputs, inputs) that `can_multiply`.
        bias: (outputs,).
        add: (1, outputs).
        is_gated: The first half of the outputs are gates of the second; without bias and add.

    Returns:
        (1, outputs), or (1, outputs / 2).
    """
    outputs, inputs = weight.shape
    out = x.new_empty(1, outputs // 2 if is_gated else outputs)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_products.dense_row[(outputs // _DENSE_BLOCK["ROWS"],)](
            x.contiguous(), weight, bias, add, out, inputs,
            HAS_BIAS=bias is not None,
            HAS_ADD=add is not None,
            IS_GATED=is_gated,
            STEPS=triton.cdiv(inputs, _DENSE_BLOCK["COLUMNS"]),
            **_DENSE_BLOCK,
            **chain(x.device),
        )  # fmt: skip
    return out


def can_multiply_int4(*, out_features: int, in_features: int, group: int) -> bool:
    """Tell whether `multiply_rows_int4` takes a 4-bit matrix of these sizes."""
    whole = in_features % _TILE_INPUTS == 0 and out_features % (4 * _TILE_OUTPUTS) == 0
    return whole and group == _TILE_INPUTS and in_features <= _INT4_BLOCKS[-1][0]


def multiply_rows_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    is_gated: bool = False,
) -> Tensor:
    """Multiply as `qwen.int4_kernels.multiply`, a GPU's packed form, and add; eight rows at a time.

    Args:
        x: (rows, inputs) bfloat16; sizes that `can_multiply_int4`.
        packed: See `qwen.int4_kernels.pack`.
        scales: See `qwen.int4_kernels.multiply`.
        bias: (outputs,).
        add: (rows, outputs).
        is_gated: See `multiply_row`.

    Returns:
        (rows, outputs) or (rows, outputs / 2), bfloat16.
    """
    rows, inputs = x.shape
    outputs = scales.shape[1]
    assert x.dtype == COMPUTE_DTYPE
    block = next(own for most, least, own in _INT4_BLOCKS if inputs <= most and outputs >= least)
    out = x.new_empty(rows, outputs // 2 if is_gated else outputs)
    pairs, scale_pairs = x.contiguous().view(torch.int32), scales.view(torch.int32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        for first in range(0, rows, _INT4_ROWS):
            own = slice(first, first + _INT4_ROWS)
            count = min(rows - first, _INT4_ROWS)
            triton_products.int4_rows[(outputs // (2 * block["PAIRS"] * _TILE_OUTPUTS),)](
                pairs[own], packed, scale_pairs, bias, None if add is None else add[own], out[own],
                count, inputs, outputs,
                HAS_BIAS=bias is not None,
                HAS_ADD=add is not None,
                IS_GATED=is_gated,
                IS_SINGLE=count == 1,
                IS_COMPILED=IS_COMPILED,
                STEPS=triton.cdiv(inputs // _TILE_INPUTS, block["GROUPS"]),
                num_warps=block["GROUPS"],
                **block,
                **chain(x.device),
            )  # fmt: skip
    return out


def multiply_many_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Multiply as `multiply_rows_int4` so many rows that unpacking the weights pays.

    Args:
        x: (rows, inputs) bfloat16.
        packed: See `qwen.int4_kernels.pack`.
        scales: See `qwen.int4_kernels.multiply`.
        bias: (outputs,).
        add: (rows, outputs); changed.

    Returns:
        (rows, outputs), bfloat16.
    """
    weight = unpack_int4(packed, scales)
    if add is None:
        return torch.nn.functional.linear(x, weight, bias)
    result = add.addmm_(x, weight.t())
    return result if bias is None else result.add_(bias)


def unpack_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weights that `multiply_rows_int4` multiplies by.

    Args:
        packed: See `qwen.int4_kernels.pack`, in groups of 128 inputs.
        scales: See `qwen.int4_kernels.multiply`.

    Returns:
        (outputs, inputs) bfloat16.
    """
    tiles, groups = packed.shape[:2]
    out = scales.new_empty(tiles * _TILE_OUTPUTS, groups * _TILE_INPUTS)
    with torch.cuda.device_of(packed):  # type: ignore[no-untyped-call]
        programs = tiles, triton.cdiv(groups * _TILE_OUTPUTS, _UNPACKED_ROWS)
        triton_products.int4_weights[programs](
            packed, scales.view(torch.int32), out.view(torch.int32), groups,
            ROWS=_UNPACKED_ROWS, num_warps=4, **chain(packed.device),
        )  # fmt: skip
    return out


@functools.cache
def chain(device: torch.device) -> dict[str, Any]:
    """Return what has a kernel begin before the one before it has ended, where a GPU can."""
    if not IS_COMPILED or torch.cuda.get_device_capability(device) < (9, 0):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
