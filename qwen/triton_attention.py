"""The kernels of `qwen.gpu_attention`, in Triton: rotation, and attention of one token a row.

All add in float32. Arguments as in `qwen.triton_products`, but for tensors whose strides are given.
Source: Triton 3.6's language; attention in parts as in flash decoding (Dao et al., 2023).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rotation(
    positions_ptr,
    inv_freq_ptr,
    cos_ptr,
    sin_ptr,
    logn_ptr,
    scale,
    logn_length,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_LOGN: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """Compute cosines and sines of one row's position, and its log-n factor.

    Shapes: positions and logn (rows,), inv_freq (rows, HALF), cos and sin (rows, 2 * HALF).
    `WIDTH` is a power of two, at least `HALF`.
    """
    row, dims = tl.program_id(0), tl.arange(0, WIDTH)
    position = tl.load(positions_ptr + row)
    is_dim = dims < HALF
    inv_freq = tl.load(inv_freq_ptr + row * HALF + dims, mask=is_dim, other=0.0)
    angles = position.to(tl.float32) * inv_freq
    if IS_COMPILED:  # the language's own are approximations, far off for large angles
        cos, sin = libdevice.cos(angles), libdevice.sin(angles)
    else:
        cos, sin = tl.cos(angles), tl.sin(angles)
    for half in tl.static_range(2):
        places = (row * 2 + half) * HALF + dims
        tl.store(cos_ptr + places, cos * scale, mask=is_dim)
        tl.store(sin_ptr + places, sin * scale, mask=is_dim)
    if HAS_LOGN:
        factor = tl.log((position + 1).to(tl.float32)) / tl.log(logn_length.to(tl.float32))
        tl.store(logn_ptr + row, tl.maximum(factor, 1.0))


@triton.jit
def _rotated(places, dims, is_own, cos, sin, ROTARY_DIM: tl.constexpr):
    """Load some heads and rotate them; returns float32 of both, (heads, WIDTH).

    Shapes: places (heads, 1), where the heads' numbers begin; is_own (heads, WIDTH); cos, sin and
    dims (WIDTH,).
    """
    is_rotary, half = dims < ROTARY_DIM, ROTARY_DIM // 2
    other = tl.where(dims < half, dims + half, dims - half)
    own = tl.load(places + dims[None, :], mask=is_own, other=0.0).to(tl.float32)
    partner = tl.load(places + other[None, :], mask=is_own & is_rotary[None, :], other=0.0)
    turned = tl.where((dims < half)[None, :], -partner.to(tl.float32), partner.to(tl.float32))
    return own, own * cos[None, :] + turned * sin[None, :]


@triton.jit(do_not_specialize=["chunk"])
def attend_rows(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    logn_ptr,
    sums_ptr,
    norms_ptr,
    done_ptr,
    out_ptr,
    row_stride,
    head_stride,
    scale,
    chunk,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_LOGN: tl.constexpr,
    CHAINED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Let the new token of one row attend, by the queries that share one head's keys.

    Each of `PARTS` programs rotates the queries and sees `chunk` positions. The first one also
    keeps the token's key and value, and begins with them; the last to end joins what all have.

    Shapes: qkv (rows, (KV_HEADS * SHARED + 2 * KV_HEADS) * DIM); keys and values
    (rows, KV_HEADS, …, DIM) by their strides; positions and logn (rows,): of the new token; cos and
    sin (rows, ROTARY_DIM); out (rows, KV_HEADS, SHARED, DIM). Between programs: sums
    (rows * KV_HEADS, PARTS, SHARED, DIM), norms (rows * KV_HEADS, PARTS, SHARED, 2), the largest
    score and the sum of weights; done (rows * KV_HEADS,), zero before and after. `PADDED` and
    `WIDTH` are powers of two from 16 on, at least `SHARED` and `DIM`.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    program, part = tl.program_id(0), tl.program_id(1)
    row, head = program // KV_HEADS, program % KV_HEADS
    position = tl.load(positions_ptr + row)
    queries, dims = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    is_dim, is_query = dims < DIM, queries < SHARED
    is_own = is_query[:, None] & is_dim[None, :]

    cos = tl.load(cos_ptr + row * ROTARY_DIM + dims, mask=dims < ROTARY_DIM, other=1.0)
    sin = tl.load(sin_ptr + row * ROTARY_DIM + dims, mask=dims < ROTARY_DIM, other=0.0)
    heads: tl.constexpr = KV_HEADS * SHARED
    new_ptr = qkv_ptr + row * (heads + 2 * KV_HEADS) * DIM
    own_ptr = new_ptr + (head * SHARED + queries)[:, None] * DIM
    _, query = _rotated(own_ptr, dims, is_own, cos, sin, ROTARY_DIM)
    if HAS_LOGN:
        query = query * tl.load(logn_ptr + row)
    query = query.to(keys_ptr.dtype.element_ty)

    one = tl.zeros((1,), tl.int32)
    key_ptr = new_ptr + (heads + head + one)[:, None] * DIM
    _, key = _rotated(key_ptr, dims, is_dim[None, :], cos, sin, ROTARY_DIM)
    key = tl.reshape(key, (WIDTH,)).to(keys_ptr.dtype.element_ty)
    value = tl.load(new_ptr + (heads + KV_HEADS + head) * DIM + dims, mask=is_dim, other=0.0)
    value = value.to(values_ptr.dtype.element_ty)
    base = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    if part == 0:
        tl.store(keys_ptr + base + position * DIM + dims, key, mask=is_dim)
        tl.store(values_ptr + base + position * DIM + dims, value, mask=is_dim)

    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
    largest = tl.where(part == 0, score, float("-inf"))
    total = tl.where(part == 0, tl.full((PADDED,), 1.0, tl.float32), 0.0)
    sums = tl.where(part == 0, value.to(tl.float32)[None, :], tl.zeros((PADDED, WIDTH), tl.float32))
    start = part * chunk
    stop = tl.minimum(start + chunk, position.to(tl.int32))
    largest, total, sums = _attend_to(
        query, keys_ptr + base, values_ptr + base, start, stop, scale, largest, total, sums,
        DIM, WIDTH, BLOCK, STAGES,
    )  # fmt: skip
    if PARTS == 1:
        places = (program * SHARED + queries)[:, None] * DIM + dims[None, :]
        result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + places, result, mask=is_own)
    else:
        places = (program * PARTS + part) * SHARED + queries
        tl.store(sums_ptr + places[:, None] * DIM + dims[None, :], sums, mask=is_own)
        tl.store(norms_ptr + places * 2, largest, mask=is_query)
        tl.store(norms_ptr + places * 2 + 1, total, mask=is_query)
        tl.debug_barrier()  # all of this program's before it counts as done
        if tl.atomic_add(done_ptr + program, 1) == PARTS - 1:
            tl.store(done_ptr + program, 0)
            for own in tl.static_range(SHARED):
                _join(sums_ptr, norms_ptr, out_ptr, program, own, SHARED, DIM, WIDTH, PARTS)


@triton.jit
def _attend_to(
    query,
    keys_ptr,
    values_ptr,
    start,
    stop,
    scale,
    largest,
    total,
    sums,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to some positions of one head, beside what was attended to before.

    Returns:
        The largest score (queries,), the sum of weights (queries,), the weighted sum of values
        (queries, WIDTH), all as they were given for what came before.
    """
    dims, slots = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    is_dim = dims < DIM
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        is_seen = at + slots < stop
        places = (at + slots) * DIM
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
    return largest, total, sums


@triton.jit
def _join(
    sums_ptr,
    norms_ptr,
    out_ptr,
    program,
    own,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Join the parts of one query's attention; shapes as in `attend_rows`."""
    parts, dims = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    is_dim = dims < DIM
    places = (program * PARTS + parts) * SHARED + own
    largest, total = tl.load(norms_ptr + places * 2), tl.load(norms_ptr + places * 2 + 1)
    factors = tl.exp(largest - tl.max(largest, axis=0))
    sums = tl.load(
        sums_ptr + places[:, None] * DIM + dims[None, :], mask=is_dim[None, :], other=0.0
    )
    result = tl.sum(sums * factors[:, None], axis=0) / tl.sum(total * factors, axis=0)
    places = (program * SHARED + own) * DIM + dims
    tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit
def rotate_and_store(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    logn_ptr,
    query_ptr,
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
    (tokens, HEADS, DIM). `WIDTH` is a power of two, at least `DIM`.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    all_heads = HEADS + 2 * KV_HEADS
    is_own = (heads < all_heads)[:, None] & (dims < DIM)[None, :]
    cos = tl.load(cos_ptr + token * ROTARY_DIM + dims, mask=dims < ROTARY_DIM, other=1.0)
    sin = tl.load(sin_ptr + token * ROTARY_DIM + dims, mask=dims < ROTARY_DIM, other=0.0)
    places = qkv_ptr + (token * all_heads + heads)[:, None] * DIM
    own, rotated = _rotated(places, dims, is_own, cos, sin, ROTARY_DIM)
    query = rotated
    if HAS_LOGN:
        query = query * tl.load(logn_ptr + token)
    places = (token * HEADS + heads)[:, None] * DIM + dims[None, :]
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
