import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import golden_v1
import pytest
import torch
from fake_backend import wait_until
from tiny_model import build_tiny_model
from transformers import DynamicCache

from qwen.engine import Engine, EngineStep, _default_prefix_bytes
from qwen.errors import (
    BackendFailed,
    BackendNotReady,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
    PromptTooLong,
)
from qwen.messages import SamplingParams
from qwen.serving_limits import ServingLimits

PROMPT = [5, 6, 7, 8]


def params(**values):
    return SamplingParams(**({"temperature": 0.0, "repetition_penalty": 1.0} | values))


def never():
    return threading.Event()


class CountingModel:
    """A model that counts its forwards and can be told what to do at one of them."""

    def __init__(self, model=None, before=None):
        self.model = model or build_tiny_model()
        self.before = before or (lambda forward: None)
        self.forwards = 0
        self.config, self.device = self.model.config, self.model.device

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def __call__(self, input_ids, **options):
        self.forwards += 1
        self.before(self.forwards)
        return self.model(input_ids, **options)


def build(model=None, *, eos=(), context_length=512, **limits):
    return Engine(
        model or CountingModel(),
        eos_token_ids=eos,
        context_length=context_length,
        limits=ServingLimits(**limits),
    )


def reply(engine, prompt=PROMPT, cancel=None, **values):
    """Return the tokens of a whole reply and its finish reason."""
    steps = list(engine.submit(prompt, params(**values), cancel=cancel or never()))
    steps = [step for step in steps if step.queued is None]
    assert all((s.token_id is None) != (s.finish_reason is None) for s in steps)
    assert [s.finish_reason is None for s in steps] == [True] * (len(steps) - 1) + [False]
    return [s.token_id for s in steps[:-1]], steps[-1].finish_reason


def greedy_by_full_forwards(model, prompt, steps):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_kv_cache_matches_full_forward():
    model = build_tiny_model()
    tokens, reason = reply(build(model), max_new_tokens=24)
    assert tokens == greedy_by_full_forwards(model, PROMPT, 24)
    assert reason == "length"


@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 50])
def test_prompt_read_in_chunks_gives_the_same_tokens(monkeypatch, length):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 7)
    model = CountingModel()
    prompt = list(range(10, 10 + length))
    tokens, _ = reply(build(model), prompt, max_new_tokens=5)
    assert tokens == greedy_by_full_forwards(model.model, prompt, 5)
    assert model.forwards == -(-length // 7) + 4


def test_greedy_equals_generate_of_transformers():
    model = build_tiny_model()
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, pad_token_id=0, **settings)[
        0, len(PROMPT) :
    ]
    assert reply(build(model), **settings)[0] == expected.tolist()


def test_end_token_stops_the_reply_and_is_not_part_of_it():
    tokens, _ = reply(build(), max_new_tokens=10)
    place = next(i for i in range(10) if tokens[i] not in tokens[:i] and i >= 1)
    assert reply(build(eos=[tokens[place]]), max_new_tokens=10) == (tokens[:place], "stop")


def test_end_token_as_the_very_last_one_still_means_stop():
    tokens, _ = reply(build(), max_new_tokens=1)
    assert reply(build(eos=tokens), max_new_tokens=1) == ([], "stop")


def test_reply_ends_where_the_context_is_full():
    tokens, reason = reply(build(context_length=len(PROMPT) + 3), max_new_tokens=99)
    assert (len(tokens), reason) == (3, "length")


def test_same_seed_gives_the_same_reply():
    sampling = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "max_new_tokens": 20}
    first, other, again = (reply(build(), seed=s, **sampling)[0] for s in (1, 2, 1))
    assert first == again != other


def test_cancel_between_two_tokens_frees_the_slot_within_one_step():
    cancel, at_cancel = never(), []

    def slow(forward):
        time.sleep(0.01)
        at_cancel.append(cancel.is_set())

    engine = build(CountingModel(before=slow))
    steps = engine.submit(PROMPT, params(max_new_tokens=400), cancel=cancel)
    for _ in range(3):
        next(steps)
    cancel.set()
    assert list(steps) == [EngineStep(finish_reason="cancelled")]
    wait_until(lambda: engine.load == (0, 0))
    assert sum(at_cancel) <= 1


def test_cancel_during_a_forward_gives_no_further_token():
    cancel = never()
    model = CountingModel(before=lambda forward: cancel.set() if forward == 3 else None)
    tokens, reason = reply(build(model), cancel=cancel)
    assert len(tokens) <= 2
    assert (reason, model.forwards) == ("cancelled", 3)


def test_cancel_is_seen_between_two_chunks_of_the_prompt(monkeypatch):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 4)
    cancel = never()
    model = CountingModel(before=lambda forward: cancel.set() if forward == 2 else None)
    assert reply(build(model), list(range(40)), cancel) == ([], "cancelled")
    assert model.forwards == 2


def test_cancel_before_the_first_step_runs_nothing():
    model, cancel = CountingModel(), never()
    cancel.set()
    assert reply(build(model), cancel=cancel) == ([], "cancelled")
    assert model.forwards == 0


@contextmanager
def running(engine):
    """A request in the middle of its reply."""
    steps = engine.submit(PROMPT, params(max_new_tokens=500), cancel=never())
    next(steps)
    yield steps
    steps.close()


def slow_model():
    return CountingModel(before=lambda forward: time.sleep(0.005))


def waiting_thread(engine, done, **options):
    def work():
        done.append(reply(engine, max_new_tokens=1, **options))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_until_queued(engine, count):
    """Wait until so many requests run or wait."""
    wait_until(lambda: sum(engine.load) == count)


def test_second_request_waits_for_the_first_where_only_one_may_run():
    engine, done = build(slow_model(), max_running=1), []
    with running(engine):
        thread = waiting_thread(engine, done)
        wait_until_queued(engine, 2)
        thread.join(0.1)
        assert not done
    thread.join(10)
    assert len(done) == 1


def test_second_request_does_not_wait_for_the_first():
    engine = build(slow_model())
    with running(engine):
        assert reply(engine, max_new_tokens=2)[1] == "length"
        assert engine.load == (1, 0)


def test_finished_iterator_that_is_kept_does_not_hold_the_turn():
    engine = build(max_running=1)
    kept = engine.submit(PROMPT, params(max_new_tokens=1), cancel=never())
    assert [next(kept).finish_reason, next(kept).finish_reason] == [None, "length"]
    assert reply(engine, max_new_tokens=1)[1] == "length"


def test_closing_the_iterator_from_another_thread_frees_the_turn():
    engine = build(slow_model(), max_running=1)
    with running(engine) as steps, ThreadPoolExecutor(1) as pool:
        pool.submit(steps.close).result(10)
        assert reply(engine, max_new_tokens=2)[1] == "length"


def test_dropping_the_iterator_frees_the_turn():
    engine = build(slow_model(), max_running=1)
    steps = engine.submit(PROMPT, params(max_new_tokens=500), cancel=never())
    next(steps)
    del steps
    gc.collect()
    assert reply(engine, max_new_tokens=2)[1] == "length"


def test_loop_has_no_thread_while_nothing_runs():
    engine = build()
    for _ in range(3):
        reply(engine, max_new_tokens=2)
    wait_until(lambda: all(thread.name != "decode-loop" for thread in threading.enumerate()))


@pytest.fixture
def caches(monkeypatch):
    """Weak references to every cache that is made."""
    made = []

    class Watched(DynamicCache):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(weakref.ref(self))

    monkeypatch.setattr("qwen.int8_cache.DynamicCache", Watched)
    return made


def test_closing_frees_the_cache(caches):
    with running(build(slow_model())) as steps:
        assert caches[0]() is not None
        steps.close()
        wait_until(lambda: caches[0]() is None)


def test_finished_iterator_that_is_kept_does_not_hold_the_cache(caches):
    kept = build().submit(PROMPT, params(max_new_tokens=1), cancel=never())
    assert [next(kept).finish_reason, next(kept).finish_reason] == [None, "length"]
    wait_until(lambda: caches[0]() is None)


def test_error_that_is_kept_does_not_hold_the_cache(caches):
    def fail(count):
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory) as caught:
        reply(build(CountingModel(before=fail)))
    assert caught.value.__traceback__ is not None
    wait_until(lambda: caches[0]() is None)


def test_requests_are_served_in_the_order_they_came():
    engine, done, threads = build(slow_model(), max_running=1), [], []
    with running(engine):
        for place in range(6):
            threads.append(waiting_thread(engine, done, prompt=[*PROMPT, place]))
            wait_until_queued(engine, place + 2)
    for thread in threads:
        thread.join(10)
    alone = build()
    assert done == [reply(alone, [*PROMPT, place], max_new_tokens=1) for place in range(6)]


def test_cancelled_request_leaves_the_queue_while_another_runs():
    engine, done, cancel = build(slow_model(), max_running=1), [], never()
    with running(engine):
        thread = waiting_thread(engine, done, cancel=cancel)
        wait_until_queued(engine, 2)
        cancel.set()
        thread.join(10)
        assert done == [([], "cancelled")]
        wait_until_queued(engine, 1)


def test_cancelling_one_that_waits_lets_those_behind_it_through():
    engine, done, cancel = build(slow_model(), max_running=1), [], never()
    with running(engine):
        first = waiting_thread(engine, done, cancel=cancel)
        wait_until_queued(engine, 2)
        second = waiting_thread(engine, done)
        wait_until_queued(engine, 3)
        cancel.set()
        first.join(10)
    second.join(10)
    assert [reason for _, reason in done] == ["cancelled", "length"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
@pytest.mark.parametrize("forward", [1, 4])
def test_out_of_memory_is_named_and_the_next_request_works(error, forward):
    def fail(count):
        if count == forward:
            raise error

    model = CountingModel(before=fail)
    engine = build(model)
    steps = engine.submit(PROMPT, params(), cancel=never())
    tokens = []
    with pytest.raises(OutOfMemory, match="smaller model"):
        tokens.extend(iter(steps))
    del steps
    expected, _ = reply(build(model.model), max_new_tokens=8)
    assert reply(engine, max_new_tokens=8) == (expected, "length")


def test_error_that_is_kept_holds_no_memory_of_the_failed_forward():
    class Activation:
        pass

    held = []

    def fail(count):
        activation = Activation()
        held.append(weakref.ref(activation))
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory) as caught:
        reply(build(CountingModel(before=fail)))
    assert caught.value.__context__ is None
    assert held[-1]() is None


def test_unexpected_fault_is_logged_and_named_and_the_next_request_works(caplog):
    def fail(count):
        if count == 2:
            raise RuntimeError("shape mismatch")

    engine = build(CountingModel(before=fail))
    with caplog.at_level(logging.ERROR), pytest.raises(BackendFailed, match="log has the details"):
        reply(engine)
    assert "shape mismatch" in caplog.text and "Traceback" in caplog.text
    assert reply(engine, max_new_tokens=2)[1] == "length"


def test_numbers_that_are_none_fail_the_request_only():
    def spoil(count):
        weight = model.model.model.norm.weight
        weight.data.fill_(float("nan") if count == 2 else 1.0)

    model = CountingModel(before=spoil)
    engine = build(model)
    with pytest.raises(BackendFailed, match="not numbers"):
        reply(engine)
    assert reply(engine, max_new_tokens=2)[1] == "length"


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_unknown_token_id_is_refused(bad):
    with pytest.raises(InvalidRequest, match=r"does not know.*300"):
        build().submit([1, bad], params(), cancel=never())


def test_empty_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="empty"):
        build().submit([], params(), cancel=never())


def test_prompt_that_fills_the_context_is_refused():
    with pytest.raises(PromptTooLong, match=r"4 tokens.*holds 4"):
        build(context_length=4).submit(PROMPT, params(), cancel=never())


def test_closing_the_engine_cancels_running_and_waiting_requests_and_refuses_new_ones():
    engine, done = build(slow_model(), max_running=1), []
    with running(engine) as steps:
        thread = waiting_thread(engine, done)
        wait_until_queued(engine, 2)
        engine.close()
        thread.join(10)
        assert done == [([], "cancelled")]
        assert list(steps)[-1] == EngineStep(finish_reason="cancelled")
    with pytest.raises(BackendNotReady, match="shutting down"):
        engine.submit(PROMPT, params(), cancel=never())
    engine.close()


def test_closing_the_engine_lets_go_of_the_model():
    model = CountingModel()
    alive = weakref.ref(model)
    engine = build(model)
    del model
    with running(engine) as steps:
        assert alive() is not None
        engine.close()
        list(steps)
        wait_until(lambda: alive() is None)


def test_inference_mode_does_not_leak_to_the_caller():
    with running(build()):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_steps_may_be_taken_from_different_threads():
    engine = build()
    expected, _ = reply(engine, max_new_tokens=10)
    steps = engine.submit(PROMPT, params(max_new_tokens=10), cancel=never())
    tokens = []
    for _ in range(10):
        with ThreadPoolExecutor(1) as pool:
            tokens.append(pool.submit(next, steps).result(10).token_id)
    steps.close()
    assert tokens == expected


def test_two_threads_at_once_get_the_same_replies_as_alone():
    engine = build()
    jobs = [
        ([seed + 1, seed + 2, seed + 3], {"seed": seed, "temperature": 1.2, "max_new_tokens": 12})
        for seed in range(12)
    ]
    alone = [reply(engine, prompt, **values) for prompt, values in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: reply(engine, job[0], **job[1]), jobs))
    assert together == alone


@pytest.mark.parametrize("case", ["e.greedy.prompt70.start0", "e.greedy.prompt100.start200"])
def test_qwen_v1_prompt_in_chunks_gives_the_published_greedy_ids(monkeypatch, case):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 32)  # of prompts past seq_length, 64
    golden = golden_v1.CASES[case]
    engine = Engine(golden_v1.load_tiny(), eos_token_ids=[1022], context_length=1024)
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=80)
    steps = list(engine.submit(golden["prompt"], params, cancel=threading.Event()))
    new_ids = [step.token_id for step in steps if step.token_id is not None]
    published = [token_id for token_id in golden["new_ids"] if token_id != 1022]
    assert new_ids == published


class RecordingModel:
    """A tiny Qwen v1 of `seq_length` 64 that keeps the logits of the last token of each call."""

    def __init__(self, before=None):
        self.model = golden_v1.load_tiny()
        self.before = before or (lambda past: None)
        self.reads, self.logits = [], []
        self.config, self.device = self.model.config, self.model.device

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def __call__(self, input_ids, **options):
        past = options["past_key_values"].get_seq_length()
        self.before(past)
        output = self.model(input_ids, **options)
        self.reads.append((past, past + input_ids.shape[1]))
        self.logits.append(output.logits[0, -1])
        return output


def reply_past_thresholds(model, ntk_policy, *, length=140, cancel=None):
    """Let a prompt of 60 tokens grow to a length, greedily; return all its tokens."""
    prompt = golden_v1.golden_ids(0, 60)[0].tolist()
    engine = Engine(model, eos_token_ids=[], context_length=256, ntk_policy=ntk_policy)
    return prompt + reply(engine, prompt, cancel, max_new_tokens=length - 60)[0]


def cold_logits(model, ids, **options):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False, **options).logits[0, -1]


def test_grow_has_after_each_threshold_the_logits_of_a_cold_forward():
    model = RecordingModel()
    ids = reply_past_thresholds(model, "grow")
    seen = {end: logits for (_, end), logits in zip(model.reads, model.logits, strict=True)}
    for end in (60, 64, 65, 66, 100, 128, 129, 139):  # alpha is 3 from 65 and 7 from 129 tokens
        golden_v1.assert_parity(seen[end], cold_logits(model.model, ids[:end]))


def test_grow_reads_a_sequence_again_at_thresholds_only(monkeypatch):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 50)
    model = RecordingModel()
    reply_past_thresholds(model, "grow")
    assert [end for past, end in model.reads if past == 0] == [50, 50, 50]
    assert [read for read in model.reads if read[1] in (65, 129)] == [(50, 65), (100, 129)]
    assert len(model.reads) == 2 + 4 + 2 + 63 + 3 + 10


def test_published_policy_keeps_the_alpha_of_the_prompt():
    model = RecordingModel()
    ids = reply_past_thresholds(model, "published")
    assert [past for past, _ in model.reads].count(0) == 1
    kept = cold_logits(model.model, ids[:-1], prompt_length=60)
    golden_v1.assert_parity(model.logits[-1], kept)
    assert (kept - cold_logits(model.model, ids[:-1])).abs().max() > 1


def test_reading_again_can_be_cancelled(monkeypatch):
    monkeypatch.setattr("qwen.sequence.PREFILL_CHUNK", 50)
    cancel, starts = threading.Event(), []

    def cancel_at_second_start(past):
        starts.append(past == 0)
        if sum(starts) == 2:
            cancel.set()

    model = RecordingModel(cancel_at_second_start)
    ids = reply_past_thresholds(model, "grow", cancel=cancel)
    # The caller stops at once; the loop then ends the read in which it was, and reads no more.
    wait_until(lambda: "decode-loop" not in [thread.name for thread in threading.enumerate()])
    assert (len(ids), model.reads[-1]) == (65, (0, 50))


@pytest.mark.parametrize(
    ("policy", "named"), [("grow", "dynamic NTK.*--ntk-policy"), ("shrink", "shrink")]
)
def test_ntk_policy_that_a_model_cannot_have_is_refused(policy, named):
    with pytest.raises(InvalidSetting, match=named):
        Engine(CountingModel(), eos_token_ids=[], context_length=64, ntk_policy=policy)


@pytest.mark.parametrize(("free", "kept"), [(80 * 2**30, 10 * 2**30), (2**30, 512 * 2**20)])
def test_a_gpu_keeps_whole_conversations_for_reuse(monkeypatch, free, kept):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert _default_prefix_bytes(on_gpu) == kept
    assert _default_prefix_bytes(SimpleNamespace(device=torch.device("cpu"))) == 512 * 2**20
