"""The kernels of `qwen.gpu_kernels`, in Triton: a row times a matrix, attention, rotation.

All add in float32. Arguments are tensors and sizes; lower-case ones are known at run time only.
Names ending in `_ptr` point to the first number of a contiguous tensor unless strides are given.
Source: Triton 3.6's language.
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute `ROWS` outputs of x @ weight.T + bias + add.

    Shapes: x (inputs,), weight (outputs, inputs), bias, add and out (outputs,).
    """
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    _store(result, outputs, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD)


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
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """Compute 8 * `TILES` outputs of x times 4-bit weights in groups of 128, plus bias and add.

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
        codes = tl.load(packed_places + tile * groups * 128, mask=word_group < groups, other=0)
        ahead = ahead + (codes,)
    for start in tl.range(0, groups, GROUPS, num_stages=1):
        left = groups - start
        following = ()
        scales = ()
        for tile in tl.static_range(TILES):
            places = packed_places + (tile * groups + start + GROUPS) * 128
            codes = tl.load(places, mask=word_group < left - GROUPS, other=0)
            following = following + (codes,)
        for tile in tl.static_range(TILES):
            places = scale_places + start * outputs + tile * 8
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
    for tile in tl.static_range(TILES):
        result = tl.sum(tl.sum(tl.reshape(sums[tile], (GROUPS, 8, 4)), axis=2), axis=0)
        of_tile = (first + tile) * 8 + tl.arange(0, 8)
        _store(result, of_tile, bias_ptr, add_ptr, out_ptr, HAS_BIAS, HAS_ADD)


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


@triton.jit(do_not_specialize=["chunk", "parts"])
def attend_part(
    query_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    sums_ptr,
    norms_ptr,
    out_ptr,
    row_stride,
    head_stride,
    scale,
    chunk,
    parts,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Let the queries of one head of one row attend to one part of its positions.

    Shapes: query and out (rows, KV_HEADS, SHARED, DIM); keys and values (rows, KV_HEADS, …, DIM) by
    their strides; positions (rows,): of the last key that is seen. Unless `IS_WHOLE`, results are
    left for `attend_join`: sums (rows * KV_HEADS, parts, SHARED, DIM) and norms
    (rows * KV_HEADS, parts, SHARED, 2): the largest score and the sum of weights. `PADDED` and
    `WIDTH` are powers of two from 16 on, at least `SHARED` and `DIM`.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    row, head = program // KV_HEADS, program % KV_HEADS
    start = part * chunk
    stop = tl.minimum(start + chunk, tl.load(positions_ptr + row).to(tl.int32) + 1)
    queries, dims, slots = tl.arange(0, PADDED), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    is_dim, is_query = dims < DIM, queries < SHARED
    is_own = is_query[:, None] & is_dim[None, :]
    own = (program * SHARED + queries)[:, None] * DIM + dims[None, :]
    query = tl.load(query_ptr + own, mask=is_own, other=0.0)
    base = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    largest = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, WIDTH), tl.float32)
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        is_seen = at + slots < stop
        places = base + (at + slots) * DIM
        is_key = is_seen[None, :] & is_dim[:, None]
        keys = tl.load(keys_ptr + places[None, :] + dims[:, None], mask=is_key, other=0.0)
        is_value = is_seen[:, None] & is_dim[None, :]
        values = tl.load(values_ptr + places[:, None] + dims[None, :], mask=is_value, other=0.0)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights, shrink = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee"
        )
        largest = new
    if IS_WHOLE:
        result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + own, result, mask=is_own)
    else:
        places = (program * parts + part) * SHARED + queries
        tl.store(sums_ptr + places[:, None] * DIM + dims[None, :], sums, mask=is_own)
        tl.store(norms_ptr + places * 2, largest, mask=is_query)
        tl.store(norms_ptr + places * 2 + 1, total, mask=is_query)


@triton.jit
def attend_join(
    sums_ptr,
    norms_ptr,
    out_ptr,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Join the parts of one query's attention; shapes as in `attend_part`."""
    program = tl.program_id(0)
    parts, dims = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    is_dim = dims < DIM
    places = (program // SHARED * PARTS + parts) * SHARED + program % SHARED
    largest, total = tl.load(norms_ptr + places * 2), tl.load(norms_ptr + places * 2 + 1)
    factors = tl.exp(largest - tl.max(largest, axis=0))
    sums = tl.load(
        sums_ptr + places[:, None] * DIM + dims[None, :], mask=is_dim[None, :], other=0.0
    )
    result = tl.sum(sums * factors[:, None], axis=0) / tl.sum(total * factors, axis=0)
    tl.store(out_ptr + program * DIM + dims, result.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=["tokens"])
def rotate_and_store(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    logn_ptr,
    query_ptr,
    tokens,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_LOGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate some heads of a token, keep its keys and values, hand on its queries.

    Shapes: qkv (tokens, HEADS + 2 * KV_HEADS, DIM); keys and values (KV_HEADS, …, DIM) by their
    stride; positions and logn (tokens,); cos and sin (tokens, ROTARY_DIM); query
    (HEADS, tokens, DIM). `WIDTH` is a power of two, at least `DIM`.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    all_heads = HEADS + 2 * KV_HEADS
    is_own = (heads < all_heads)[:, None] & (dims < DIM)[None, :]
    states_ptr = qkv_ptr + (token * all_heads + heads)[:, None] * DIM
    is_rotary, half = dims < ROTARY_DIM, ROTARY_DIM // 2
    other = tl.where(dims < half, dims + half, dims - half)
    own = tl.load(states_ptr + dims[None, :], mask=is_own, other=0.0).to(tl.float32)
    partner = tl.load(states_ptr + other[None, :], mask=is_own & is_rotary[None, :], other=0.0)
    turned = tl.where((dims < half)[None, :], -partner.to(tl.float32), partner.to(tl.float32))
    cos = tl.load(cos_ptr + token * ROTARY_DIM + dims, mask=is_rotary, other=1.0)
    sin = tl.load(sin_ptr + token * ROTARY_DIM + dims, mask=is_rotary, other=0.0)
    rotated = own * cos[None, :] + turned * sin[None, :]
    query = rotated
    if HAS_LOGN:
        query = query * tl.load(logn_ptr + token)
    places = (heads.to(tl.int64) * tokens + token)[:, None] * DIM + dims[None, :]
    is_query = is_own & (heads < HEADS)[:, None]
    tl.store(query_ptr + places, query.to(query_ptr.dtype.element_ty), mask=is_query)
    position = tl.load(positions_ptr + token)
    kept = position * DIM + dims[None, :]
    key_heads, value_heads = heads - HEADS, heads - HEADS - KV_HEADS
    is_key = is_own & ((key_heads >= 0) & (key_heads < KV_HEADS))[:, None]
    places = key_heads.to(tl.int64)[:, None] * head_stride + kept
    tl.store(keys_ptr + places, rotated.to(keys_ptr.dtype.element_ty), mask=is_key)
    is_value = is_own & (value_heads >= 0)[:, None]
    places = value_heads.to(tl.int64)[:, None] * head_stride + kept
    tl.store(values_ptr + places, own.to(values_ptr.dtype.element_ty), mask=is_value)
