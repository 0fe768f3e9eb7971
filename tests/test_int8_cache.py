"""The int8 cache: how exact, how large, and never taken for a dense one."""

import copy
import json
import threading

import pytest
import torch
from golden_v1 import GOLDEN, columns, golden_ids, load_tiny, pad_left, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import build_tiny_model
from tiny_v1 import write_tiny_v1
from transformers import DynamicCache, Qwen2Config

import app
from qwen import AutoModelForCausalLM
from qwen.engine import Engine
from qwen.errors import InvalidRequest, InvalidSetting
from qwen.int8_cache import (
    FACTOR_TOKENS,
    GROWTH,
    Int8Cache,
    check_cache_kind,
    choose_kv_cache,
    dequantize_kv,
    key_factors,
    quantize_kv,
)
from qwen.load_options import LoadOptions
from qwen.local import load_backend
from qwen.messages import SamplingParams

PROMPT = list(range(5, 25))
NUMBERS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=16)


def random_states(seed=0, *, batch=2, heads=2, length=5, head_dim=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, heads, length, head_dim), generator=generator)


def wide_config():
    return Qwen2Config(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )


def fill(cache, length, *, batch=2, seed=0, dtype=torch.float32):
    """Append the same random tokens to whatever cache; return what its last layer gives."""
    for index in range(2):
        pair = [random_states(seed + i, batch=batch, length=length).to(dtype) for i in (0, 1)]
        given = cache.update(*pair, index)
    return given


def stored_bytes(cache):
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer.stored())


def dense_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def read(model, ids, cache, *, chunk=1, **options):
    """Logits at every position, read in chunks: each but the first attends to what is cached."""
    with torch.no_grad():
        parts = ids.split(chunk, dim=1)
        return torch.cat(
            [model(part, past_key_values=cache, **options).logits for part in parts], dim=1
        )


def engine_reply(model, prompt=PROMPT, *, max_new_tokens=8, **options):
    engine = Engine(model, eos_token_ids=[], context_length=512, **options)
    values = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}
    steps = engine.submit(prompt, SamplingParams(**values), cancel=threading.Event())
    return [step.token_id for step in steps if step.token_id is not None]


# Numbers


@settings(deadline=None)
@given(NUMBERS, st.sampled_from([1e-20, 1e-6, 1.0, 1e6]))
def test_rounding_error_is_at_most_half_a_step(numbers, size):
    exact = torch.tensor([numbers]) * size
    codes, scales = quantize_kv(exact)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    error = (dequantize_kv(codes, scales, out=torch.empty_like(exact)) - exact).abs()
    # The step is the largest number / 127, itself rounded to bfloat16.
    assert (error <= exact.abs().max() / 127 * 0.502 + 1e-36).all()


@settings(deadline=None)
@given(NUMBERS.filter(lambda numbers: len(numbers) % 2 == 0))
def test_key_is_rounded_by_at_most_half_a_step_of_its_own_channel(numbers):
    exact = torch.tensor([numbers])
    factors = key_factors(exact)
    codes, scales = quantize_kv(exact, factors)
    error = (dequantize_kv(codes, scales, factors, out=torch.empty_like(exact)) - exact).abs()
    assert (error <= (exact / factors).abs().max() / 127 * 0.502 * factors + 1e-30).all()


def test_one_large_channel_of_keys_does_not_coarsen_the_others():
    keys = random_states(length=40)
    keys[..., 7] += 200
    plain = dequantize_kv(*quantize_kv(keys), out=torch.empty_like(keys))
    factors = key_factors(keys)
    scaled = dequantize_kv(*quantize_kv(keys, factors), factors, out=torch.empty_like(keys))
    others = [channel for channel in range(64) if channel != 7]
    error, plain_error = ((x - keys)[..., others].norm() for x in (scaled, plain))
    assert error < plain_error / 5


def test_channels_that_rotate_into_each_other_share_a_factor_that_no_later_token_changes():
    keys = random_states(length=FACTOR_TOKENS)
    factors = key_factors(keys)
    assert torch.equal(factors[..., :32], factors[..., 32:])
    assert torch.equal(factors, key_factors(torch.cat([keys, 99 * keys], dim=2)))


def test_states_that_are_not_finite_stay_so():
    states = random_states()
    states[0, 0, 0, 0], states[0, 0, 1, 0] = float("nan"), float("inf")
    dense = dequantize_kv(*quantize_kv(states), out=torch.empty_like(states))
    assert not dense[0, 0, :2, 0].isfinite().any()
    assert dense[0, 0, 2:].isfinite().all()


# Memory


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_memory_is_halved_against_bfloat16_and_quartered_against_float32(dtype, share):
    int8, dense = Int8Cache(wide_config()), DynamicCache(config=wide_config())
    for cache in (int8, dense):
        fill(cache, 4 * GROWTH, dtype=dtype)
    # Beside the codes: 2 bytes of scale for a token and head of 64, and the factors.
    assert dense_bytes(dense) / share < stored_bytes(int8) < dense_bytes(dense) / share * 1.04


def test_room_in_reserve_is_less_than_one_block():
    cache = Int8Cache(wide_config())
    for count in (1, GROWTH - 1, 1, GROWTH, 5):
        fill(cache, count)
        room = cache.layers[0].stored()[0].shape[2]
        assert 0 <= room - cache.get_seq_length() < GROWTH


def test_no_dense_states_are_kept():
    cache = Int8Cache(wide_config())
    fill(cache, 10)
    layer = cache.layers[0]
    assert layer.keys is None and layer.values is None
    kept = {t.dtype for t in layer.stored()}
    assert kept == {torch.int8, torch.bfloat16}


# Operations of Transformers


def both_filled(*, batch=3, length=9):
    caches = Int8Cache(wide_config()), DynamicCache(config=wide_config())
    for cache in caches:
        fill(cache, length, batch=batch)
        cache.layers[0].ntk_alpha = torch.arange(float(batch))
    return caches


@pytest.mark.parametrize(
    ("operate", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.crop(-4), [0, 1, 2]),
        (lambda cache: cache.crop(-99), [0, 1, 2]),
        (lambda cache: cache.reset(), [0, 1, 2]),
    ],
    ids=["reorder", "repeat", "select", "crop", "crop all", "reset"],
)
def test_operation_does_to_codes_scales_and_alpha_what_it_does_to_a_dense_cache(operate, rows):
    int8, dense = both_filled()
    operate(int8)
    operate(dense)
    assert int8.get_seq_length() == dense.get_seq_length()
    assert int8.get_mask_sizes(4, 0) == dense.get_mask_sizes(4, 0)
    assert int8.layers[0].ntk_alpha.tolist() == rows
    given, expected = (fill(cache, 2, batch=len(rows), seed=50) for cache in (int8, dense))
    for actual, exact in zip(given, expected, strict=True):
        torch.testing.assert_close(actual, exact, atol=0.03, rtol=0)


def test_copy_shares_nothing_with_its_original():
    cache = Int8Cache(wide_config())
    fill(cache, 5)
    twin = copy.deepcopy(cache)
    before = [tensor.clone() for tensor in twin.layers[1].stored()]
    fill(cache, 3, seed=9)
    assert twin.get_seq_length() == 5
    assert all(map(torch.equal, twin.layers[1].stored(), before))


def test_cache_made_in_inference_mode_can_be_continued_outside_it():
    cache = Int8Cache(wide_config())
    with torch.inference_mode():
        fill(cache, 5)
    keys, _ = fill(cache, 5)
    assert keys.shape[2] == cache.get_seq_length() == 10


# On models


@pytest.mark.parametrize("chunk", [1, 7])
def test_logits_on_an_int8_cache_are_near_those_on_a_dense_one(chunk):
    model, ids = load_tiny(), golden_ids(0, 60)
    dense, int8 = DynamicCache(config=model.config), Int8Cache(model.config)
    expected, actual = (read(model, ids, cache, chunk=chunk) for cache in (dense, int8))
    assert not torch.equal(actual, expected)
    assert (actual - expected).abs().mean() < 0.04 * expected.std()


def test_int8_is_no_further_from_dense_than_the_published_one():
    model = load_tiny(use_cache_quantization=True)
    with torch.no_grad():
        prompt = model(golden_ids(0, 48), use_cache=True)
        cache, logits = prompt.past_key_values, [prompt.logits[:, -1]]
        assert isinstance(cache, Int8Cache)
        for at in range(48, 68):
            logits.append(model(golden_ids(at, at + 1), past_key_values=cache).logits[:, -1])
    ids = golden_ids(0, 68)
    exact = read(load_tiny(), ids, None, chunk=68, prompt_length=48)[0, 47:]
    published = tensors()["int8kv.steps20.cols"].float()
    error, published_error = (
        (found - exact[:, columns()]).abs().mean()
        for found in (torch.cat(logits)[:, columns()], published)
    )
    assert 0 < error < 0.5 * published_error


@pytest.mark.parametrize("load", [load_tiny, build_tiny_model], ids=["v1", "qwen2"])
def test_engine_decodes_on_an_int8_cache_what_the_model_does(load):
    model = load()
    expected, cache = [], Int8Cache(model.config)
    ids = torch.tensor([PROMPT])
    options = {"prompt_length": len(PROMPT)} if model.config.model_type == "qwen" else {}
    for _ in range(8):
        ids = read(model, ids, cache, chunk=999, **options)[:, -1:].argmax(-1)
        expected.append(int(ids))
    assert engine_reply(model, kv_cache="int8") == expected


def test_alpha_of_a_long_prompt_stays_with_the_int8_cache():
    model, ids = load_tiny(), golden_ids(0, 100)
    int8 = Int8Cache(model.config)
    actual = read(model, ids, int8, chunk=30, prompt_length=90)
    expected = read(model, ids, DynamicCache(config=model.config), chunk=30, prompt_length=90)
    assert int8.layers[0].ntk_alpha.tolist() == [3.0]
    wrong = read(model, ids, DynamicCache(config=model.config), chunk=30, prompt_length=60)
    error, wrong_error = ((x - expected).abs().mean() for x in (actual, wrong))
    assert 10 * error < wrong_error


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generate_runs_on_an_int8_cache_where_the_configuration_asks(options):
    model = load_tiny(use_cache_quantization=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(golden_ids(0, 80), return_dict_in_generate=True, **settings, **options)
    assert output.sequences.shape == (1, 92)
    assert isinstance(output.past_key_values, Int8Cache)
    assert set(output.past_key_values.layers[0].ntk_alpha.tolist()) == {3.0}


def test_rows_of_a_padded_batch_decode_as_alone():
    model = load_tiny(use_cache_quantization=True)
    ids, mask = pad_left([golden_ids(0, 30)[0], golden_ids(40, 110)[0]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    together = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(golden_ids(40, 110), **settings)
    assert torch.equal(together.sequences[1, -6:], alone.sequences[0, -6:])


# Never mixed up


def test_dense_cache_is_refused_by_a_model_that_keeps_int8():
    model = load_tiny(use_cache_quantization=True)
    with pytest.raises(InvalidRequest, match="DynamicCache"):
        model(golden_ids(0, 4), past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_second_kind_of_cache_is_refused_by_generate(kind):
    model = load_tiny(use_cache_quantization=True)
    with pytest.raises(InvalidSetting, match=kind):
        model.generate(golden_ids(0, 4), cache_implementation=kind, max_new_tokens=2)


def test_continuous_batching_is_refused_by_a_model_that_keeps_int8():
    model = load_tiny(use_cache_quantization=True)
    with pytest.raises(InvalidRequest, match="cached in int8"):
        model(golden_ids(0, 4), cache=object())


def test_each_kind_is_refused_where_the_other_is_kept():
    int8, dense = both_filled()
    check_cache_kind(int8, int8=True)
    check_cache_kind(dense, int8=False)
    with pytest.raises(InvalidRequest, match="DynamicCache does not"):
        check_cache_kind(dense, int8=True)
    with pytest.raises(InvalidRequest, match="Int8Cache does not"):
        check_cache_kind(int8, int8=False)


def test_cache_of_another_batch_or_model_is_refused():
    int8, _ = both_filled(batch=3)
    with pytest.raises(InvalidRequest, match="3 sequences of 2 heads of size 64"):
        fill(int8, 1, batch=2)
    assert int8.get_seq_length() == 9


def test_model_with_other_layers_than_full_attention_is_refused():
    config = Qwen2Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    for build in (lambda: Int8Cache(config), lambda: choose_kv_cache(config, kv_cache="int8")):
        with pytest.raises(InvalidSetting, match="sliding_attention"):
            build()


def test_unknown_choice_is_refused_when_the_engine_is_built():
    with pytest.raises(InvalidSetting, match="int7"):
        Engine(build_tiny_model(), eos_token_ids=[], context_length=9, kv_cache="int7")


# The option


@pytest.fixture
def made(monkeypatch):
    """Every int8 cache that is made."""
    caches = []

    class Watched(Int8Cache):
        def __init__(self, config):
            super().__init__(config)
            caches.append(self)

    monkeypatch.setattr("qwen.int8_cache.Int8Cache", Watched)
    return caches


@pytest.mark.parametrize(
    ("kv_cache", "asked_by_config", "count"),
    [("auto", False, 0), ("int8", False, 1), ("auto", True, 1), ("int8", True, 1)],
)
def test_engine_keeps_what_option_or_configuration_ask_for(made, kv_cache, asked_by_config, count):
    model = load_tiny(use_cache_quantization=asked_by_config)
    engine_reply(model, kv_cache=kv_cache)
    assert len(made) == count
    assert all(cache.get_seq_length() == len(PROMPT) + 7 for cache in made)


def test_option_of_the_backend_reaches_the_engine(made, tmp_path):
    backend = load_backend(str(write_tiny_v1(tmp_path)), LoadOptions(device="cpu", kv_cache="int8"))
    assert len(made) == 1  # by the warm-up
    backend.close()


def test_flag_reaches_the_backend(monkeypatch):
    monkeypatch.setattr("qwen.local.load_backend", lambda checkpoint, options, report: options)
    monkeypatch.setattr(app, "DeferredBackend", lambda load, on_status: load(print))
    monkeypatch.setattr(app, "serve", lambda settings, backend, activity: backend)
    monkeypatch.setattr(app.Activity, "watch", lambda self, backend: backend)
    for flags, expected in ([], "auto"), (["--kv-cache", "int8"], "int8"):
        monkeypatch.setattr("sys.argv", ["app.py", *flags])
        assert app.main().kv_cache == expected


@pytest.mark.integration
def test_real_model_answers_on_an_int8_cache_as_on_a_dense_one(embedded_folder):
    case = json.loads((GOLDEN / "real_weights_case.json").read_text())
    prompt, greedy = case["prompt_ids"], case["greedy_ids"][:16]
    model = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.float32).eval()
    assert engine_reply(model, prompt, max_new_tokens=16, kv_cache="int8") == greedy

    ids = torch.tensor([prompt + greedy])
    dense, int8 = DynamicCache(config=model.config), Int8Cache(model.config)
    expected, actual = (read(model, ids, cache, chunk=16) for cache in (dense, int8))
    error = (actual - expected).abs().mean()
    assert 0 < error < 0.1  # logits have a standard deviation of about 3
