"""Int4 weights in the packed forms of torch's own kernels: pack, multiply, unpack.

Pure functions on tensors of a CPU or a CUDA GPU; knows no checkpoint format and no module. Both
kernels mean w = (code - 8) * scale + offset, one scale and one offset for `group` inputs of an
output, and compute fast in bfloat16 only. Where a code lies in the packed form is private to torch
and depends on the CPU's instructions or on the GPU: it is found out by packing a probe, never
assumed. Source: the operators `_weight_int4pack_mm` and `_weight_int4pack_mm_for_cpu` of torch 2.11
to 2.13.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: The dtype of activations, scales and offsets.
COMPUTE_DTYPE = torch.bfloat16
#: Where code 8 stands in w.
MIDDLE = 8

_GROUPS = (128, 64, 32)
#: Outputs in a block of the CPU's packed form: with AVX-512, and with less.
_CPU_BLOCKS = (64, 32)
#: Outputs in a tile of the GPU's packed form, and inputs in the smallest one.
_GPU_ROWS, _GPU_COLUMNS = 8, 16


def kernel_group(*, out_features: int, in_features: int, group_size: int) -> int | None:
    """Return the number of inputs of a group, as the kernels want it.

    A group of the checkpoint may be several of the kernels', with equal scales.

    Args:
        out_features: Of the layer.
        in_features: Of the layer.
        group_size: Of the checkpoint; -1 is all inputs.

    Returns:
        None if the kernels cannot run the layer.
    """
    if out_features % 16:
        return None
    whole = in_features if group_size == -1 else group_size
    return next((g for g in _GROUPS if in_features % g == 0 and whole % g == 0), None)


def pack(codes: Tensor, *, group: int) -> Tensor:
    """Pack codes for the device that they are on.

    Args:
        codes: (out, in) uint8, 0 to 15; sizes that `kernel_group` accepts.
        group: See `kernel_group`.
    """
    aten = torch.ops.aten
    if codes.device.type == "cpu":
        packed: Tensor = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return packed
    codes = order_for_gpu(codes, group=group)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = aten._convert_weight_to_int4pack(pairs.contiguous(), _inner_tiles(codes.shape[1]))
    return packed


def multiply(inputs: Tensor, packed: Tensor, scales: Tensor, *, group: int) -> Tensor:
    """Multiply rows by packed weights.

    Args:
        inputs: (rows, in) bfloat16.
        packed: See `pack`.
        scales: (in / group, out, 2) bfloat16: scale and offset.
        group: See `kernel_group`.

    Returns:
        (rows, out) bfloat16.
    """
    aten = torch.ops.aten
    if packed.device.type == "cpu":
        result: Tensor = aten._weight_int4pack_mm_for_cpu(inputs, packed, group, scales)
        return result
    result = aten._weight_int4pack_mm(order_for_gpu(inputs, group=group), packed, group, scales)
    return result


def order_for_gpu(rows: Tensor, *, group: int) -> Tensor:
    """Return rows with their inputs in the order of a GPU's packed form; done twice, as before.

    torch gives a lane of the GPU 16 pairs of inputs out of 64; here those that follow each other,
    which our kernel reads at once (`qwen.triton_products.int4_rows`). It knows groups of 128;
    others stay as they are.

    Args:
        rows: (rows, in).
        group: See `kernel_group`.
    """
    if group != _GROUPS[0]:
        return rows
    words, nibbles, lanes, pair = 4, 4, 4, 2
    groups = rows.view(len(rows), -1, words, nibbles, lanes, pair)
    return groups.transpose(2, 4).reshape(rows.shape)


def outputs_of_a_row(device: torch.device) -> int:
    """Return how many outputs lie in a row, along the first dimension, of the packed form."""
    return 1 if device.type == "cpu" else _GPU_ROWS


def can_unpack(device: torch.device, in_features: int, *, group: int) -> bool:
    """Tell whether the packed form of a device is understood."""
    if device.type == "cpu":
        return _cpu_block() is not None
    return _gpu_order(device, _inner_tiles(in_features), group) is not None


def unpack(packed: Tensor, *, in_features: int, group: int) -> Tensor:
    """Return the codes in a packed form, the inverse of `pack` up to the order of dimensions.

    Args:
        packed: Of a device of which `can_unpack` is true.
        in_features: Of the layer.
        group: See `kernel_group`.

    Returns:
        (in, out) uint8.
    """
    if packed.device.type == "cpu":
        block = _cpu_block()
        assert block is not None
        return _unpack_cpu(packed, block, in_features)
    inner = _inner_tiles(in_features)
    order = _gpu_order(packed.device, inner, group)
    assert order is not None
    return _unpack_gpu(packed, order, inner)


def _unpack_cpu(packed: Tensor, block: int, in_features: int) -> Tensor:
    """Unpack blocks, whose bytes hold outputs i and i + block / 2, and the smaller rest."""
    outputs = packed.shape[0]
    whole = outputs // block * block
    stored = packed[:whole].reshape(-1, in_features, block // 2)
    codes = torch.cat((stored & 0xF, stored >> 4), dim=-1)
    codes = codes.permute(1, 0, 2).reshape(in_features, whole)
    if whole == outputs:
        return codes
    rest = packed[whole:].reshape(in_features, (outputs - whole) // 2)
    pairs = torch.stack((rest & 0xF, rest >> 4), dim=-1).flatten(1)
    return torch.cat((codes, pairs), dim=1)


@functools.cache
def _cpu_block() -> int | None:
    """Find the block of this CPU's packed form; None if it is none that is known."""
    codes = _probe(rows=_CPU_BLOCKS[0] + 16, columns=32, device=torch.device("cpu"))
    packed = pack(codes, group=_GROUPS[-1])
    for block in _CPU_BLOCKS:
        if torch.equal(_unpack_cpu(packed, block, codes.shape[1]), codes.t()):
            return block
    return None


def _inner_tiles(in_features: int) -> int:
    """Return the kernel's `innerKTiles`: the most that divide the inputs."""
    return next(n for n in (8, 4, 2) if in_features % (n * _GPU_COLUMNS) == 0)


def _unpack_gpu(packed: Tensor, order: Tensor, inner: int) -> Tensor:
    """Unpack tiles, each stored as one run of 4-bit codes in `order`."""
    columns = inner * _GPU_COLUMNS
    codes = _nibbles(packed, _GPU_ROWS * columns)[:, order]
    tiles = codes.view(*packed.shape[:2], _GPU_ROWS, columns)
    outputs, inputs = packed.shape[0] * _GPU_ROWS, packed.shape[1] * columns
    return tiles.permute(1, 3, 0, 2).reshape(inputs, outputs)


def _nibbles(packed: Tensor, tile: int) -> Tensor:
    stored = packed.contiguous().view(torch.uint8).reshape(-1, tile // 2)
    return torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(1)


@functools.cache
def _gpu_order(device: torch.device, inner: int, group: int) -> Tensor | None:
    """Find where each code of a tile is stored; None if tiles are not what they were."""
    columns = inner * _GPU_COLUMNS
    size = _GPU_ROWS * columns
    index = torch.arange(size, device=device).view(_GPU_ROWS, columns)
    stored = torch.zeros(size, dtype=torch.long, device=device)
    for shift in (0, 4, 8):  # the number of a code, four bits at a time
        digits = ((index >> shift) & 0xF).to(torch.uint8)
        stored |= _nibbles(pack(digits, group=group), size)[0].long() << shift
    order = stored.argsort()
    codes = _probe(rows=2 * _GPU_ROWS, columns=3 * columns, device=device)
    is_known = torch.equal(_unpack_gpu(pack(codes, group=group), order, inner), codes.t())
    return order if is_known else None


def _probe(*, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return codes without a pattern that a wrong order would keep."""
    index = torch.arange(rows * columns, device=device).view(rows, columns)
    return ((index * 2654435761 >> 13) & 0xF).to(torch.uint8)
