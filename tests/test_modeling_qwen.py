"""Our decisions where the published code is wrong or silent, and what Transformers offers."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_v1 import (
    CASES,
    EOS,
    PAD,
    assert_parity,
    golden_ids,
    load_tiny,
    pad_left,
    tensors,
)
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.generation import ContinuousBatchingConfig

from qwen.configuration_qwen import QWenConfig
from qwen.errors import InvalidRequest, PromptTooLong
from qwen.generation_qwen import StopWordsLogitsProcessor
from qwen.modeling_qwen import QWenLMHeadModel

#: Prompts with alpha 7, 3 and 1.
MIXED = [golden_ids(0, 150)[0], golden_ids(50, 116)[0], golden_ids(120, 150)[0]]


@pytest.fixture(scope="module")
def model():
    return load_tiny()


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def generated(model, ids, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | options
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


def static_cache(model, size=512):
    return StaticCache(config=model.config, max_cache_len=size)


def dynamic_cache(model):
    return DynamicCache(config=model.config)


CACHES = pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])


@CACHES
def test_several_new_tokens_on_a_cache_are_causal(model, make_cache):
    cache, again = make_cache(model), make_cache(model)
    logits(model, golden_ids(0, 20), past_key_values=cache)
    chunk = logits(model, golden_ids(20, 28), past_key_values=cache)[0]
    logits(model, golden_ids(0, 20), past_key_values=again)
    steps = [logits(model, golden_ids(i, i + 1), past_key_values=again)[0] for i in range(20, 28)]
    assert_parity(chunk, torch.cat(steps))
    published = tensors()["quirk.chunk.prefill20.chunk8"]
    differences = (chunk - published).abs().amax(-1)
    known = CASES["quirk.chunk.prefill20.chunk8"]["max_abs_diff_vs_causal_by_row"]
    torch.testing.assert_close(differences, torch.tensor(known), atol=1e-3, rtol=1e-3)


@CACHES
@pytest.mark.parametrize(
    ("length", "chunk"),
    [
        (65, 1),
        (129, 1),
        *((n, c) for n in (64, 65, 100, 128, 129, 200, 256, 300) for c in (50, 96)),
    ],
)
def test_prefill_in_chunks_equals_the_single_one(model, make_cache, length, chunk):
    prompt, next_ids = golden_ids(0, length), golden_ids(length, length + 3)
    single, cache = make_cache(model), make_cache(model)
    whole = logits(model, prompt, past_key_values=single)
    parts = [
        logits(model, part, past_key_values=cache, prompt_length=length)
        for part in prompt.split(chunk, dim=-1)
    ]
    assert_parity(torch.cat(parts, dim=1), whole)
    # After that the cache knows the alpha by itself.
    after = logits(model, next_ids, past_key_values=cache)
    assert_parity(after, logits(model, next_ids, past_key_values=single))


def test_prompt_length_may_be_passed_with_every_call(model):
    cache, single = dynamic_cache(model), dynamic_cache(model)
    lengths = torch.tensor([100])
    logits(model, golden_ids(0, 100), past_key_values=single)
    for part in golden_ids(0, 100).split(40, dim=-1):
        logits(model, part, past_key_values=cache, prompt_length=lengths)
    for i in (100, 101):
        ids = golden_ids(i, i + 1)
        expected = logits(model, ids, past_key_values=single)
        actual = logits(model, ids, past_key_values=cache, prompt_length=lengths)
        assert_parity(actual, expected)


@CACHES
def test_batched_sequences_of_different_alphas_equal_their_solo_runs(model, make_cache):
    ids, mask = pad_left(MIXED)
    cache = make_cache(model)
    rows = [logits(model, ids, attention_mask=mask, past_key_values=cache)[:, -1]]
    for i in range(300, 305):
        mask = torch.cat((mask, mask.new_ones(3, 1)), dim=-1)
        new = golden_ids(i, i + 1).expand(3, 1)
        rows.append(logits(model, new, attention_mask=mask, past_key_values=cache)[:, -1])
    for row, prompt in enumerate(MIXED):
        alone = make_cache(model)
        expected = [logits(model, prompt[None], past_key_values=alone)[:, -1]]
        for i in range(300, 305):
            expected.append(logits(model, golden_ids(i, i + 1), past_key_values=alone)[:, -1])
        assert_parity(torch.stack(rows)[:, row], torch.cat(expected))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(attention):
    model = load_tiny(attn_implementation=attention)
    ids, mask = pad_left(MIXED)
    right = torch.stack([row.roll(int(n)) for row, n in zip(ids, mask.sum(-1), strict=True)])
    actual = logits(model, right, attention_mask=mask.flip(-1))
    for row, prompt in enumerate(MIXED):
        assert_parity(actual[row, : len(prompt)], logits(model, prompt[None])[0])


def test_another_request_changes_nothing_of_a_running_one(model):
    cache = dynamic_cache(model)
    logits(model, golden_ids(0, 48), past_key_values=cache)
    logits(model, golden_ids(200, 300))
    actual = logits(model, golden_ids(48, 49), past_key_values=cache)[0]
    assert_parity(actual, tensors()["c.ntk1.logn1.prefill48.steps60"][1:2])
    assert (actual - tensors()["quirk.shared_alpha"]).abs().max() > 1


def test_decoding_keeps_the_alpha_of_the_prompt(model):
    cache = dynamic_cache(model)
    logits(model, golden_ids(0, 48), past_key_values=cache)
    for i in range(48, 80):
        last = logits(model, golden_ids(i, i + 1), past_key_values=cache)[0]
    gap = (logits(model, golden_ids(0, 80))[0, -1:] - last).abs().max().item()
    assert gap == pytest.approx(CASES["stale_alpha_gap"]["gap"]["80"], abs=1e-3)


@pytest.mark.parametrize("make", [lambda m: DynamicCache(), dynamic_cache, static_cache])
def test_alpha_moves_with_the_rows_of_its_cache(model, make):
    ids = torch.stack([golden_ids(0, 70)[0], golden_ids(50, 120)[0]])
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    cache = make(model)
    logits(model, ids, attention_mask=mask, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat((mask.flip(0), mask.new_ones(2, 1)), dim=-1)
    new = golden_ids(300, 301).expand(2, 1)
    actual = logits(model, new, attention_mask=mask, past_key_values=cache)[:, -1]
    for row, prompt in enumerate((golden_ids(80, 120), golden_ids(0, 70))):
        alone = dynamic_cache(model)
        logits(model, prompt, past_key_values=alone)
        assert_parity(actual[row], logits(model, new[:1], past_key_values=alone)[0, -1])


def test_alpha_is_repeated_selected_and_copied_with_its_cache(model):
    cache = dynamic_cache(model)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :30] = 0
    ids = golden_ids(0, 70).expand(2, 70)
    logits(model, ids, attention_mask=mask, past_key_values=cache)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].ntk_alpha.tolist() == [3, 3, 1, 1]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.layers[0].ntk_alpha.tolist() == [1, 3]


def test_cropping_keeps_alpha_and_an_emptied_cache_takes_a_new_one(model):
    cache = dynamic_cache(model)
    logits(model, golden_ids(0, 100), past_key_values=cache)
    first = logits(model, golden_ids(100, 104), past_key_values=cache)
    cache.crop(-4)
    assert_parity(logits(model, golden_ids(100, 104), past_key_values=cache), first)
    cache.crop(-104)
    assert_parity(logits(model, golden_ids(0, 32), past_key_values=cache)[0], tensors()["a.logits"])


def test_a_static_cache_takes_a_new_alpha_after_reset(model):
    cache = static_cache(model)
    logits(model, golden_ids(0, 100), past_key_values=cache)
    cache.reset()
    assert_parity(logits(model, golden_ids(0, 32), past_key_values=cache)[0], tensors()["a.logits"])
    assert cache.layers[0].ntk_alpha.tolist() == [1]


def test_a_cache_without_alpha_is_refused_past_seq_length(model):
    cache = dynamic_cache(model)
    logits(model, golden_ids(0, 100), past_key_values=cache)
    foreign = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(InvalidRequest, match="prompt_length"):
        logits(model, golden_ids(100, 101), past_key_values=foreign)
    expected = logits(model, golden_ids(100, 101), past_key_values=cache)
    actual = logits(model, golden_ids(100, 101), past_key_values=foreign, prompt_length=100)
    assert_parity(actual, expected)


def test_a_cache_of_another_batch_is_refused(model):
    cache = dynamic_cache(model)
    logits(model, golden_ids(0, 70).expand(2, 70), past_key_values=cache)
    with pytest.raises(InvalidRequest, match="2 sequences, but 1"):
        logits(model, golden_ids(70, 71), past_key_values=cache)


def test_prompt_lengths_of_another_batch_are_refused(model):
    with pytest.raises(InvalidRequest, match="prompt_length"):
        logits(model, golden_ids(0, 8).expand(2, 8), prompt_length=torch.tensor([8, 8, 8]))


def test_position_ids_are_honoured(model):
    ids = golden_ids(0, 32)
    at = torch.arange(32)[None]
    assert_parity(logits(model, ids, position_ids=at + 20)[0], tensors()["a.logits"])
    assert (logits(model, ids, position_ids=at * 2)[0] - tensors()["a.logits"]).abs().max() > 0.1


@pytest.mark.parametrize("change", [{"rotary_pct": 0.5}, {"scale_attn_weights": False}])
def test_published_switches_are_obeyed(change):
    actual = logits(load_tiny(**change), golden_ids(0, 32))[0]
    assert actual.isfinite().all()
    assert (actual - tensors()["a.logits"]).abs().max() > 0.1


def test_contexts_of_32768_and_beyond_do_not_raise():
    config = QWenConfig(
        vocab_size=64,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        seq_length=8192,
    )
    model = QWenLMHeadModel(config).eval()
    ids = torch.arange(32_768 + 5)[None] % 64
    cache = DynamicCache(config=config)
    logits(model, ids, past_key_values=cache, logits_to_keep=1)
    assert cache.layers[0].ntk_alpha.tolist() == [15]
    assert logits(model, ids[:, :1], past_key_values=cache).isfinite().all()


@pytest.mark.parametrize("static", [False, True])
def test_forward_compiles_as_one_graph(static):
    model = load_tiny()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
    cache = static_cache(model, 192) if static else dynamic_cache(model)
    prompt, rows = golden_ids(0, 100), []
    with torch.no_grad():
        assert_parity(compiled(prompt, use_cache=False).logits, logits(model, prompt))
        logits(model, prompt, past_key_values=cache)
        for i in range(100, 104):
            rows.append(compiled(golden_ids(i, i + 1), past_key_values=cache).logits[0])
    assert_parity(torch.cat(rows), tensors()["c.ntk1.logn1.prefill100.steps30"][1:5])


def test_attention_weights_are_returned_by_eager():
    model = load_tiny(attn_implementation="eager")
    with torch.no_grad():
        weights = model(golden_ids(0, 8), output_attentions=True).attentions
    assert len(weights) == 3 and weights[0].shape == (1, 4, 8, 8)
    assert torch.equal(weights[0][0, 0].triu(1), torch.zeros(8, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 40},
        {"use_cache": False},
    ],
)
def test_generate_of_a_mixed_batch_equals_the_solo_runs(model, options):
    ids, mask = pad_left(MIXED)
    actual = generated(model, ids, attention_mask=mask, max_new_tokens=12, **options)
    for row, prompt in enumerate(MIXED):
        assert actual[row] == generated(model, prompt[None], max_new_tokens=12)[0]


@pytest.mark.parametrize("prompt", MIXED)
def test_prompt_lookup_and_assistants_change_nothing(model, prompt):
    ids = torch.cat((prompt[:40], prompt[:40], prompt[:20]))[None]
    expected = generated(model, ids, max_new_tokens=16)
    assert generated(model, ids, max_new_tokens=16, prompt_lookup_num_tokens=4) == expected
    assert generated(model, ids, max_new_tokens=16, assistant_model=load_tiny()) == expected
    small = Qwen2Config(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    stranger = Qwen2ForCausalLM(small).eval()
    assert generated(model, ids, max_new_tokens=16, assistant_model=stranger) == expected


def test_beams_of_a_mixed_batch_equal_the_solo_runs(model):
    ids, mask = pad_left(MIXED)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    actual = generated(model, ids, attention_mask=mask, **options)
    for row, prompt in enumerate(MIXED):
        assert actual[2 * row : 2 * row + 2] == generated(model, prompt[None], **options)


def test_a_conversation_goes_on_with_the_alpha_of_its_cache(model):
    cache = dynamic_cache(model)
    first = model.generate(
        golden_ids(0, 60),
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    again = generated(
        model, torch.cat((first, golden_ids(300, 320)), -1), past_key_values=cache, max_new_tokens=8
    )
    steps = dynamic_cache(model)
    logits(model, golden_ids(0, 60), past_key_values=steps)
    last = logits(
        model, torch.cat((first[:, 60:], golden_ids(300, 320)), -1), past_key_values=steps
    )
    assert again[0][0] == int(last[0, -1].argmax())
    assert cache.layers[0].ntk_alpha.tolist() == [1]


def test_generate_with_inputs_embeds(model):
    prompt = golden_ids(0, 100)
    embeds = model.get_input_embeddings()(prompt).detach()
    actual = model.generate(
        inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    assert actual.tolist() == generated(model, prompt, max_new_tokens=8)


def test_continuous_batching_works_up_to_seq_length_and_is_refused_past_it(model):
    def batch(prompts):
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=6)
        sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
        replies = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=sizes, progress_bar=False
        )
        return list(replies.values())

    prompts = [golden_ids(0, 40)[0].tolist(), golden_ids(50, 70)[0].tolist()]
    expected = [generated(model, torch.tensor([p]), max_new_tokens=6)[0] for p in prompts]
    assert sorted(reply.generated_tokens for reply in batch(prompts)) == sorted(expected)
    (too_long,) = batch([golden_ids(0, 100)[0].tolist()])
    assert "up to 64 tokens of prompt and reply, not 100" in too_long.error


@pytest.mark.parametrize(
    ("inputs", "error", "word"),
    [
        ({"input_ids": torch.tensor([[1, 1024]])}, InvalidRequest, "1024"),
        ({"input_ids": torch.tensor([[-1]])}, InvalidRequest, "-1"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, InvalidRequest, "empty"),
        ({"inputs_embeds": torch.empty(1, 0, 64)}, InvalidRequest, "empty"),
        ({}, InvalidRequest, "exactly one"),
        (
            {"input_ids": golden_ids(0, 70).expand(2, 70), "attention_mask": torch.eye(2, 70) * 0},
            InvalidRequest,
            "Row 0 of the batch",
        ),
        (
            {"input_ids": golden_ids(0, 4), "attention_mask": torch.ones(1, 3)},
            InvalidRequest,
            "covers 3 tokens",
        ),
    ],
)
def test_bad_inputs_are_refused_by_name(model, inputs, error, word):
    with pytest.raises(error, match=word):
        model(**inputs)


@pytest.mark.parametrize("first", [17, 10])
def test_a_full_static_cache_is_refused_by_name(model, first):
    cache = static_cache(model, 16)
    with pytest.raises(PromptTooLong, match="room for 16 tokens, but 17"):
        logits(model, golden_ids(0, first), past_key_values=cache)
        logits(model, golden_ids(0, 17 - first), past_key_values=cache)


def test_an_empty_prompt_is_refused_by_generate(model):
    with pytest.raises(InvalidRequest, match="empty"):
        model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=1)


def test_embeddings_are_found_and_resized():
    model = load_tiny()
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    model.resize_token_embeddings(1030)
    assert model(torch.tensor([[1029]])).logits.shape == (1, 1, 1030)


def test_stop_sequences_end_only_the_rows_that_end_with_them():
    stop = StopWordsLogitsProcessor([[9], [5, 6]], eos_token_id=9)
    ids = torch.tensor([[1, 5, 6], [5, 6, 1], [1, 1, 9]])  # the end token itself is no stop
    scores = stop(ids, torch.zeros(3, 10))
    assert scores.argmax(-1).tolist() == [9, 0, 0]
