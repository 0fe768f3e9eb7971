"""The GPU's way of decoding, run on a CPU where a "graph" just repeats the work."""

import gc
import logging
import re
import threading
import weakref

import golden_v1
import pytest
import torch
from fake_backend import wait_until
from tiny_model import build_tiny_model

from qwen import cuda_graphs
from qwen.cuda_graphs import GraphedDecoder, StepParts, make_step_parts
from qwen.decoder import Decoder, Piece
from qwen.decoder_ops import TorchOps
from qwen.engine import Engine
from qwen.errors import BackendFailed, OutOfMemory
from qwen.evals.gpu_checks import wait_for_compilation
from qwen.kv_slots import KvSlots
from qwen.messages import SamplingParams
from qwen.readers import DecoderReaders

MODELS = {"qwen2": build_tiny_model, "qwen1": golden_v1.load_tiny}


class Repeat:
    """Records by remembering; counts how often it did."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        result = work()

        def replay():
            self.replayed += 1
            result.copy_(work())

        return replay, result


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture(autouse=True)
def small_sizes_and_bad_memory(monkeypatch):
    def garbage(shape, **kwargs):
        return torch.full(shape, torch.nan, **kwargs)

    monkeypatch.setattr(cuda_graphs, "_FIRST_BUCKET", 8)
    monkeypatch.setattr(cuda_graphs, "_FIRST_CAPACITY", 16)
    monkeypatch.setattr("qwen.kv_store.empty", garbage)


def prompt(length, seed=0):
    return torch.randint(0, 290, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def read(decoder, ids, read_at_once, sequence=None):
    """Read the first tokens at once and the others one by one; return all logits."""
    sequence = sequence or decoder.start(len(ids))
    pieces = [ids[:read_at_once], *ids[read_at_once:].split(1)]
    return torch.stack([decoder.read(piece, sequence).clone() for piece in pieces]), sequence


def test_tokens_of_graphs_equal_the_plain_decoders_over_all_buckets(make):
    ids, record = prompt(300), Repeat()
    expected, _ = read(Decoder(make()), ids, 5)
    actual, _ = read(GraphedDecoder(make(), record=record), ids, 5)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert record.replayed == 295


def test_a_graph_serves_all_lengths_of_its_bucket(make):
    record = Repeat()
    decoder = GraphedDecoder(make(), record=record)
    with torch.inference_mode():
        sequence = decoder.start(200)  # the store does not grow any more
    read(decoder, prompt(130), 1, sequence)
    assert record.recorded == 6  # 8, 16, 32, 64, 128 and 256 positions


def test_sequence_that_was_put_aside_goes_on_as_if_alone(make):
    first, other, decoder = prompt(90, 1), prompt(120, 2), GraphedDecoder(make(), record=Repeat())
    expected, _ = read(Decoder(make()), first, 40)
    with torch.inference_mode():
        sequence = decoder.start(90)
        decoder.read(first[:40], sequence)
        parked = decoder.park(sequence)
        read(decoder, other, 30)
        resumed = decoder.resume(parked, length=40)
    actual, _ = read(decoder, first[40:], 1, resumed)
    torch.testing.assert_close(actual, expected[1:], atol=1e-4, rtol=1e-4)


def test_engine_replies_the_same_with_graphs_and_with_kept_sequences(make):
    def replies(decoder, model):
        engine = Engine(model, eos_token_ids=(), context_length=250, decoder=decoder)
        params = SamplingParams(temperature=0, max_new_tokens=20)
        ids = prompt(70, 3).tolist()
        for prompt_ids in (ids, [*ids[:50], 7, 8, 9], [*ids, 1, 2], ids):
            steps = engine.submit(prompt_ids, params, cancel=threading.Event())
            yield [step.token_id for step in steps]

    model, graphed = make(), make()
    expected = list(replies(None, model))
    assert list(replies(GraphedDecoder(graphed, record=Repeat()), graphed)) == expected


@torch.inference_mode()
def test_sequences_that_join_and_leave_have_the_logits_they_have_alone(make):
    lengths, steps = [3, 70, 40, 130, 9], 20
    ids = [prompt(n + steps, seed) for seed, n in enumerate(lengths)]
    alone = [read(Decoder(make()), own, n)[0] for own, n in zip(ids, lengths, strict=True)]
    decoder, running, seen = GraphedDecoder(make(), record=Repeat()), {}, {}
    for now in range(40):
        number = now // 3
        if now % 3 == 0 and number < len(ids):  # one joins, with its whole prompt
            running[number] = decoder.start(len(ids[number]))
            seen[number] = []
        pieces = [
            Piece(
                ids[i][sequence.store.length :][: 1 if seen[i] else lengths[i]].tolist(),
                sequence,
                wants_logits=True,
            )
            for i, sequence in reversed(running.items())
        ]
        if pieces:
            order = list(reversed(running))
            for i, logits in zip(order, decoder.read_many(pieces), strict=True):
                seen[i].append(logits.clone())
        for i in [i for i in running if len(seen[i]) > (5 if i == 1 else steps)]:
            decoder.discard(running.pop(i))  # the second one leaves early
    assert not running
    for i, logits in seen.items():
        torch.testing.assert_close(
            torch.stack(logits), alone[i][: len(logits)], atol=1e-4, rtol=1e-4
        )


def test_users_of_an_engine_with_graphs_get_the_replies_they_get_alone(make):
    def submit(engine, number):
        params = SamplingParams(temperature=0, max_new_tokens=10 + 5 * number)
        return engine.submit(
            prompt(20 + 30 * number, number).tolist(), params, cancel=threading.Event()
        )

    def tokens(steps):
        return [step.token_id for step in steps if step.token_id is not None]

    model = make()
    plain = Engine(model, eos_token_ids=(), context_length=250, decoder=Decoder(model))
    alone = [tokens(submit(plain, number)) for number in range(5)]
    graphed = make()
    decoder = GraphedDecoder(graphed, record=Repeat())
    engine = Engine(graphed, eos_token_ids=(), context_length=250, decoder=decoder)
    for _ in range(2):  # the second time from kept sequences
        assert [tokens(s) for s in [submit(engine, n) for n in range(5)]] == alone
    assert max(rows for rows, _ in decoder._graphs) >= 4
    wait_until(lambda: engine.load == (0, 0))
    assert not decoder._slots.used


def sampled_replies(make, decoder, *, eos, users=6):
    """Let users ask at once, with samplers and ends of their own; return tokens and reasons."""
    engine = Engine(make(), eos_token_ids=eos, context_length=250, decoder=decoder)

    def submit(number):
        params = SamplingParams(
            temperature=[0, 0.8, 1.3][number % 3],
            top_k=40,
            repetition_penalty=[1.0, 1.2][number % 2],
            seed=number,
            max_new_tokens=5 + 9 * number,
        )
        return engine.submit(
            prompt(1 + 25 * number, number).tolist(), params, cancel=threading.Event()
        )

    replies = []
    for _ in range(2):  # the second time some of the prompts are kept
        replies += [
            [(step.token_id, step.finish_reason) for step in steps]
            for steps in [submit(number) for number in range(users)]
        ]
    wait_until(lambda: engine.load == (0, 0))
    return replies


class AheadDecoder(GraphedDecoder):
    """Counts what it reads before the host knows it, and can be told to fail there."""

    def __init__(self, model, **options):
        super().__init__(model, record=Repeat(), **options)
        self.num_ahead, self.fault, self.waits = 0, None, False

    @property
    def read_ahead(self):
        return None if self.waits else self._count_ahead

    def _count_ahead(self, sequences, tokens, places):
        self.num_ahead += len(sequences)
        if self.fault is not None:
            return self.fault(self._read_ahead, sequences, tokens, places)
        return self._read_ahead(sequences, tokens, places)


def test_tokens_read_before_the_host_knows_them_change_no_reply(make):
    plain = AheadDecoder(make())
    plain.waits = True
    first = sampled_replies(make, plain, eos=())
    eos = {first[3][4][0], first[5][20][0]}  # ends some replies early
    expected = sampled_replies(make, plain, eos=eos)
    assert {reply[-1][1] for reply in expected} == {"stop", "length"}
    decoder = AheadDecoder(make())
    assert sampled_replies(make, decoder, eos=eos) == expected
    num_tokens = sum(len(reply) - 1 for reply in expected)
    assert decoder.num_ahead > 0.7 * num_tokens
    assert not decoder._slots.used


def no_memory(*args):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("is_read", [False, True])
def test_reply_goes_on_where_its_token_cannot_be_read_ahead(make, monkeypatch, is_read):
    def fail(read_ahead, sequences, tokens, places):
        if decoder.num_ahead % 7:
            return read_ahead(sequences, tokens, places)
        if not is_read:
            no_memory()
        with monkeypatch.context() as patch:  # when the step has been launched
            patch.setattr(cuda_graphs.torch, "stack", no_memory)
            return read_ahead(sequences, tokens, places)

    expected = sampled_replies(make, AheadDecoder(make()), eos=())
    decoder = AheadDecoder(make())
    decoder.fault = fail
    assert sampled_replies(make, decoder, eos=()) == expected
    assert decoder.num_ahead > 50


def test_growing_alpha_begins_anew_what_was_read_ahead():
    def replies(decoder):
        model = golden_v1.load_tiny()  # 64 is its trained length
        options = {"eos_token_ids": (), "context_length": 300, "ntk_policy": "grow"}
        engine = Engine(model, decoder=decoder, **options)
        params = SamplingParams(temperature=0, max_new_tokens=90)
        asked = [
            engine.submit(prompt(n, n).tolist(), params, cancel=threading.Event())
            for n in (20, 50, 100)
        ]
        return [[step.token_id for step in steps] for steps in asked]

    plain, decoder = (AheadDecoder(golden_v1.load_tiny()) for _ in range(2))
    plain.waits = True
    assert replies(decoder) == replies(plain)
    assert decoder.num_ahead > 100


def test_cancelled_reply_leaves_others_that_are_read_ahead_as_they_are(make):
    decoder = AheadDecoder(make())
    engine = Engine(make(), eos_token_ids=(), context_length=300, decoder=decoder)

    def submit(length, cancel):
        params = SamplingParams(temperature=0, max_new_tokens=60)
        return engine.submit(prompt(length, length).tolist(), params, cancel=cancel)

    def tokens(steps):
        return [step.token_id for step in steps]

    lengths = (30, 60, 40)
    alone = [tokens(submit(n, threading.Event())) for n in lengths]
    for cancelled in range(3):
        cancels = [threading.Event() for _ in lengths]
        asked = [submit(n, cancel) for n, cancel in zip(lengths, cancels, strict=True)]
        for _ in range(9 * cancelled + 1):
            next(asked[cancelled])
        cancels[cancelled].set()
        told = [tokens(steps) for steps in asked]
        for place in {0, 1, 2} - {cancelled}:
            assert told[place] == alone[place]
    wait_until(lambda: engine.load == (0, 0))
    assert not decoder._slots.used


def test_model_that_nobody_uses_is_let_go_at_once():
    gc.disable()
    try:
        decoder = GraphedDecoder(build_tiny_model(), record=Repeat())
        readers = DecoderReaders(decoder, prefix_bytes=1000, max_length=100)
        assert readers.read_ahead is not None
        left = weakref.ref(decoder)
        del decoder, readers
        assert left() is None
    finally:
        gc.enable()


def test_numbers_that_are_none_ahead_end_one_reply_only(make):
    def poison(read_ahead, sequences, tokens, places):
        logits = read_ahead(sequences, tokens, places)
        if len(logits) == 2:
            logits[1].fill_(torch.nan)
        return logits

    decoder = AheadDecoder(make())
    engine = Engine(make(), eos_token_ids=(), context_length=250, decoder=decoder)
    params = SamplingParams(temperature=0, max_new_tokens=40)
    cancel, prompts = threading.Event(), ([4, 5, 6], [7, 8, 9])
    alone = [
        [step.token_id for step in engine.submit(ids, params, cancel=cancel)] for ids in prompts
    ]
    decoder.fault = poison
    replies = [engine.submit(ids, params, cancel=cancel) for ids in prompts]
    failed = 0
    for steps, expected in zip(replies, alone, strict=True):
        told = []
        try:
            told.extend(step.token_id for step in steps)
            assert told == expected
        except BackendFailed:
            failed += 1
            assert told == expected[: len(told)]
    assert failed == 1
    wait_until(lambda: engine.load == (0, 0))
    assert not decoder._slots.used


def test_failed_step_leaves_every_sequence_as_it_was(make):
    record = Repeat()
    decoder = GraphedDecoder(make(), record=record)
    with torch.inference_mode():
        sequences = [decoder.start(20) for _ in range(3)]
        for sequence in sequences:
            decoder.read(prompt(10), sequence)
        decoder._record = fail_to_record
        pieces = [
            Piece(prompt(n, 5).tolist(), s) for n, s in zip([4, 1, 1], sequences, strict=True)
        ]
        with pytest.raises(RuntimeError, match="no graph"):
            decoder.read_many(pieces)
    assert [sequence.store.length for sequence in sequences] == [10, 10, 10]


def test_lack_of_memory_ends_the_reply_that_needs_more_and_no_other(make, monkeypatch):
    def ask(engine, length):
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
        return engine.submit(prompt(length, length).tolist(), params, cancel=threading.Event())

    def replies(several):
        return [[step.token_id for step in steps] for steps in several]

    lengths = [5, 12, 245, 20]  # the third one would need more than a block
    plain = Engine(make(), eos_token_ids=(), context_length=600)
    alone = [replies([ask(plain, length)])[0] for length in lengths]
    grow = KvSlots.grow

    def grow_little(slots, count, capacity):
        if capacity > 256:
            raise torch.OutOfMemoryError("no more")
        grow(slots, count, capacity)

    monkeypatch.setattr(KvSlots, "grow", grow_little)
    decoder = GraphedDecoder(make(), record=Repeat())
    engine = Engine(make(), eos_token_ids=(), context_length=600, decoder=decoder)
    several = [ask(engine, length) for length in lengths]
    told = []
    with pytest.raises(OutOfMemory):
        for step in several[2]:
            told.append(step.token_id)
    assert len(told) == 12 and told == alone[2][:12]
    assert replies([several[0], several[1], several[3]]) == [alone[0], alone[1], alone[3]]
    assert replies([ask(engine, 5)]) == [alone[0]]


def test_sequence_that_cannot_begin_holds_no_slot(make, monkeypatch):
    decoder = GraphedDecoder(make(), record=Repeat())
    decoder.start(5)

    def fail(prompt_length):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(decoder, "_table", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.start(5)
    assert len(decoder._slots.used) == 1


def test_loop_that_dies_lets_go_of_its_slots(make, caplog):
    class Killed(BaseException):
        """Nothing that code handles."""

    decoder = GraphedDecoder(
        make(),
        record=Repeat(),
    )
    engine = Engine(make(), eos_token_ids=(), context_length=250, decoder=decoder)
    step, entered = decoder._step, threading.Event()

    def die(pieces, tokens=None):
        if len(pieces) < 2:
            return step(pieces, tokens)
        decoder._step = step
        entered.set()
        raise Killed

    decoder._step = die
    params = SamplingParams(temperature=0, max_new_tokens=100)
    several = [
        engine.submit([5, 6, number], params, cancel=threading.Event()) for number in range(2)
    ]
    for steps in several:
        with pytest.raises(BackendFailed, match="try again"):
            list(steps)
    assert entered.is_set() and not decoder._slots.used
    assert "Generating failed" not in caplog.text  # letting go is no second fault
    assert len(list(engine.submit([5, 6], params, cancel=threading.Event()))) == 101


def test_decoder_settles_when_its_kernels_are_compiled():
    go = threading.Event()

    def make_parts():
        go.wait(20)
        return StepParts(TorchOps())

    decoder = GraphedDecoder(build_tiny_model(), record=Repeat(), make_parts=make_parts)
    threading.Timer(0.2, go.set).start()
    assert not decoder.has_own_kernels
    decoder.settle()
    assert decoder.has_own_kernels


def fail_to_record(work):
    raise RuntimeError("no graph")


def assert_reads_as_the_plain_one(decoder):
    ids = prompt(20)
    actual, _ = read(decoder, ids, 10)
    expected, _ = read(Decoder(build_tiny_model()), ids, 10)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_compiled_parts_are_used_from_the_next_sequence_on():
    used = []

    class CountingOps(TorchOps):
        def rms_norm(self, x, weight, eps):
            used.append(len(x))
            return super().rms_norm(x, weight, eps)

    decoder = GraphedDecoder(
        build_tiny_model(), record=Repeat(), make_parts=lambda: StepParts(CountingOps())
    )
    wait_for_compilation()
    used.clear()
    assert_reads_as_the_plain_one(decoder)
    assert set(used) == {1}  # prompts are read without them


def test_kernels_that_compute_something_else_are_not_used(caplog):
    class WrongOps(TorchOps):
        def rms_norm(self, x, weight, eps):
            return super().rms_norm(x, weight, eps) * 1.1

    with caplog.at_level(logging.WARNING):
        decoder = GraphedDecoder(
            build_tiny_model(), record=Repeat(), make_parts=lambda: StepParts(WrongOps())
        )
        wait_for_compilation()
    assert re.search(r"slower: a product, rows: 1, is off by 0\.\d+ when compiled", caplog.text)
    assert not decoder.has_own_kernels
    assert_reads_as_the_plain_one(decoder)


def test_compilation_that_fails_is_named_in_the_log_and_decoding_goes_on(caplog):
    def fail():
        raise RuntimeError("no compiler found\nlong story")

    with caplog.at_level(logging.WARNING):
        decoder = GraphedDecoder(build_tiny_model(), record=Repeat(), make_parts=fail)
        wait_for_compilation()
    assert "slower: no compiler found" in caplog.text
    assert_reads_as_the_plain_one(decoder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_equal_the_transformers_classes(make, compiled):
    model = make().cuda()
    ids = prompt(150).cuda()
    with torch.inference_mode():
        expected = model(ids[None], use_cache=False).logits[0, 39:]
    decoder = GraphedDecoder(model, make_parts=make_step_parts if compiled else None)
    wait_for_compilation()
    assert decoder.has_own_kernels == compiled
    actual, _ = read(decoder, ids, 40)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
