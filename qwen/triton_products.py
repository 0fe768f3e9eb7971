"""The kernels of `qwen.gpu_products`, in Triton: rows times a matrix, and what stands between.

All add in float32. Arguments are tensors and sizes; lower-case ones are known at run time only.
Names ending in `_ptr` point to the first number of a contiguous tensor. Where a kernel is
`CHAINED`, it begins while the one before it still runs, loads its weights, and waits before it
touches anything else (programmatic dependent launch, from compute capability 9.0 on).
`IS_COMPILED` allows PTX, of which Triton's interpreter knows nothing. Source: Triton 3.6's
language; PTX 8.7, `mma.sync.m16n8k16`.
"""

# Triton has no unpacking of tuples.
# ruff: noqa: RUF005

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rms_norm(x_ptr, weight_ptr, out_ptr, size, eps, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    """Normalise a row of x and weight it; `WIDTH` is a power of two, at least its size."""
    if CHAINED:
        gdc_launch_dependents()
    columns = tl.arange(0, WIDTH)
    is_inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_wait()
    places = tl.program_id(0) * size + columns
    x = tl.load(x_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(out_ptr + places, (x * factor * weight).to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def gate(x_ptr, out_ptr, size, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Compute silu(gate) * other of rows of `size` gates and as many others."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < size
    places = tl.program_id(0) * 2 * size + columns
    gates = tl.load(x_ptr + places, mask=is_inside, other=0.0)
    others = tl.load(x_ptr + places + size, mask=is_inside, other=0.0)
    gated = _gated(gates.to(tl.float32), others.to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(0) * size + columns, gated, mask=is_inside)


@triton.jit
def _gated(gates, others, dtype: tl.constexpr):
    """Return silu(gates) * others, rounded as if both had been stored before."""
    gates, others = gates.to(dtype).to(tl.float32), others.to(dtype).to(tl.float32)
    return (gates * tl.sigmoid(gates) * others).to(dtype)


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
    CHAINED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Compute `ROWS` outputs of x @ weight.T + bias + add, or half as many that are gated.

    All weights are asked for before the first is used, in `STEPS` times `COLUMNS`.

    Shapes: x (inputs,), weight (outputs, inputs), bias, add and out (outputs,). If `IS_GATED`,
    the first half of the outputs are gates of the second, and out is silu(gate) * other.
    """
    if CHAINED:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if IS_GATED:
        outputs = outputs // 2 + outputs % 2 * (tl.num_programs(0) * (ROWS // 2))
    columns = tl.arange(0, COLUMNS)
    weight_places = weight_ptr + outputs[:, None].to(tl.int64) * inputs + columns[None, :]
    weights = ()
    for step in tl.static_range(STEPS):
        is_inside = columns < inputs - step * COLUMNS
        weights = weights + (
            tl.load(
                weight_places + step * COLUMNS,
                mask=is_inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            ),
        )
    if CHAINED:
        gdc_wait()
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        places = x_ptr + step * COLUMNS + columns
        x = tl.load(places, mask=columns < inputs - step * COLUMNS, other=0.0)
        sums += weights[step].to(tl.float32) * x.to(tl.float32)[None, :]
    result = tl.sum(sums, axis=1)
    if IS_GATED:
        gates, others = tl.split(tl.reshape(result, (ROWS // 2, 2)))
        places = out_ptr + tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(places, _gated(gates, others, out_ptr.dtype.element_ty))
    else:
        if HAS_BIAS:
            result += tl.load(bias_ptr + outputs).to(tl.float32)
        if HAS_ADD:
            result += tl.load(add_ptr + outputs).to(tl.float32)
        tl.store(out_ptr + outputs, result.to(out_ptr.dtype.element_ty))


def _ptx_of_int4() -> str:
    """Write PTX for a warp: 16 outputs of 128 inputs, of two tiles, times 8 rows.

    Operands: four sums; four words of one tile and four of the other; of each word the four pairs
    of inputs that its codes belong to. A code becomes bfloat16 behind the exponent of 128.
    """
    sums, more = "{$0, $1, $2, $3}", "{s0, s1, s2, s3}"  # two chains, which do not wait for another
    lines = [".reg .b32 a0, a1, a2, a3, moved;", ".reg .f32 s0, s1, s2, s3;"]
    lines += [f"mov.b32 {name}, 0;" for i in range(4) for name in (f"${i}", f"s{i}")]
    for word in range(4):
        for half, chain in enumerate((sums, more)):
            for i in range(4):  # the second tile's codes beside the first one's
                source, nibble = f"${4 + 4 * (i % 2) + word}", 2 * half + i // 2
                if nibble:
                    lines.append(f"shr.b32 moved, {source}, {4 * nibble};")
                    source = "moved"
                lines.append(f"lop3.b32 a{i}, {source}, 0x000F000F, 0x43004300, 0xEA;")
            pairs = f"${12 + 8 * half + word}, ${16 + 8 * half + word}"
            operands = f"{chain}, {{a0, a1, a2, a3}}, {{{pairs}}}, {chain};"
            lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {operands}")
    lines += [f"add.f32 ${i}, ${i}, s{i};" for i in range(4)]
    return "\n".join(["{", *lines, "}"])


_INT4_PTX = tl.constexpr(_ptx_of_int4())
_INT4_OPERANDS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24))


@triton.jit
def int4_rows(
    x_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    rows,
    inputs,
    outputs,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    CHAINED: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Compute 16 * `PAIRS` outputs of up to 8 rows times 4-bit weights, plus bias and add.

    Or half as many that are gated, see `dense_row`. A tile of the packed form is 8 outputs of a
    group of 128 inputs: 32 lanes of four words of eight codes, each lane one quarter of an
    output's; which is what a warp's matrix units take. So each of `GROUPS` warps multiplies a
    group of two tiles at a time, `STEPS` times. All weights are asked for before the first is used.

    Shapes: x (rows, inputs / 2) int32, pairs of bfloat16; packed (outputs / 8, inputs / 128, 128)
    int32, see `qwen.int4_kernels.pack`; scales
    (inputs / 128, outputs) int32, pairs of bfloat16: scale and offset; bias (outputs,); add and out
    (rows, outputs). `IS_SINGLE`: there is one row.
    """
    if CHAINED:
        gdc_launch_dependents()
    groups = inputs // 128
    # The second tile of a pair is the next one, or that which the first one gates.
    apart, STRIDE = (outputs // 16, 1) if IS_GATED else (1, 2)
    first = tl.program_id(0) * PAIRS * STRIDE
    words = tl.arange(0, GROUPS * 128)
    group, lane_row, word = words // 128, words // 16 % 8, words % 4
    packed_places = packed_ptr + first * groups * 128 + words
    # A lane's four sums: an output of the first tile for two rows, then one of the second.
    scale_places = scales_ptr + group * outputs + (first + word // 2 * apart) * 8 + lane_row
    weights = ()
    for step in tl.static_range(STEPS):
        is_inside = group + step * GROUPS < groups
        for pair in tl.static_range(PAIRS):
            places = packed_places + (pair * STRIDE * groups + step * GROUPS) * 128
            own = tl.load(places, mask=is_inside, other=0)
            other = tl.load(places + apart * groups * 128, mask=is_inside, other=0)
            places = scale_places + step * GROUPS * outputs + pair * STRIDE * 8
            # In the layout of the words, from which the sums come; both rows have the same.
            loaded = tl.load(places, mask=is_inside & (word % 2 == 0), other=0)
            scales, _ = tl.split(tl.reshape(loaded, (GROUPS * 64, 2)))
            weights = weights + ((own, other, scales),)
    if CHAINED:
        gdc_wait()
    even = ()
    odd = ()
    for _ in tl.static_range(PAIRS):
        even = even + (tl.zeros((GROUPS * 64,), dtype=tl.float32),)
        odd = odd + (tl.zeros((GROUPS * 64,), dtype=tl.float32),)
    # Inputs of a lane's words, from the lowest bits: 0, 8, 16, 24, then 1, 9, 17, 25; those of
    # the next word begin at 2.
    x_places = x_ptr + (lane_row * groups + group) * 64 + words // 4 % 4 * 16 + word
    nothing = tl.zeros((GROUPS * 128,), tl.int32)
    for step in tl.static_range(STEPS):
        is_inside = (group + step * GROUPS < groups) & (lane_row < rows)
        places = x_places + step * GROUPS * 64
        pair0 = tl.load(places, mask=is_inside, other=0)
        pair1 = tl.load(places + 4, mask=is_inside, other=0)
        pair2 = tl.load(places + 8, mask=is_inside, other=0)
        pair3 = tl.load(places + 12, mask=is_inside, other=0)
        x = (pair0, pair1, pair2, pair3)
        # Codes of 0 count as 128: from them the sum of the inputs.
        even_zero, odd_zero = _multiply_int4(nothing, nothing, x, GROUPS, IS_COMPILED)
        new_even = ()
        new_odd = ()
        for pair in tl.static_range(PAIRS):
            own, other, scales = weights[step * PAIRS + pair]
            even_part, odd_part = _multiply_int4(own, other, x, GROUPS, IS_COMPILED)
            new_even = new_even + (even[pair] + _scaled(even_part, even_zero, scales),)
            new_odd = new_odd + (odd[pair] + _scaled(odd_part, odd_zero, scales),)
        even, odd = new_even, new_odd
    for pair in tl.static_range(PAIRS):
        at = first + pair * STRIDE
        sizes = (rows, outputs, at, apart)
        _store_rows(
            even[pair], 0, sizes, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD, IS_GATED, GROUPS
        )
        if not IS_SINGLE:
            _store_rows(
                odd[pair], 1, sizes, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD, IS_GATED, GROUPS
            )


@triton.jit
def _scaled(sums, zeros, scales):
    """Return what sums with 128 added to each code stand for; `zeros` are those of codes of 0."""
    return (sums - zeros * (136 / 128)) * _first(scales) + zeros * (_second(scales) * (1 / 128))


@triton.jit
def _store_rows(
    sums,
    odd,
    sizes,
    bias_ptr,
    add_ptr,
    out_ptr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    IS_GATED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Store 16 outputs of every second row, or 8 that are gated; see `int4_rows`."""
    rows, outputs, first, apart = sizes
    result = tl.sum(tl.reshape(sums, (GROUPS, 64)), axis=0)  # outputs, rows, tiles
    if IS_GATED:
        gates, others = tl.split(tl.reshape(result, (32, 2)))
        places = tl.arange(0, 32)
        row = places % 4 * 2 + odd
        places = row * (outputs // 2) + first * 8 + places // 4
        gated = _gated(gates, others, out_ptr.dtype.element_ty)
        tl.store(out_ptr + places, gated, mask=row < rows)
    else:
        places = tl.arange(0, 64)
        row = places % 8 // 2 * 2 + odd
        output = (first + places % 2 * apart) * 8 + places // 8
        places = row * outputs + output
        if HAS_BIAS:
            result += tl.load(bias_ptr + output).to(tl.float32)
        if HAS_ADD:
            result += tl.load(add_ptr + places, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _multiply_int4(own, other, x, GROUPS: tl.constexpr, IS_COMPILED: tl.constexpr):
    """Multiply groups of two tiles by 8 rows; each code counts as 128 more than it is.

    Returns:
        Two tensors, (GROUPS * 64,), of (group, output, row, tile): of even rows and of odd ones.
    """
    if IS_COMPILED:
        operands = [own, other, x[0], x[1], x[2], x[3]]
        sums = tl.inline_asm_elementwise(
            _INT4_PTX, _INT4_OPERANDS, operands, dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        both = tl.join(_sum_int4(own, x, GROUPS), _sum_int4(other, x, GROUPS))
        sums = tl.permute(tl.reshape(both, (GROUPS, 8, 4, 2, 2)), (0, 1, 2, 4, 3))
    return tl.split(tl.reshape(sums, (GROUPS * 64, 2)))


@triton.jit
def _sum_int4(words, x, GROUPS: tl.constexpr):
    """Do what the matrix units do: (GROUPS, outputs, rows) of a tile's words."""
    words = tl.reshape(words, (GROUPS, 8, 1, 16))
    sums = tl.zeros((GROUPS, 8, 8, 16), tl.float32)
    for nibble in tl.static_range(4):
        pairs = tl.reshape(x[nibble], (GROUPS, 1, 8, 16))
        sums += ((words >> 4 * nibble & 15) + 128).to(tl.float32) * _first(pairs)
        sums += ((words >> 4 * nibble + 16 & 15) + 128).to(tl.float32) * _second(pairs)
    return tl.sum(sums, axis=3)


@triton.jit
def int4_weights(
    packed_ptr, scales_ptr, out_ptr, groups, ROWS: tl.constexpr, CHAINED: tl.constexpr
):
    """Unpack 4-bit weights of 8 outputs, `ROWS` / 8 groups; see `int4_rows`.

    Each pair of weights looks up its word, so that those written together lie together.

    Shapes: packed (outputs / 8, groups, 128) int32; scales (groups, outputs) and out
    (outputs, groups * 64) int32, pairs of bfloat16.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    rows, pairs = tl.arange(0, ROWS)[:, None], tl.arange(0, 64)[None, :]
    group, output = tl.program_id(1) * (ROWS // 8) + rows // 8, rows % 8
    is_inside = group < groups
    place = (tile * groups + group) * 128 + output * 16 + pairs // 16 * 4 + pairs % 4
    codes = tl.load(packed_ptr + place, mask=is_inside, other=0) >> 4 * (pairs // 4 % 4)
    place = (group * tl.num_programs(0) + tile) * 8 + output
    scales = tl.load(scales_ptr + place, mask=is_inside, other=0)
    first = ((codes & 15) - 8).to(tl.float32) * _first(scales) + _second(scales)
    second = ((codes >> 16 & 15) - 8).to(tl.float32) * _first(scales) + _second(scales)
    place = ((tile * 8 + output) * groups + group) * 64 + pairs
    tl.store(out_ptr + place, _bits(first) | _bits(second) << 16, mask=is_inside)


@triton.jit
def _bits(numbers):
    """Round float32 to bfloat16; its bits, in an int32."""
    return numbers.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _first(pairs):
    """Return the first of two bfloat16 numbers, as float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pairs):
    return ((pairs >> 16) << 16).to(tl.float32, bitcast=True)
