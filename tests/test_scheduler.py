"""Many users on one engine: batches, faults, queue, fairness, reproducibility."""

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_v1
import pytest
import torch
from fake_backend import wait_until
from tiny_model import build_tiny_model

from qwen.decoder import Decoder
from qwen.engine import Engine
from qwen.errors import BackendFailed, OutOfMemory, TooManyRequests
from qwen.load_options import LoadOptions
from qwen.local import load_backend
from qwen.messages import ChatRequest, Message, SamplingParams
from qwen.serving_limits import ServingLimits

MODELS = {"qwen2": build_tiny_model, "qwen1": golden_v1.load_tiny}


class WatchedDecoder(Decoder):
    """A decoder that notes how many sequences each call reads, and can be told to fail."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.calls, self.tokens = [], []
        self.before = lambda pieces: None

    def read_many(self, pieces):
        self._note([(piece.ids, piece.sequence) for piece in pieces])
        return super().read_many(pieces)

    def _note(self, pieces):
        self.calls.append(len(pieces))
        self.tokens.append([len(ids) for ids, _ in pieces])
        self.before(pieces)


@pytest.fixture(params=["dense", "int8"])
def build(request):
    kernels = request.getfixturevalue("kernels") if request.param == "int8" else None

    def make(model=None, *, limits=None, **options):
        model = model or build_tiny_model()
        decoder = WatchedDecoder(model, kernels=kernels)
        engine = Engine(
            model,
            eos_token_ids=[],
            context_length=512,
            decoder=decoder,
            limits=limits or ServingLimits(),
            **options,
        )
        return engine, decoder

    return make


def params(**values):
    return SamplingParams(
        **{"temperature": 0, "repetition_penalty": 1, "max_new_tokens": 12} | values
    )


def submit(engine, prompt, cancel=None, **values):
    return engine.submit(prompt, params(**values), cancel=cancel or threading.Event())


def tokens(steps):
    return [step.token_id for step in steps if step.token_id is not None]


def reply(engine, prompt, **values):
    return tokens(submit(engine, prompt, **values))


def prompts(count, *, shortest=3, step=17):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 290, (shortest + step * i,), generator=generator).tolist()
        for i in range(count)
    ]


def held_back(decoder):
    """Keep the loop in its first read until the returned event is set."""
    go = threading.Event()
    decoder.before = lambda pieces: go.wait(20)
    return go


# 64 is the trained length of the golden model: the prompts have the alphas 1, 3 and 7.
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_replies_beside_others_are_those_alone(build, make, temperature):
    jobs = [
        (prompt, {"temperature": temperature, "seed": seed, "repetition_penalty": 1.1})
        for seed, prompt in enumerate(prompts(8))
    ]
    engine, _ = build(make(), prefix_bytes=0)
    alone = [reply(engine, prompt, **values) for prompt, values in jobs]
    engine, decoder = build(make(), prefix_bytes=0)
    go = held_back(decoder)
    steps = [submit(engine, prompt, **values) for prompt, values in jobs]
    go.set()
    assert [tokens(each) for each in steps] == alone
    assert max(decoder.calls) >= 4


def test_logits_of_a_batch_are_bit_for_bit_those_alone(kernels):
    from qwen.decoder import Piece

    decoder = Decoder(golden_v1.load_tiny(), kernels=kernels)
    with torch.inference_mode():
        expected, pieces = [], []
        for ids in map(torch.tensor, prompts(8)):
            expected.append(decoder.read(ids, decoder.start(len(ids))))
            sequence = decoder.start(len(ids))
            decoder.read(ids[:2], sequence)
            pieces.append(Piece(ids[2:].tolist(), sequence))
        actual = decoder.read_many(pieces)
    assert all(map(torch.equal, actual, expected))


def test_only_the_sequences_that_ask_get_logits():
    from qwen.decoder import Piece

    decoder = Decoder(build_tiny_model())
    with torch.inference_mode():
        pieces = [
            Piece(ids, decoder.start(len(ids)), wants_logits=bool(i % 2))
            for i, ids in enumerate(prompts(4))
        ]
        logits = decoder.read_many(pieces)
    assert [own is not None for own in logits] == [False, True, False, True]
    assert [piece.sequence.store.length for piece in pieces] == [len(ids) for ids in prompts(4)]


def test_growing_alphas_beside_each_other_are_those_alone(build):
    def replies(engine, at_once):
        ids = [prompt[:60] for prompt in prompts(3, shortest=56, step=3)]
        if not at_once:
            return [reply(engine, each, max_new_tokens=30) for each in ids]
        steps = [submit(engine, each, max_new_tokens=30) for each in ids]
        return [tokens(each) for each in steps]

    alone = replies(build(golden_v1.load_tiny(), ntk_policy="grow", prefix_bytes=0)[0], False)
    engine, decoder = build(golden_v1.load_tiny(), ntk_policy="grow", prefix_bytes=0)
    assert replies(engine, True) == alone
    assert max(decoder.calls) == 3


def test_reply_goes_on_while_a_long_prompt_is_read(build, monkeypatch):
    monkeypatch.setattr("qwen.serving_pace.Pace.prompt_tokens", lambda self, replies: 16)
    engine, decoder = build()
    first = submit(engine, [1, 2, 3], max_new_tokens=500)
    next(first)
    reply(engine, list(range(1, 200)), max_new_tokens=1)
    first.close()
    reads = [sizes for sizes in decoder.tokens if max(sizes) > 1][1:]
    assert len(reads) >= 12
    assert all(1 in sizes and sum(sizes) <= 17 for sizes in reads)


def test_short_prompt_is_not_kept_waiting_by_a_long_one(build, monkeypatch):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 16)
    engine, decoder = build()
    go = held_back(decoder)
    long, short = submit(engine, list(range(200))), submit(engine, [5, 6, 7])
    go.set()
    next(short)
    read_of_long = sum(max(sizes) for sizes in decoder.tokens)
    assert read_of_long < 100
    assert len(tokens(long)) == 12


def test_queue_is_bounded_and_says_when_to_come_again(build):
    engine, decoder = build(limits=ServingLimits(max_running=1, max_waiting=2))
    go = held_back(decoder)
    taken = [submit(engine, [1, 2, i]) for i in range(3)]
    with pytest.raises(TooManyRequests, match="busy") as refused:
        submit(engine, [9])
    assert refused.value.position == 3 and refused.value.retry_after >= 1
    go.set()
    assert [len(tokens(steps)) for steps in taken] == [12] * 3
    assert len(reply(engine, [9])) == 12


def test_cancelled_request_gives_its_place_in_a_full_queue_to_the_next(build):
    engine, decoder = build(limits=ServingLimits(max_running=1, max_waiting=1))
    go, cancel = held_back(decoder), threading.Event()
    first, second = submit(engine, [1]), submit(engine, [2], cancel)
    wait_until(lambda: engine.load == (1, 1))
    cancel.set()
    third = submit(engine, [3])
    go.set()
    assert [len(tokens(steps)) for steps in (first, second, third)] == [12, 0, 12]


def test_those_who_wait_are_told_their_place_as_it_changes(build):
    engine, decoder = build(limits=ServingLimits(max_running=1))
    go = held_back(decoder)
    steps = [submit(engine, [1, 2, i]) for i in range(4)]
    go.set()
    lists = [list(each) for each in steps]
    places = [[step.queued.position for step in each if step.queued] for each in lists]
    assert places[1:] == [[1, 0], [2, 1, 0], [3, 2, 1, 0]]
    assert all(
        (step.queued.seconds > 0) == (step.queued.position > 0)
        for each in lists
        for step in each
        if step.queued
    )
    assert all(each[len(own)].token_id is not None for each, own in zip(lists, places, strict=True))


def test_budget_of_bytes_lets_wait_what_does_not_fit_and_refuses_what_never_could(build):
    engine, decoder = build()
    position = decoder.position_bytes
    engine, decoder = build(limits=ServingLimits(cache_bytes=100 * position))
    with pytest.raises(OutOfMemory, match="max_new_tokens"):
        submit(engine, range(90))
    steps = [submit(engine, [i, *range(40)]) for i in range(4)]
    assert [len(tokens(each)) for each in steps] == [12] * 4
    assert max(decoder.calls) == 1  # two would take 2 * 53 positions


def test_running_requests_drive_kept_ones_out_of_the_budget(build):
    engine, decoder = build()
    # A store has whole blocks of 256 positions.
    engine, decoder = build(limits=ServingLimits(cache_bytes=300 * decoder.position_bytes))
    reply(engine, [1, 2, 3])
    kept = engine._scheduler._readers
    assert kept.kept_bytes == 256 * decoder.position_bytes
    reply(engine, [250, *range(60)])
    assert kept.kept_bytes == 256 * decoder.position_bytes


def fault_of(decoder, length, error):
    """Fail whenever the sequence with a prompt of this length is read beyond three tokens."""

    def fail(pieces):
        for _, sequence in pieces:
            if sequence.marked == length and sequence.store.length >= length + 2:
                raise error

    start = decoder.start

    def marked(prompt_length, **options):
        sequence = start(prompt_length, **options)
        sequence.marked = prompt_length
        return sequence

    decoder.start = marked
    return fail


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("shape mismatch"), BackendFailed),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
    ],
)
def test_fault_in_one_sequence_ends_that_one_with_its_text_kept(build, error, named):
    engine, _ = build(prefix_bytes=0)
    alone = [reply(engine, prompt) for prompt in prompts(3)]
    engine, decoder = build(prefix_bytes=0)
    decoder.before = fault_of(decoder, len(prompts(3)[1]), error)
    steps = [submit(engine, prompt) for prompt in prompts(3)]
    said = []
    with pytest.raises(named):
        said.extend(step.token_id for step in steps[1])
    assert said == alone[1][:3]
    assert [tokens(steps[0]), tokens(steps[2])] == [alone[0], alone[2]]


def test_lack_of_memory_lets_go_of_kept_sequences_first(build):
    engine, decoder = build()
    expected = reply(engine, [7, 8, 9])
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]

    def fail_once(pieces):
        if failures:
            raise failures.pop()

    decoder.before = fail_once
    assert len(reply(engine, [1, 2])) == 12
    assert reply(engine, [7, 8, 9]) == expected


def test_what_is_kept_makes_room_for_a_request_that_begins(build):
    engine, decoder = build()
    reply(engine, list(range(100)))
    kept = lambda: engine._scheduler._readers.kept_bytes  # noqa: E731
    wait_until(lambda: kept() > 0)
    start = decoder.start

    def start_if_there_is_room(*args, **options):
        if kept():
            raise torch.OutOfMemoryError("no room")
        return start(*args, **options)

    decoder.start = start_if_there_is_room
    assert len(reply(engine, [200, 201])) == 12


def test_what_is_kept_makes_room_where_a_growing_alpha_begins_anew(build):
    ids = list(range(100, 160))
    plain, _ = build(golden_v1.load_tiny(), ntk_policy="grow")
    expected = reply(plain, ids, max_new_tokens=30)
    engine, decoder = build(golden_v1.load_tiny(), ntk_policy="grow")
    reply(engine, [1, 2, 3])
    wait_until(lambda: engine._scheduler._readers.kept_bytes > 0)
    start, failed = decoder.start, []

    def start_at_the_second_try(prompt_length, **options):
        if prompt_length > 60 and not failed:
            failed.append(prompt_length)
            raise torch.OutOfMemoryError("no room")
        return start(prompt_length, **options)

    decoder.start = start_at_the_second_try
    assert reply(engine, ids, max_new_tokens=30) == expected
    assert failed == [65]


def test_numbers_that_are_none_end_one_reply_only(build):
    engine, decoder = build(prefix_bytes=0)
    alone = reply(engine, [4, 5, 6])
    read_many, poisoned = decoder.read_many, threading.Event()

    def poison(pieces):
        logits = read_many(pieces)
        if not poisoned.is_set():
            logits[0].fill_(float("nan"))
        poisoned.set()
        return logits

    go = held_back(decoder)
    bad, good = submit(engine, [1, 2, 3]), submit(engine, [4, 5, 6])
    decoder.read_many = poison
    go.set()
    with pytest.raises(BackendFailed, match="not numbers"):
        list(bad)
    assert poisoned.is_set() and tokens(good) == alone


def test_sequence_with_numbers_that_are_none_is_not_kept_for_reuse(build):
    engine, decoder = build()
    read = decoder.read_many
    decoder.read_many = lambda pieces: [row.fill_(float("nan")) for row in read(pieces)]
    with pytest.raises(BackendFailed, match="not numbers"):
        reply(engine, [1, 2, 3])
    wait_until(lambda: engine.load == (0, 0))
    assert engine._scheduler._readers.kept_bytes == 0


class Killed(BaseException):
    """Nothing that code handles."""


def test_death_of_the_loop_is_told_and_the_next_request_works(build, caplog):
    engine, decoder = build(limits=ServingLimits(max_running=2))
    expected = reply(engine, [1, 2, 3])

    def die(pieces):
        decoder.before = lambda pieces: None
        raise Killed

    def hold(pieces):
        entered.set()
        go.wait(20)

    entered, go = threading.Event(), threading.Event()
    decoder.before = hold
    steps = [submit(engine, [1, 2, 3 + i]) for i in range(3)]
    assert entered.wait(20)
    decoder.before = die
    go.set()
    with caplog.at_level(logging.CRITICAL):
        for each in steps[:2]:
            with pytest.raises(BackendFailed, match="try again"):
                list(each)
        assert len(tokens(steps[2])) == 12  # it waited, and runs on the new loop
    assert "Killed" in caplog.text
    assert reply(engine, [1, 2, 3]) == expected


def test_thread_that_vanishes_without_a_word_is_noticed(build, monkeypatch):
    engine, _ = build()
    monkeypatch.setattr("qwen.scheduler.Scheduler._run", lambda self: None)
    steps = submit(engine, [1, 2, 3])
    monkeypatch.undo()
    assert len(tokens(steps)) == 12


def test_strict_mode_reads_inexact_forms_one_by_one_and_exact_ones_together(build):
    engine, decoder = build(is_strict=True)
    go = held_back(decoder)
    steps = [submit(engine, prompt) for prompt in prompts(4)]
    go.set()
    assert [len(tokens(each)) for each in steps] == [12] * 4
    assert max(decoder.calls) == (4 if decoder.is_exact else 1)


def test_conversation_is_not_lost_to_a_stranger_with_the_same_system_prompt(build):
    engine, decoder = build()
    system = list(range(20))
    history = system + reply(engine, system + list(range(100, 160)))
    reply(engine, system + list(range(200, 260)))
    decoder.tokens.clear()
    reply(engine, system + list(range(100, 160)), max_new_tokens=1)
    assert decoder.tokens[0] == [1 if decoder.is_exact else 80]
    assert len(history) == 32


def test_hostile_users_leave_nothing_behind(build):
    engine, _decoder = build(limits=ServingLimits(max_running=4, max_waiting=3))
    expected = reply(engine, [3, 1, 4])

    def hostile(number):
        try:
            steps = submit(engine, [number] * (1 + number % 50), max_new_tokens=300)
        except TooManyRequests:
            time.sleep(0.01)
            return
        if number % 3:
            next(steps)
        if number % 2:
            steps.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hostile, range(60)))
    wait_until(lambda: engine.load == (0, 0))
    assert reply(engine, [3, 1, 4]) == expected
    wait_until(lambda: all(thread.name != "decode-loop" for thread in threading.enumerate()))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_log_probabilities_are_of_the_models_own_distribution(build, temperature):
    model = build_tiny_model()
    engine, decoder = build(model)
    settings = {"temperature": temperature, "top_logprobs": 3, "repetition_penalty": 1.3}
    steps = list(submit(engine, [1, 2, 3], max_new_tokens=5, seed=1, **settings))[:-1]
    with torch.inference_mode():
        ids = [1, 2, 3]
        for step in steps:
            logits = decoder.read(torch.tensor(ids), decoder.start(len(ids)))
            expected = logits.double().log_softmax(0)
            assert step.logprob == pytest.approx(float(expected[step.token_id]), abs=1e-4)
            top = expected.topk(3)
            assert [i for i, _ in step.top_logprobs] == top.indices.tolist()
            assert [x for _, x in step.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
            ids.append(step.token_id)


REAL_QUESTIONS = ("Name a colour.", "What is 2 + 2?", "Write a haiku about the sea. " * 5, "Hi!")


def answers(backend, *, at_once):
    def ask(number, question):
        request = ChatRequest(
            (Message("user", question),),
            params=SamplingParams(temperature=0.9, seed=number, max_new_tokens=12),
        )
        return "".join(event.text for event in backend.stream(request, threading.Event()))

    with ThreadPoolExecutor(len(REAL_QUESTIONS) if at_once else 1) as pool:
        return list(pool.map(ask, range(len(REAL_QUESTIONS)), REAL_QUESTIONS))


@pytest.mark.integration
def test_users_of_the_embedded_model_get_the_replies_they_get_alone(embedded_backend):
    assert answers(embedded_backend, at_once=True) == answers(embedded_backend, at_once=False)


@pytest.mark.integration
def test_users_of_a_qwen_v1_with_different_alphas_get_the_replies_they_get_alone(
    embedded_v1_folder,
):
    backend = load_backend(str(embedded_v1_folder), LoadOptions(device="cpu"))
    decoder = backend._engine._scheduler._readers._decoder
    decoder._config.use_dynamic_ntk, decoder._config.seq_length = True, 30
    alphas = {decoder.alpha(len(build_ids(backend, question))) for question in REAL_QUESTIONS}
    assert len(alphas) >= 2
    assert answers(backend, at_once=True) == answers(backend, at_once=False)
    backend.close()


def build_ids(backend, question):
    return backend._build_prompt(ChatRequest((Message("user", question),))).ids


PROGRAM_THAT_ENDS = """
import sys, threading
sys.path.insert(0, "tests")
from tiny_model import build_tiny_model
from qwen.decoder import Decoder
from qwen.engine import Engine
from qwen.messages import SamplingParams
model = build_tiny_model()
engine = Engine(model, eos_token_ids=(), context_length=500, decoder=Decoder(model))
params = SamplingParams(max_new_tokens=400)
steps = [engine.submit([1, 2, i], params, cancel=threading.Event()) for i in range(3)]
print(next(steps[0]).token_id is not None or next(steps[0]).token_id is not None)
"""


def test_process_that_ends_during_a_reply_ends_in_good_order():
    command = [sys.executable, "-c", PROGRAM_THAT_ENDS]
    folder = Path(__file__).parent.parent
    for _ in range(3):
        ran = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr
