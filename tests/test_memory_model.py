"""The memory model: published sizes, what grows with the context, and the largest that fits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen.memory_model import (
    CONTEXT_STEP,
    MemoryEstimate,
    MemoryItem,
    ModelShape,
    estimate_memory,
    largest_context,
)

#: Qwen-7B (late 2023), counted by hand: layers of 3 * 4096² + 4096² + 3 * 4096 * 11008.
QWEN_7B = ModelShape(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    context_length=32768,
    embedding=151936 * 4096,
    head=151936 * 4096,
    linear=32 * (4 * 4096**2 + 3 * 4096 * 11008),
    other=32 * (3 * 4096 + 2 * 4096) + 4096,
)


def estimate(shape=QWEN_7B, **options):
    return estimate_memory(shape, **{"context": 2048, "dtype": "bfloat16", "chunk": 256} | options)


def test_weights_of_qwen_7b_are_those_published():
    assert QWEN_7B.parameters == 7_721_324_544
    assert estimate(on_gpu=True).of_kind("weights") == 15_442_649_088
    assert estimate(on_gpu=True, dtype="float32").of_kind("weights") == 30_885_298_176


def test_int4_packs_the_layers_and_leaves_embedding_and_head():
    weights = estimate(replace(QWEN_7B, bits=4)).of_kind("weights")
    in_layers = QWEN_7B.linear // 2 + QWEN_7B.linear // 128 * 4
    assert weights == in_layers + 2 * (QWEN_7B.parameters - QWEN_7B.linear)
    assert 5.9e9 < weights < 6.0e9


def test_packing_takes_six_bits_for_each_weight_and_two_bytes_for_each_32():
    mapped = replace(QWEN_7B, stored_dtype="bfloat16", model_type="qwen")
    matrices = QWEN_7B.linear + QWEN_7B.head
    embedding = 2048 * (4096 * 2 + 65536)
    expected = matrices * 6 // 8 + matrices // 16 + 4 * QWEN_7B.other + embedding
    assert estimate(mapped, packs=True).of_kind("weights") == expected
    assert estimate(replace(mapped, bits=4), packs=True) == estimate(replace(mapped, bits=4))


def test_dense_weights_that_are_not_mapped_are_there_while_they_are_packed():
    copied = estimate(replace(QWEN_7B, model_type="qwen"), packs=True)
    dense = 2 * (QWEN_7B.parameters - QWEN_7B.embedding)
    assert dense in [row.size for row in copied.rows if row.phase == "loading"]


def test_models_that_the_decoder_does_not_run_are_not_packed():
    other = replace(QWEN_7B, model_type="llama")
    assert estimate(other, packs=True) == estimate(other)


def test_int8_checkpoints_are_unpacked_and_as_large_as_dense_ones():
    assert estimate(replace(QWEN_7B, bits=8)).of_kind("weights") == 2 * QWEN_7B.parameters


def test_cache_of_qwen_7b_takes_half_a_megabyte_a_token():
    assert estimate(context=1).of_kind("cache") == 2 * 32 * 32 * 128 * 2 == 524_288


def test_int8_cache_takes_a_byte_each_and_a_scale_of_two_for_each_token_and_head():
    assert estimate(context=1, kv_cache="int8").of_kind("cache") == 2 * 32 * 32 * (128 + 2)
    asked = replace(QWEN_7B, caches_int8=True)
    assert estimate(asked) == estimate(kv_cache="int8")


def test_shared_key_value_heads_are_cached_once():
    shared = replace(QWEN_7B, num_kv_heads=4)
    assert estimate(shared).of_kind("cache") * 8 == estimate().of_kind("cache")


def test_mapped_embedding_counts_only_as_far_as_tokens_read_it():
    mapped = replace(QWEN_7B, stored_dtype="bfloat16")
    whole, part = estimate().of_kind("weights"), estimate(mapped).of_kind("weights")
    assert whole - part == 2 * QWEN_7B.embedding - 2048 * (4096 * 2 + 65536)
    assert estimate(mapped, context=32768).of_kind("weights") == whole


def test_tied_embedding_is_read_in_whole_as_the_output_matrix():
    tied = replace(QWEN_7B, head=0, stored_dtype="bfloat16")
    assert estimate(tied).of_kind("weights") == 2 * tied.parameters


def test_weights_of_another_dtype_are_copied_while_their_file_is_mapped():
    stored = replace(QWEN_7B, stored_dtype="float32", stored_bytes=30_885_298_176)
    copied = estimate(stored)
    assert copied.of_kind("file") == 30_885_298_176
    assert copied.resident > copied.needed  # pages of a file can be dropped
    assert copied.resident == sum(
        row.size for row in copied.rows if row.phase in ("always", "loading")
    )


def test_need_is_the_larger_phase_and_not_their_sum():
    rows = (
        MemoryItem("a", 10, "weights"),
        MemoryItem("b", 5, "weights", "loading"),
        MemoryItem("c", 3, "activations", "running"),
        MemoryItem("d", 4, "file", "loading"),
    )
    assert MemoryEstimate(rows).needed == 15
    assert MemoryEstimate(rows).resident == 19


def test_program_counts_on_a_cpu_and_not_on_a_gpu():
    assert estimate(program=10**9).needed - estimate(program=0).needed == 10**9
    assert estimate(on_gpu=True, program=10**9) == estimate(on_gpu=True, program=0)


def test_a_further_form_of_the_weights_is_a_further_row():
    row = MemoryItem("weights: int8 copies for decoding", 10**9, "weights")
    assert row in estimate(further=(row,)).rows
    assert estimate(further=(row,)).needed == estimate().needed + 10**9


shapes = st.builds(
    lambda heads, shared, **sizes: ModelShape(
        num_heads=heads * shared, num_kv_heads=heads, **sizes
    ),
    heads=st.integers(1, 64),
    shared=st.integers(1, 8),
    vocab_size=st.integers(1, 300_000),
    hidden_size=st.integers(1, 20_000),
    intermediate_size=st.integers(1, 60_000),
    num_layers=st.integers(1, 100),
    head_dim=st.integers(1, 256),
    context_length=st.integers(1, 200_000),
    embedding=st.integers(1, 10**10),
    head=st.integers(0, 10**10),
    linear=st.integers(0, 10**11),
    other=st.integers(0, 10**9),
    stored_dtype=st.sampled_from([None, "bfloat16", "float32"]),
    stored_bytes=st.integers(0, 10**11),
    bits=st.sampled_from([0, 4, 8]),
)
dtypes = st.sampled_from(["bfloat16", "float16", "float32"])
caches = st.sampled_from(["auto", "int8"])


@given(shapes, dtypes, caches, st.booleans(), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_longer_context_never_takes_less(shape, dtype, kv_cache, on_gpu, first, second):
    def needed(context):
        options = {"dtype": dtype, "kv_cache": kv_cache, "on_gpu": on_gpu}
        return estimate(shape, context=context, **options).needed

    assert needed(min(first, second)) <= needed(max(first, second))


@given(shapes, dtypes, st.integers(1, 10**6))
def test_int8_never_caches_more_than_float(shape, dtype, context):
    dense = estimate(shape, context=context, dtype=dtype).of_kind("cache")
    packed = estimate(shape, context=context, dtype=dtype, kv_cache="int8").of_kind("cache")
    assert packed <= dense or shape.head_dim <= 2


@given(st.integers(1, 200_000), st.integers(0, 300_000))
def test_largest_context_fits_and_one_step_more_does_not(limit, true_limit):
    found = largest_context(lambda tokens: tokens <= true_limit, limit=limit)
    assert found <= min(limit, true_limit)
    assert found == limit or found % CONTEXT_STEP == 0
    assert found == limit or found + CONTEXT_STEP > min(limit, true_limit)


@pytest.mark.parametrize(("true_limit", "found"), [(255, 0), (256, 256), (511, 256), (512, 512)])
def test_largest_context_is_a_multiple_of_256(true_limit, found):
    assert largest_context(lambda tokens: tokens <= true_limit, limit=1000) == found
