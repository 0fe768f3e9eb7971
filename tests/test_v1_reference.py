"""Qwen v1 against a second, plain implementation, on shapes that the golden data do not have."""

from __future__ import annotations

import logging

import pytest
import torch
from reference_v1 import (
    CONFIG,
    alpha_of,
    random_weights,
    reference_logits,
    reference_reply,
    write_checkpoint,
)
from transformers import DynamicCache, StaticCache

from qwen import AutoModelForCausalLM
from qwen.errors import InvalidRequest

#: Other heads, head sizes, lengths, bases and switches than those of the golden data.
VARIANTS = {
    "plain": {},
    "one_head": {"hidden_size": 24, "num_attention_heads": 1, "kv_channels": 24, "seq_length": 48},
    "large_heads": {"hidden_size": 128, "num_attention_heads": 1, "kv_channels": 128},
    "small_heads": {"hidden_size": 24, "num_attention_heads": 6, "kv_channels": 4},
    "odd_sizes": {
        "hidden_size": 60,
        "num_attention_heads": 3,
        "kv_channels": 20,
        "intermediate_size": 74,
        "seq_length": 37,
        "vocab_size": 151,
    },
    "biases": {"no_bias": False},
    "half_rotated": {"rotary_pct": 0.5},
    "large_base": {"rotary_emb_base": 1_000_000, "seq_length": 16},
    "small_base": {"rotary_emb_base": 50.5, "num_hidden_layers": 4},
    "unscaled": {
        "scale_attn_weights": False,
        "num_attention_heads": 8,
        "kv_channels": 4,
        "layer_norm_epsilon": 1e-3,
    },
    "no_ntk": {"use_dynamic_ntk": False},
    "no_logn": {"use_logn_attn": False},
    "neither": {"use_dynamic_ntk": False, "use_logn_attn": False},
}


class Case:
    """A random checkpoint, its model and what the reference says."""

    def __init__(self, folder, name, seed, **options):
        self.config = CONFIG | VARIANTS[name]
        self.weights = random_weights(self.config, seed)
        self.folder = write_checkpoint(folder, self.config, self.weights)
        self.seq_length = self.config["seq_length"]
        self.generator = torch.Generator().manual_seed(seed)
        self.model = self.load(fp32=True)

    def load(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **options)

    def draw(self, length):
        """Draw a prompt; the id 0 is left for padding."""
        ids = torch.randint(1, self.config["vocab_size"], (length,), generator=self.generator)
        return ids.tolist()

    def expected(self, ids, prompt_length=None):
        return reference_logits(self.weights, self.config, ids, prompt_length)

    def reply(self, prompt, count=12):
        return reference_reply(self.weights, self.config, prompt, count)

    def mixed_prompts(self):
        """Draw three prompts of different alphas, the longest first."""
        lengths = (4 * self.seq_length + 3, self.seq_length + 1, self.seq_length // 2)
        return [self.draw(length) for length in lengths]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors are faster without a second thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a case of a variant: `build(name, seed)`; the same one for the same arguments."""
    built = {}

    def case(name="plain", seed=0):
        if (name, seed) not in built:
            built[name, seed] = Case(tmp_path_factory.mktemp(name), name, seed)
        return built[name, seed]

    return case


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(torch.as_tensor(ids), **kwargs).logits.double()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def padded(rows, place):
    """Pad rows with 0 to one width: ids and mask. `place(row)` tells how much goes to its left."""
    width = max(place(row) + len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = place(row)
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def left_padded(rows):
    longest = max(map(len, rows))
    return padded(rows, lambda row: longest - len(row))


def generated(model, ids, **options):
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0} | options
    ids = torch.as_tensor(ids)
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


def make_caches(model, size=256):
    return (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=size),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_full_forward_around_every_step_of_alpha(build, name, attention):
    case = build(name, seed=len(name))
    case.model.set_attn_implementation(attention)
    seen = set()
    for factor in (1, 2, 4):
        for length in (-1, 0, 1):
            ids = case.draw(factor * case.seq_length + length)
            assert_close(logits(case.model, [ids])[0], case.expected(ids))
            seen.add(alpha_of(len(ids), case.config))
    case.model.set_attn_implementation("sdpa")
    assert seen == ({1, 3, 7} | {15} if case.config["use_dynamic_ntk"] else {1})


@pytest.mark.parametrize("name", ["plain", "odd_sizes", "half_rotated", "no_ntk", "no_logn"])
@pytest.mark.parametrize("start", [-3, 0, 1])
def test_steps_keep_the_alpha_of_the_prompt_across_every_step_of_alpha(build, name, start):
    case = build(name)
    for factor in (1, 2, 4):
        prompt = factor * case.seq_length + start
        ids = case.draw(prompt + 6)
        expected = case.expected(ids, prompt)
        for cache in make_caches(case.model):
            assert_close(
                logits(case.model, [ids[:prompt]], past_key_values=cache)[0, -1:],
                expected[prompt - 1 : prompt],
            )
            for i in range(prompt, prompt + 3):
                actual = logits(case.model, [ids[i : i + 1]], past_key_values=cache)[0]
                assert_close(actual, expected[i : i + 1])
            chunk = logits(case.model, [ids[prompt + 3 :]], past_key_values=cache)[0]
            assert_close(chunk, expected[prompt + 3 :])


@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 100])
def test_prefill_in_chunks(build, chunk):
    case = build("biases")
    for length in (32, 33, 64, 65, 128, 129):
        ids = case.draw(length)
        expected = case.expected(ids)
        for cache in make_caches(case.model):
            parts = torch.tensor([ids]).split(chunk, dim=-1)
            rows = [
                logits(case.model, part, past_key_values=cache, prompt_length=length)
                for part in parts
            ]
            assert_close(torch.cat(rows, dim=1)[0], expected)


@pytest.mark.parametrize(
    "place",
    [lambda row: 131 - len(row), lambda row: 0, lambda row: len(row) % 7 + 1],
    ids=["left", "right", "both"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_of_different_alphas(build, place, attention):
    case = build()
    case.model.set_attn_implementation(attention)
    rows = case.mixed_prompts()
    ids, mask = padded(rows, place)
    more = [case.draw(4) for _ in rows]
    for cache in make_caches(case.model):
        actual = logits(case.model, ids, attention_mask=mask, past_key_values=cache)
        for row, logit, real in zip(rows, actual, mask.bool(), strict=True):
            assert_close(logit[real], case.expected(row))
        # What follows goes behind the padding; steps first, then several at once.
        grown = torch.cat((mask, torch.ones(3, 4, dtype=torch.long)), dim=-1)
        width, new = ids.shape[1], torch.tensor(more)
        steps = [
            logits(
                case.model,
                new[:, part],
                attention_mask=grown[:, : width + part.stop],
                past_key_values=cache,
            )
            for part in (slice(0, 1), slice(1, 4))
        ]
        for row, tail, logit in zip(rows, more, torch.cat(steps, dim=1), strict=True):
            assert_close(logit, case.expected(row + tail, len(row))[-4:])
    case.model.set_attn_implementation("sdpa")


def test_padded_batch_in_chunks(build):
    case = build()
    rows = case.mixed_prompts()
    ids, mask = left_padded(rows)
    lengths = mask.sum(-1)
    for cache in make_caches(case.model):
        parts = [
            logits(
                case.model,
                ids[:, i : i + 40],
                attention_mask=mask[:, : i + 40],
                past_key_values=cache,
                prompt_length=lengths,
            )
            for i in range(0, ids.shape[1], 40)
        ]
        for row, logit, real in zip(rows, torch.cat(parts, dim=1), mask.bool(), strict=True):
            assert_close(logit[real], case.expected(row))


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_masks_of_every_type_and_longer_than_the_prompt(build, kind):
    case = build()
    ids = case.draw(case.seq_length - 2)
    mask = torch.ones(1, 200, dtype=kind)  # for a whole static cache
    assert_close(logits(case.model, [ids], attention_mask=mask)[0], case.expected(ids))


@pytest.mark.parametrize("name", ["plain", "odd_sizes", "neither"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 20},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"assistant_model": True},
    ],
    ids=lambda options: "_".join(options) or "plain",
)
def test_greedy_reply_is_that_of_the_reference(build, name, options):
    case = build(name)
    if "assistant_model" in options:
        options = {"assistant_model": case.load(fp32=True)}
    for length in (case.seq_length - 5, case.seq_length + 1, 2 * case.seq_length - 3):
        prompt = case.draw(length // 3) * 4
        prompt = prompt[:length]
        assert generated(case.model, [prompt], **options)[0] == case.reply(prompt)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_greedy_replies_of_a_padded_batch(build, options):
    case = build()
    rows = case.mixed_prompts()
    ids, mask = left_padded(rows)
    replies = generated(case.model, ids, attention_mask=mask, **options)
    assert replies == [case.reply(row) for row in rows]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_scores_of_beams_in_a_padded_batch(build, options):
    case = build()
    rows = case.mixed_prompts()
    ids, mask = left_padded(rows)
    output = case.model.generate(
        ids,
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=6,
        do_sample=False,
        length_penalty=1.0,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    replies = output.sequences[:, ids.shape[1] :].tolist()
    for i, (reply, score) in enumerate(zip(replies, output.sequences_scores, strict=True)):
        prompt = rows[i // 2]
        log_probs = case.expected(prompt + reply, len(prompt)).log_softmax(-1)
        total = sum(log_probs[len(prompt) - 1 + n, token] for n, token in enumerate(reply))
        assert float(score) == pytest.approx(float(total) / 6, abs=1e-4)
    for i, prompt in enumerate(rows):
        alone = generated(
            case.model, [prompt], num_beams=4, num_return_sequences=2, max_new_tokens=6
        )
        assert replies[2 * i : 2 * i + 2] == alone


@pytest.fixture
def fresh_compiler():
    """What one test compiles counts against the limit of recompilations of the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("static", [False, True])
def test_compiled_model_serves_a_padded_batch(build, static):
    case = build()
    rows = case.mixed_prompts()
    ids, mask = left_padded(rows)
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    cache = make_caches(case.model)[2 if static else 1]
    actual = [logits(compiled, ids, attention_mask=mask, past_key_values=cache)[:, -1]]
    tails = [case.draw(3) for _ in rows]
    for column in torch.tensor(tails).split(1, dim=-1):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=-1)
        step = logits(compiled, column, attention_mask=mask, past_key_values=cache)
        actual.append(step[:, -1])
    for row, tail, logit in zip(rows, tails, torch.stack(actual, dim=1), strict=True):
        assert_close(logit, case.expected(row + tail, len(row))[-4:])


def test_loss_and_gradients_in_training_and_with_checkpointing(build, caplog):
    case = build("biases")
    ids = torch.tensor([case.draw(2 * case.seq_length + 1) for _ in range(2)])
    trained = case.config | {"use_dynamic_ntk": False, "use_logn_attn": False}  # as published
    weights = {name: w.double().requires_grad_() for name, w in case.weights.items()}
    rows = torch.cat([reference_logits(weights, trained, row.tolist())[:-1] for row in ids])
    expected = torch.nn.functional.cross_entropy(rows, ids[:, 1:].flatten())
    expected.backward()
    for is_checkpointed in (False, True):
        model = case.load(fp32=True).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        with caplog.at_level(logging.WARNING, logger="transformers"):
            loss = model(ids, labels=ids).loss
        assert "loss_type" not in caplog.text
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad.double(), weights[name].grad)


@pytest.mark.parametrize("length", [32_767, 32_768, 32_769, 40_000])
def test_prompts_past_the_published_table_of_logn(tmp_path, length):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "kv_channels": 8, "num_attention_heads": 1}
    config = CONFIG | sizes | {"seq_length": 2048, "intermediate_size": 16}
    weights = random_weights(config)
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, config, weights))
    ids = torch.randint(1, 128, (length + 3,), generator=torch.Generator().manual_seed(3)).tolist()
    cache = DynamicCache()
    actual = [logits(model, [ids[:length]], past_key_values=cache, logits_to_keep=1)[0]]
    actual.append(logits(model, [ids[length:]], past_key_values=cache)[0])
    expected = reference_logits(weights, config, ids, length, rows=4)
    assert_close(torch.cat(actual), expected)


@pytest.mark.parametrize(("flag", "tolerance"), [("bf16", 0.2), ("fp16", 0.02)])
def test_half_precisions_are_finite_and_near(build, flag, tolerance):
    case = build("biases")
    model = case.load(**{flag: True})
    rows = case.mixed_prompts()
    ids, mask = left_padded(rows)
    actual = logits(model, ids, attention_mask=mask)
    assert actual.isfinite().all()
    for row, logit, real in zip(rows, actual, mask.bool(), strict=True):
        assert (logit[real] - case.expected(row)).abs().mean() < tolerance


def test_lengths_below_one_are_refused(build):
    case = build()
    for wrong in (0, torch.tensor([5, 0])):
        with pytest.raises(InvalidRequest, match="no token at all"):
            logits(case.model, [[1, 2], [3, 4]], prompt_length=wrong)
