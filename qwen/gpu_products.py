"""One row times a dense or a 4-bit matrix on a GPU, by our Triton kernels.

Decoding for one user spends its time on it, and torch's own kernels leave memory's speed on the
table there (docs/performance.md). Needs Triton, which comes with torch for CUDA on Linux. Knows no
model and no module.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qwen import triton_products
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


def can_multiply(weight: Tensor) -> bool:
    """Tell whether `multiply_row` takes a matrix, (outputs, inputs)."""
    return weight.is_contiguous() and weight.shape[0] % _DENSE_BLOCK["ROWS"] == 0


def can_multiply_int4(*, out_features: int, in_features: int, group: int) -> bool:
    """Tell whether `multiply_row_int4` takes a 4-bit matrix of these sizes."""
    tiles = max(block["TILES"] for _, block in _INT4_BLOCKS)
    whole = in_features % _TILE_INPUTS == 0 and out_features % (tiles * _TILE_OUTPUTS) == 0
    return whole and group == _TILE_INPUTS


@torch.library.custom_op("qwen::multiply_row", mutates_args=())
def multiply_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Compute x @ weight.T + bias + add, or silu(gates) * others.

    Args:
        x: (1, inputs), contiguous, of any floating dtype, as all the others.
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
            x.contiguous(), weight, bias, add, out, inputs, bias is not None, add is not None,
            is_gated, **_DENSE_BLOCK,
        )  # fmt: skip
    return out


@torch.library.custom_op("qwen::multiply_row_int4", mutates_args=())
def multiply_row_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Multiply as `qwen.int4_kernels.multiply`, a GPU's packed form, and add.

    Args:
        x: (1, inputs) bfloat16; sizes that `can_multiply_int4`.
        packed: See `qwen.int4_kernels.pack`.
        scales: See `qwen.int4_kernels.multiply`.
        bias: (outputs,).
        add: (1, outputs).
        is_gated: See `multiply_row`.

    Returns:
        (1, outputs) or (1, outputs / 2), bfloat16.
    """
    assert x.dtype == COMPUTE_DTYPE
    outputs, inputs = scales.shape[1], x.shape[1]
    block = next(block for least, block in _INT4_BLOCKS if outputs >= least)
    out = x.new_empty(1, outputs // 2 if is_gated else outputs)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_products.int4_row[(outputs // (block["TILES"] * _TILE_OUTPUTS),)](
            x.contiguous().view(torch.int32), packed, scales.view(torch.int32), bias, add, out,
            inputs, outputs, bias is not None, add is not None, is_gated,
            IS_COMPILED=_IS_COMPILED, **block,
        )  # fmt: skip
    return out


@multiply_row.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    return x.new_empty(1, weight.shape[0] // 2 if is_gated else weight.shape[0])


@multiply_row_int4.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    return x.new_empty(1, scales.shape[1] // 2 if is_gated else scales.shape[1])
