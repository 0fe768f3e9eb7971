import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen.errors import BackendFailed
from qwen.messages import SamplingParams
from qwen.sampling import Sampler, candidates, penalize_seen, propose_rows

VOCAB = 5000


def random_logits(seed, *, vocab=VOCAB, scale=4.0, dtype=torch.float32):
    return (torch.randn(vocab, generator=torch.manual_seed(seed)) * scale).to(dtype)


def sampler(params, prompt_ids):
    return Sampler(params, prompt_ids, device=torch.device("cpu"))


def params(**values):
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return SamplingParams(**(neutral | values))


def transformers_probabilities(logits, prompt, settings):
    """What Transformers' processors make of logits, in its order."""
    steps = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        steps.append(TopPLogitsWarper(settings.top_p))
    return steps(prompt[None], logits[None].float().clone())[0].softmax(-1)


def our_probabilities(logits, prompt, settings):
    logits = logits.float()
    if settings.repetition_penalty != 1.0:
        logits = penalize_seen(logits, prompt.unique(), settings.repetition_penalty)
    probabilities, ids = candidates(logits, settings)
    return torch.zeros(len(logits)).index_copy(0, ids, probabilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.0, 1.05, 0.8])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.8, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 20, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.05, 2.0])
def test_probabilities_equal_those_of_transformers(temperature, top_k, top_p, penalty, dtype):
    settings = params(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for seed in range(3):
        logits = random_logits(seed, dtype=dtype)
        prompt = torch.randint(VOCAB, (300,), generator=torch.manual_seed(seed))
        expected = transformers_probabilities(logits, prompt, settings)
        ours = our_probabilities(logits, prompt, settings)
        if dtype == torch.bfloat16 and top_p < 1.0:
            # Among tied logits the one at the nucleus's edge is arbitrary in both, and whether
            # the last of them is still inside hangs on the rounding of a sum.
            expected, ours = expected.sort().values, ours.sort().values
            assert abs(int((ours > 0).sum()) - int((expected > 0).sum())) <= 1
            atol = 1e-3
        else:
            atol = 1e-5
        torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-3)


def test_flat_logits_use_the_whole_vocabulary_under_top_p():
    settings = params(top_p=0.95)
    logits = random_logits(0, scale=0.01)
    expected = transformers_probabilities(logits, torch.tensor([0]), settings)
    kept = int((candidates(logits, settings)[0] > 0).sum())
    assert kept > 1024
    assert abs(kept - int((expected > 0).sum())) <= 1


def test_greedy_takes_the_likeliest_token():
    logits = random_logits(3)
    chooser = sampler(params(temperature=0.0), [0])
    assert [chooser.choose(logits).token_id for _ in range(3)] == [int(logits.argmax())] * 3


def test_repetition_penalty_counts_the_prompt_and_the_reply():
    logits = torch.tensor([2.0, 1.9, 1.8, -9.0])
    chooser = sampler(params(temperature=0.0, repetition_penalty=2.0), [0, 0])
    assert [chooser.choose(logits).token_id for _ in range(2)] == [1, 2]


def test_repetition_penalty_is_not_applied_twice_to_a_token():
    logits = torch.tensor([8.0, 1.5])
    chooser = sampler(params(temperature=0.0, repetition_penalty=2.0), [0, 0, 0])
    assert [chooser.choose(logits).token_id for _ in range(4)] == [0, 0, 0, 0]


def test_choosing_does_not_change_the_logits():
    logits = random_logits(1)
    before = logits.clone()
    chooser = sampler(params(repetition_penalty=1.3, top_k=5), range(100))
    chooser.choose(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_same_seed_gives_the_same_tokens(settings):
    def draws(seed):
        chooser = sampler(params(seed=seed, **settings), [0])
        return [chooser.choose(random_logits(9)).token_id for _ in range(20)]

    assert draws(5) == draws(5) != draws(6)


def test_without_a_seed_draws_differ():
    def draws():
        chooser = sampler(params(), [0])
        return [chooser.choose(random_logits(9, scale=0.1)).token_id for _ in range(20)]

    assert draws() != draws()


def test_global_random_state_plays_no_part():
    def draws():
        chooser = sampler(params(seed=1), [0])
        return [chooser.choose(random_logits(9)).token_id for _ in range(5)]

    first = draws()
    state = torch.manual_seed(123).get_state()
    assert draws() == first
    torch.manual_seed(123)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_frequencies_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    chooser = sampler(params(seed=0), [0])
    counts = torch.bincount(torch.tensor([chooser.choose(logits).token_id for _ in range(4000)]))
    assert counts.float().div(4000).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.03)


def test_token_without_probability_is_never_drawn():
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 1.0, -math.inf])
    chooser = sampler(params(seed=0), [0])
    assert {chooser.choose(logits).token_id for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6])
def test_tiny_temperature_is_greedy(temperature):
    logits = random_logits(2)
    chooser = sampler(params(temperature=temperature), [0])
    assert chooser.choose(logits).token_id == int(logits.argmax())


def test_top_k_above_the_vocabulary_is_no_limit():
    assert len(candidates(torch.randn(10), params(top_k=1000))[1]) == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = random_logits(0)
    logits[7] = bad
    with pytest.raises(BackendFailed, match="not numbers"):
        sampler(params(temperature=temperature), [0]).choose(logits)


def test_all_logits_minus_infinity_are_an_error():
    with pytest.raises(BackendFailed):
        sampler(params(), [0]).choose(torch.full((9,), -math.inf))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "top_logprobs": 3},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    ],
)
def test_rows_together_get_the_tokens_that_each_gets_alone(settings):
    prompts = [[1, 2, 3], [], [7]]
    params = [SamplingParams(**settings, seed=seed) for seed in range(3)]
    together, alone = (
        [sampler(each, ids) for each, ids in zip(params, prompts, strict=True)] for _ in range(2)
    )
    assert len({each.key for each in together}) == 1
    for step in range(80):  # more than are kept apart from those seen before
        logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(step))
        rows = propose_rows(together, logits).tolist()
        choices = [each.accept(row) for each, row in zip(together, rows, strict=True)]
        expected = [each.choose(row) for each, row in zip(alone, logits, strict=True)]
        assert [c.token_id for c in choices] == [c.token_id for c in expected]
        for choice, other in zip(choices, expected, strict=True):
            assert dict(choice.top_logprobs) == pytest.approx(dict(other.top_logprobs))


def test_row_that_is_no_number_leaves_the_others():
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
    samplers = [sampler(params, []) for _ in range(3)]
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    logits[1] = torch.nan
    rows = propose_rows(samplers, logits).tolist()
    with pytest.raises(BackendFailed, match="not numbers"):
        samplers[1].accept(rows[1])
    assert samplers[0].accept(rows[0]).token_id in range(200)
    assert samplers[2].accept(rows[2]).token_id in range(200)


def test_samplers_of_other_settings_do_not_go_together():
    keys = {
        sampler(SamplingParams(**settings), []).key
        for settings in (
            {},
            {"temperature": 0.3},
            {"top_k": 3},
            {"top_p": 0.3},
            {"top_logprobs": 1},
        )
    }
    assert len(keys) == 5
