"""The engine on the decoder: reuse of prefixes gives what a cold run gives."""

import random
import threading
from dataclasses import replace

import golden_v1
import pytest
import torch
from fake_backend import wait_until
from tiny_model import build_tiny_model

from qwen.cpu_kernels import KernelsUnavailable, load_kernels
from qwen.decoder import Decoder
from qwen.engine import Engine
from qwen.errors import OutOfMemory
from qwen.messages import SamplingParams

MODELS = {"qwen2": build_tiny_model, "qwen1": golden_v1.load_tiny}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    try:
        return load_kernels(tmp_path_factory.mktemp("kernels"))
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["dense", "int8"])
def build(request, monkeypatch):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 16)
    kernels = request.getfixturevalue("kernels") if request.param == "int8" else None

    def make(model, **options):
        decoder = CountingDecoder(model, kernels=kernels)
        options = {"eos_token_ids": [], "context_length": 512} | options
        return Engine(model, decoder=decoder, **options), decoder

    return make


class CountingDecoder(Decoder):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.num_read, self.fail = 0, None

    def read_many(self, pieces):
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.num_read += sum(len(piece.ids) for piece in pieces)
        return super().read_many(pieces)


GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=8)


def reply(engine, prompt, **values):
    params = replace(GREEDY, **values)
    steps = engine.submit(prompt, params, cancel=threading.Event())
    return [step.token_id for step in steps if step.token_id is not None]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_reused_prefixes_give_the_tokens_of_cold_runs(build, make):
    # Turns of several conversations in any order, edits and continued replies among them; the
    # golden model's alpha changes on the way.
    warm, decoder = build(make())
    cold, cold_decoder = build(make(), prefix_bytes=0)
    chance, told = random.Random(0), []
    for _ in range(40):
        start = list(chance.choice(told)) if told and chance.random() < 0.8 else []
        start = start[: chance.randint(0, len(start))] if chance.random() < 0.3 else start
        prompt = (start + [chance.randrange(290) for _ in range(chance.randint(1, 30))])[:200]
        values = {"temperature": chance.choice([0, 1.2]), "seed": chance.randrange(99)}
        tokens = reply(warm, prompt, **values)
        assert tokens == reply(cold, prompt, **values)
        told.append((prompt + tokens)[:180])
    assert decoder.num_read < (0.7 if decoder.is_exact else 0.85) * cold_decoder.num_read


def test_next_turn_reads_only_what_is_new(build):
    engine, decoder = build(build_tiny_model())
    prompt = list(range(1, 101))
    tokens = reply(engine, prompt)
    # Inexact forms reuse whole chunks of the prompt only, so a reply's last token is not read.
    assert decoder.num_read == 100 + (8 if decoder.is_exact else 7)
    decoder.num_read = 0
    reply(engine, [*prompt, *tokens, 5, 6], max_new_tokens=1)
    assert decoder.num_read == (2 + 1 if decoder.is_exact else 110 - 96)


def test_token_that_ends_a_reply_is_read_with_it(build):
    engine, decoder = build(build_tiny_model())
    prompt = list(range(1, 101))
    tokens = reply(engine, prompt)
    engine, decoder = build(build_tiny_model(), eos_token_ids=tokens[3:4])
    ended = reply(engine, prompt)
    assert ended == tokens[: tokens.index(tokens[3])]
    decoder.num_read = 0
    reply(engine, [*prompt, *ended, tokens[3], 5, 6], max_new_tokens=1)
    assert decoder.num_read == (2 + 1 if decoder.is_exact else 100 + len(ended) + 3 - 96)


def test_complete_reply_ends_well_if_its_last_token_cannot_be_read(build):
    engine, decoder = build(build_tiny_model())
    expected = reply(engine, range(1, 41))
    read_many = decoder.read_many

    def fail_at_the_end(pieces):
        if pieces[0].sequence.store.length == 40 + 7:
            raise torch.OutOfMemoryError("out of memory")
        return read_many(pieces)

    decoder.read_many = fail_at_the_end
    steps = list(engine.submit(range(1, 41), GREEDY, cancel=threading.Event()))
    assert [step.token_id for step in steps[:-1]] == expected
    assert steps[-1].finish_reason == "length"


def test_same_prompt_again_reads_its_end_only(build):
    engine, decoder = build(build_tiny_model())
    first = reply(engine, range(1, 101))
    decoder.num_read = 0
    assert reply(engine, range(1, 101)) == first
    assert decoder.num_read == (1 + 8 if decoder.is_exact else 4 + 7)


def test_change_of_alpha_reads_everything_again(build):
    engine, decoder = build(golden_v1.load_tiny())
    prompt = list(range(1, 61))  # of a trained length of 64
    tokens = reply(engine, prompt)
    decoder.num_read = 0
    reply(engine, [*prompt, *tokens], max_new_tokens=1)
    assert decoder.num_read == 68 + decoder.is_exact


def test_growing_alpha_reads_again_and_gives_the_tokens_of_a_cold_run(build):
    warm, _ = build(golden_v1.load_tiny(), ntk_policy="grow")
    cold, _ = build(golden_v1.load_tiny(), ntk_policy="grow", prefix_bytes=0)
    for _ in range(2):
        assert reply(warm, range(1, 61), max_new_tokens=20) == reply(
            cold, range(1, 61), max_new_tokens=20
        )


def test_failed_read_is_not_reused_and_lack_of_memory_drops_what_is_kept(build):
    engine, decoder = build(build_tiny_model())
    expected = reply(engine, range(1, 41))
    decoder.fail = torch.OutOfMemoryError("out of memory")
    with pytest.raises(OutOfMemory):
        reply(engine, range(1, 41))
    decoder.num_read = 0
    assert reply(engine, range(1, 41)) == expected
    assert decoder.num_read == 40 + (8 if decoder.is_exact else 7)


def test_cancelled_reply_is_reused(build):
    engine, decoder = build(build_tiny_model())
    expected = reply(engine, range(1, 41))
    engine, decoder = build(build_tiny_model())
    steps = engine.submit(range(1, 41), SamplingParams(), cancel=threading.Event())
    next(steps)
    steps.close()
    wait_until(lambda: engine.load == (0, 0))
    decoder.num_read = 0
    assert reply(engine, range(1, 41)) == expected
    assert decoder.num_read < 40


def test_closing_lets_go_of_what_is_kept(build):
    engine, _ = build(build_tiny_model())
    reply(engine, range(1, 41))
    kept = engine._scheduler._readers._kept
    assert kept.nbytes > 0
    engine.close()
    assert kept.nbytes == 0


def test_closing_during_a_reply_keeps_nothing_of_it(build):
    engine, _ = build(build_tiny_model())
    kept = engine._scheduler._readers._kept
    steps = engine.submit(range(1, 41), SamplingParams(), cancel=threading.Event())
    next(steps)
    engine.close()
    list(steps)
    wait_until(lambda: engine.load == (0, 0) and kept.nbytes == 0)
