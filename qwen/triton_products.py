"""The kernels of `qwen.gpu_products`, in Triton: a row times a dense or a 4-bit matrix.

All add in float32. Arguments are tensors and sizes; lower-case ones are known at run time only.
Names ending in `_ptr` point to the first number of a contiguous tensor. Source: Triton 3.6's
language.
"""

# Triton has no unpacking of tuples.
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def dense_row(
    x_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    inputs,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute `ROWS` outputs of x @ weight.T + bias + add, or half as many that are gated.

    Shapes: x (inputs,), weight (outputs, inputs), bias, add and out (outputs,). If `IS_GATED`,
    the first half of the outputs are gates of the second, and out is silu(gate) * other.
    """
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if IS_GATED:
        outputs = outputs // 2 + outputs % 2 * (tl.num_programs(0) * (ROWS // 2))
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    places = weight_ptr + outputs[:, None].to(tl.int64) * inputs + columns[None, :]
    for start in tl.range(0, inputs, COLUMNS, num_stages=1):
        is_inside = columns < inputs - start
        weight = tl.load(
            places + start, mask=is_inside[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptr + start + columns, mask=is_inside, other=0.0)
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    result = tl.sum(sums, axis=1)
    if IS_GATED:
        gate, other = tl.split(tl.reshape(result, (ROWS // 2, 2)))
        outputs = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        _store_gated(gate, other, outputs, out_ptr)
    else:
        _store(result, outputs, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD)


@triton.jit
def _store_gated(gate, other, outputs, out_ptr):
    """Store silu(gate) * other, of what would else have been stored."""
    kept: tl.constexpr = out_ptr.dtype.element_ty
    gate, other = gate.to(kept).to(tl.float32), other.to(kept).to(tl.float32)
    tl.store(out_ptr + outputs, (gate * tl.sigmoid(gate) * other).to(kept))


@triton.jit
def _store(
    result, outputs, bias_ptr, add_ptr, out_ptr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr
):
    if HAS_BIAS:
        result += tl.load(bias_ptr + outputs).to(tl.float32)
    if HAS_ADD:
        result += tl.load(add_ptr + outputs).to(tl.float32)
    tl.store(out_ptr + outputs, result.to(out_ptr.dtype.element_ty))


@triton.jit
def int4_row(
    x_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    inputs,
    outputs,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """Compute 8 * `TILES` outputs of x times 4-bit weights in groups of 128, plus bias and add.

    Or half as many that are gated, see `dense_row`: of as many tiles of gates and of others.

    A tile of the packed form is 8 outputs of one group: 32 lanes of four words of eight codes, each
    lane one quarter of an output's. A code becomes a number by being put behind the exponent of
    a power of two, which is 128 to 32,768 more than the code; their sum is taken off a word's.

    Shapes: x (inputs / 2,) int32, pairs of bfloat16; packed (outputs / 8, inputs / 128, 128) int32,
    of `torch.ops.aten._convert_weight_to_int4pack` with 8 inner tiles; scales
    (inputs / 128, outputs) int32, pairs of bfloat16: scale and offset; bias, add, out (outputs,).
    `IS_COMPILED` allows PTX, of which Triton's interpreter knows nothing.
    """
    groups = inputs // 128
    first = tl.program_id(0) * TILES
    # Tiles between those of gates and those of what they gate.
    between = 0
    if IS_GATED:
        first //= 2
        between = outputs // 16 - TILES // 2
    words = tl.arange(0, GROUPS * 128)
    word_group = words // 128
    lanes = tl.arange(0, GROUPS * 32)
    lane_group = lanes // 32
    x_places = x_ptr + word_group * 64 + (words % 4) * 16 + words % 16 // 4
    scale_places = scales_ptr + first * 8 + lane_group * outputs + lanes % 32 // 4
    packed_places = packed_ptr + first * groups * 128 + words
    sums = ()
    ahead = ()
    for tile in tl.static_range(TILES):
        sums = sums + (tl.zeros((GROUPS * 32,), dtype=tl.float32),)
        skipped = tile + tile // (TILES // 2) * between
        codes = tl.load(packed_places + skipped * groups * 128, mask=word_group < groups, other=0)
        ahead = ahead + (codes,)
    for start in tl.range(0, groups, GROUPS, num_stages=1):
        left = groups - start
        following = ()
        scales = ()
        for tile in tl.static_range(TILES):
            skipped = tile + tile // (TILES // 2) * between
            places = packed_places + (skipped * groups + start + GROUPS) * 128
            codes = tl.load(places, mask=word_group < left - GROUPS, other=0)
            following = following + (codes,)
        for tile in tl.static_range(TILES):
            skipped = tile + tile // (TILES // 2) * between
            places = scale_places + start * outputs + skipped * 8
            scales = scales + (tl.load(places, mask=lane_group < left, other=0),)
        # A word's codes, from the lowest bits: inputs 0, 8, 16, 24, then 1, 9, 17, 25 of its lane.
        places = x_places + start * 64
        pair0 = tl.load(places, mask=word_group < left, other=0)
        pair1 = tl.load(places + 4, mask=word_group < left, other=0)
        pair2 = tl.load(places + 8, mask=word_group < left, other=0)
        pair3 = tl.load(places + 12, mask=word_group < left, other=0)
        x0, x1, x2, x3 = _first(pair0), _first(pair1), _first(pair2), _first(pair3)
        x4, x5, x6, x7 = _second(pair0), _second(pair1), _second(pair2), _second(pair3)
        large, middle, small = x0 + x2 + x5, x1 + x3 + x6, x4 + x7
        excess = 32776.0 * large + 2056.0 * middle + 136.0 * small  # with the 8 of code 8
        total = tl.sum(tl.reshape(large + middle + small, (GROUPS * 32, 4)), axis=1)
        new = ()
        for tile in tl.static_range(TILES):
            word = ahead[tile]
            left_word, right_word = word << 8, word >> 12
            part = _number(left_word, 0xF00, 0x47000000, IS_COMPILED) * x0 - excess
            part += _number(word, 0xF00, 0x47000000, IS_COMPILED) * x2
            part += _number(right_word, 0xF00, 0x47000000, IS_COMPILED) * x5
            part += _number(left_word, 0xF000, 0x45000000, IS_COMPILED) * x1
            part += _number(word, 0xF000, 0x45000000, IS_COMPILED) * x3
            part += _number(right_word, 0xF000, 0x45000000, IS_COMPILED) * x6
            part += _number(word, 0xF0000, 0x43000000, IS_COMPILED) * x4
            part += _number(right_word, 0xF0000, 0x43000000, IS_COMPILED) * x7
            part = tl.sum(tl.reshape(part, (GROUPS * 32, 4)), axis=1)
            scaled = part * _first(scales[tile]) + total * _second(scales[tile])
            new = new + (sums[tile] + scaled,)
        sums, ahead = new, following
    if IS_GATED:
        for tile in tl.static_range(TILES // 2):
            gate, other = _sum_tile(sums[tile], GROUPS), _sum_tile(sums[tile + TILES // 2], GROUPS)
            _store_gated(gate, other, (first + tile) * 8 + tl.arange(0, 8), out_ptr)
    else:
        for tile in tl.static_range(TILES):
            result = _sum_tile(sums[tile], GROUPS)
            of_tile = (first + tile) * 8 + tl.arange(0, 8)
            _store(result, of_tile, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD)


@triton.jit
def _sum_tile(sums, GROUPS: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(sums, (GROUPS, 8, 4)), axis=2), axis=0)


@triton.jit
def _first(pairs):
    """Return the first of two bfloat16 numbers, as float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pairs):
    return ((pairs >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _number(word, MASK: tl.constexpr, EXPONENT: tl.constexpr, IS_COMPILED: tl.constexpr):
    """Return the float32 number of some bits of a word and an exponent."""
    if IS_COMPILED:
        # (word & MASK) | EXPONENT in one instruction, which the compiler does not find.
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [word, MASK, EXPONENT],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        bits = (word & MASK) | EXPONENT
    return bits.to(tl.float32, bitcast=True)
