"""The remote backend before a scripted engine: what it sends, what it reads, and every fault."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from fake_backend import wait_until
from scripted_engine import USAGE, ScriptedEngine, chunk, fails, hangs, says, trickles

from qwen import remote_errors
from qwen.backend import ListedModel
from qwen.errors import (
    BackendNotReady,
    EmptyMessage,
    EngineBusy,
    EngineFailed,
    EngineRefused,
    EngineUnreachable,
    InvalidRequest,
    MessageTooLong,
    PromptTooLong,
    QwenError,
)
from qwen.messages import (
    ChatRequest,
    Message,
    SamplingParams,
    StreamEvent,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from qwen.remote import OpenAIBackend, RemoteTimes, open_remote
from qwen.remote_options import RemoteOptions

TIMES = RemoteTimes(connect=1.0, first=1.5, silence=1.0, listing=2.0, counting=0.5, loading=5.0)
HI = ChatRequest(messages=(Message("user", "hi"),))
#: As llama.cpp and what is built on it answer with HTTP 500.
OVER_LONG = (
    "the request exceeds the available context size. try increasing the context size",
    "Requested tokens (9000) exceed context window of 4096",
    "input is too large to process. increase the physical batch size",
)


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as scripted:
        yield scripted


@pytest.fixture
def connect(engine: ScriptedEngine) -> Iterator[Callable[..., OpenAIBackend]]:
    """Open a backend before the engine; `connect(model=…, api_key=…)`."""
    opened: list[OpenAIBackend] = []

    def open_backend(**options: str) -> OpenAIBackend:
        opened.append(open_remote(RemoteOptions(engine.url, **options), times=TIMES))
        return opened[-1]

    yield open_backend
    for backend in opened:
        backend.close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_errors, "RETRY_SECONDS", (0.01, 0.02, 0.03))


def take(backend: OpenAIBackend, request: ChatRequest = HI) -> list[StreamEvent]:
    return list(backend.stream(request, threading.Event()))


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events)


# What is read.


def test_a_reply_has_text_usage_timing_and_the_use_of_the_context_first(connect):
    events = take(connect())
    assert text(events) == "Hello there"
    assert events[0].context is not None and events[0].context.is_estimate
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage == Usage(11, 2)
    assert events[-1].timing is not None and events[-1].timing.time_to_first_token > 0
    assert all(event.finish_reason is None for event in events[:-1])


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_are_told_apart_from_the_reply(engine, connect, name):
    engine.acts.append(says(chunk(**{name: "hm"}), chunk("yes"), chunk(finish="stop")))
    events = take(connect())
    assert [event.reasoning for event in events if event.reasoning] == ["hm"]
    assert text(events) == "yes"


def test_tool_calls_come_in_parts(engine, connect):
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    engine.acts.append(
        says(chunk(tool_calls=[first]), chunk(tool_calls=[rest]), chunk(finish="tool_calls"))
    )
    events = take(connect())
    assert [call for event in events for call in event.tool_calls] == [
        ToolCallDelta(0, "c1", "f", ""),
        ToolCallDelta(0, "", "", '{"a": 1}'),
    ]
    assert events[-1].finish_reason == "tool_calls"


def test_log_probabilities_come_with_their_tokens_bytes(engine, connect):
    top = [{"token": "é", "bytes": [195], "logprob": -1.5}]
    entry = {"token": "?", "bytes": [195], "logprob": -0.5, "top_logprobs": top}
    event = chunk("x")
    event["choices"][0]["logprobs"] = {"content": [entry]}
    engine.acts.append(says(event, chunk(finish="stop")))
    [found] = [e.logprobs for e in take(connect()) if e.logprobs]
    assert (found[0].token, found[0].logprob, found[0].top) == (b"\xc3", -0.5, ((b"\xc3", -1.5),))


def test_without_usage_of_the_engine_pieces_are_counted(engine, connect):
    engine.acts.append(says(chunk("a"), chunk("b"), chunk("c"), chunk(finish="length")))
    final = take(connect())[-1]
    assert final.finish_reason == "length"
    assert final.usage is not None and final.usage.completion_tokens == 3


# What is sent.


def test_a_request_says_everything_that_the_engine_takes(engine, connect):
    tool = Tool("f", "does it", {"type": "object", "properties": {}})
    call = ToolCall("c1", "f", "{}")
    request = ChatRequest(
        messages=(
            Message("system", "be brief"),
            Message("user", "go"),
            Message("assistant", "", (call,)),
            Message("tool", "42", tool_call_id="c1"),
        ),
        tools=(tool,),
        tool_choice="f",
        params=SamplingParams(
            temperature=0.5, top_p=0.9, top_k=0, seed=7, stop=("END",), top_logprobs=2,
            repetition_penalty=1.2, max_new_tokens=50,
        ),
    )  # fmt: skip
    take(connect(), request)
    function = {"name": "f", "description": "does it", "parameters": dict(tool.parameters)}
    said = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert engine.bodies == [
        {
            "model": "scripted",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 50,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": -1,
            "repetition_penalty": 1.2,
            "seed": 7,
            "stop": ["END"],
            "logprobs": True,
            "top_logprobs": 2,
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": "", "tool_calls": [said]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
            ],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        }
    ]


def test_an_unknown_engine_gets_the_standard_fields_only_and_the_page_says_so(engine, connect):
    engine.models = [{"id": "m", "owned_by": "somebody"}]
    backend = connect()
    take(backend)
    assert not {"top_k", "repetition_penalty", "repeat_penalty"} & engine.bodies[0].keys()
    assert "top-k" in backend.info.notices[0]


def test_a_reply_is_continued_where_the_engine_can_and_refused_where_not(engine, connect):
    request = ChatRequest(messages=(Message("user", "count"),), reply_prefix="one two")
    take(connect(), request)
    assert engine.bodies[0]["messages"][-1] == {"role": "assistant", "content": "one two"}
    assert engine.bodies[0]["continue_final_message"] is True
    engine.models = [{"id": "m", "owned_by": "qwen"}]  # this project's own API
    take(connect(), request)
    assert engine.bodies[1]["messages"] == engine.bodies[0]["messages"]
    engine.models = [{"id": "m", "owned_by": "somebody"}]
    with pytest.raises(InvalidRequest, match="cannot go on"):
        take(connect(), request)


def test_no_key_is_sent_where_none_was_given(engine, connect, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-this-server")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-not-for-this-server")
    take(connect())
    assert not any("not-for-this-server" in str(headers) for headers in engine.headers)
    assert not any("authorization" in headers for headers in engine.headers)


def test_an_engine_on_this_machine_is_not_asked_through_a_proxy(connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert text(take(connect())) == "Hello there"


def test_the_key_is_sent_and_told_to_nobody_else(engine, connect, caplog):
    caplog.set_level(logging.DEBUG)
    backend = connect(api_key="sk-secret-1")
    take(backend)
    assert all(h["authorization"] == "Bearer sk-secret-1" for h in engine.headers)
    engine.acts.append(fails(401, {"error": {"message": "Incorrect API key: sk-secret-1"}}))
    with pytest.raises(EngineRefused, match="--api-key-env") as refused:
        take(backend)
    assert "sk-secret-1" not in f"{refused.value}{backend.info}{RemoteOptions('u', 'm', 'sk-s')}"
    assert "sk-secret-1" not in caplog.text


def test_an_empty_message_is_refused_without_asking(engine, connect):
    with pytest.raises(EmptyMessage):
        take(connect(), ChatRequest(messages=(Message("user", " "),)))
    assert engine.bodies == []


# The model list.


def test_the_first_model_is_taken_or_the_named_one(engine, connect):
    engine.models = [{"id": "one"}, {"id": "/srv/models/two.gguf", "meta": {"n_ctx": 512}}]
    assert connect().info.name == "one"
    named = connect(model="two.gguf")
    assert (named.info.name, named.info.context_length) == ("two.gguf", 512)
    take(named)
    assert engine.bodies[0]["model"] == "/srv/models/two.gguf"


def test_all_models_of_the_engine_are_listed_once_the_chosen_one_first(engine, connect):
    engine.models = [{"id": "one"}, {"id": "two", "max_model_len": 512}, {"id": "/srv/one"}]
    info = connect(model="two").info
    assert info.models == (ListedModel("two", 512), ListedModel("one", 0))
    assert "also has one" in " ".join(info.notices)


def test_a_request_may_name_another_model_of_the_engine(engine, connect):
    engine.models = [
        {"id": "one", "max_model_len": 4096, "owned_by": "vllm"},
        {"id": "/srv/two", "max_model_len": 512, "owned_by": "llamacpp"},
    ]
    backend = connect()
    request = replace(HI, model="/srv/two")
    with pytest.raises(EngineRefused):
        take(backend, request)  # a folder of the engine's machine is no name here
    request = replace(HI, model="two")
    assert backend.count_tokens(request).limit == 512
    assert text(take(backend, request)) == "Hello there"
    assert engine.bodies[0]["model"] == "/srv/two" and "repeat_penalty" in engine.bodies[0]
    take(backend)
    assert engine.bodies[1]["model"] == "one"


def test_tokens_are_counted_by_the_model_that_is_asked(engine, connect):
    engine.models = [{"id": "one", "owned_by": "vllm"}, {"id": "two", "owned_by": "vllm"}]
    engine.tokens = len
    backend = connect()
    for name in ("", "two"):
        backend.count_tokens(replace(HI, model=name))
    assert [body["model"] for body in engine.counted] == ["one", "two"]


def test_a_model_that_is_not_there_is_refused_with_those_that_are(engine, connect):
    with pytest.raises(EngineRefused, match="It has: scripted"):
        connect(model="other")


@pytest.mark.parametrize("models", [[], [{}, {"id": 5}]])
def test_an_engine_without_a_model_is_refused(engine, connect, models):
    engine.models = models
    with pytest.raises(EngineRefused, match="lists no model"):
        connect()


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (fails(200, "<html>a proxy</html>"), EngineFailed),
        (fails(200, {"data": "none"}), EngineFailed),
        (fails(404, {"error": {"message": "no"}}), EngineRefused),
        (fails(500, "oops"), EngineFailed),
        (hangs(), EngineUnreachable),
    ],
)
def test_what_is_no_engine_is_told_at_start(engine, connect, act, kind):
    engine.model_act = act
    with pytest.raises(kind, match=r"base-url|engine"):
        connect()


def test_an_engine_that_is_loading_is_waited_for(engine, connect):
    engine.model_act = fails(503, {"error": {"message": "Loading model", "code": 503}})
    timer = threading.Timer(0.5, lambda: setattr(engine, "model_act", None))
    timer.start()
    assert connect().info.name == "scripted"
    timer.join()


def test_nobody_at_the_address_is_told_at_start(open_port):
    with pytest.raises(EngineUnreachable, match="--base-url"):
        OpenAIBackend(RemoteOptions(f"http://127.0.0.1:{open_port}/v1"), times=TIMES)
    assert not [t for t in threading.enumerate() if t.name == "remote-engine"]


# Stopping.


@pytest.mark.parametrize("act", [trickles("word ", 0.02), hangs(chunk("word ")), hangs()])
def test_cancel_closes_the_connection_and_ends_with_a_last_event(engine, connect, act):
    engine.acts.append(act)
    backend, cancel = connect(), threading.Event()

    def leave() -> None:
        wait_until(lambda: engine.bodies)
        time.sleep(0.1)
        cancel.set()

    leaver = threading.Thread(target=leave)
    leaver.start()
    events = list(backend.stream(HI, cancel))
    leaver.join()
    assert events[-1].finish_reason == "cancelled"
    assert engine.gone.wait(5)


def test_closing_the_iterator_closes_the_connection(engine, connect):
    engine.acts.append(trickles("word ", 0.02))
    stream = connect().stream(HI, threading.Event())
    next(event for event in stream if event.text)
    stream.close()
    assert engine.gone.wait(5)


def test_close_ends_running_replies_and_refuses_new_ones(engine, connect):
    backend = connect()
    engine.acts.append(trickles("word ", 0.02))
    stream = backend.stream(HI, threading.Event())
    next(event for event in stream if event.text)
    backend.close()
    with pytest.raises(BackendNotReady):
        list(stream)
    with pytest.raises(BackendNotReady):
        take(backend)
    assert engine.gone.wait(5)


# Faults.


def faulty(backend: OpenAIBackend, kind: type[QwenError]) -> tuple[str, QwenError]:
    """Take a reply that fails; return the text before the fault, and the fault."""
    said = ""
    with pytest.raises(kind) as failed:
        for event in backend.stream(HI, threading.Event()):
            said += event.text
    assert type(failed.value) is kind
    return said, failed.value


@pytest.mark.parametrize(
    "act",
    [
        says(chunk("half"), done=False),
        says(chunk("half"), "{garbage"),
        says(chunk("half"), {"choices": "none"}),
        says(chunk("half"), {"error": {"message": "boom", "code": 500}}),
        says(chunk("half")),
        says(chunk("half"), chunk(finish="abort")),  # as vLLM and SGLang when they are stopped
    ],
)
def test_a_reply_that_breaks_is_an_error_behind_its_text_and_not_asked_again(engine, connect, act):
    engine.acts.append(act)
    backend = connect()
    assert faulty(backend, EngineFailed)[0] == "half"
    assert len(engine.bodies) == 1
    assert text(take(backend)) == "Hello there"


def test_a_reply_that_falls_silent_is_given_up(engine, connect):
    engine.acts.append(hangs(chunk("half")))
    began = time.monotonic()
    said, error = faulty(connect(), EngineUnreachable)
    assert said == "half" and "1 seconds" in str(error)
    assert time.monotonic() - began < 10
    assert engine.gone.wait(5)


def test_an_engine_that_never_answers_is_given_up_once(engine, connect):
    engine.acts.append(hangs())
    faulty(connect(), EngineUnreachable)
    assert len(engine.bodies) == 1
    assert engine.gone.wait(5)


def test_a_slow_reply_whose_pieces_keep_coming_is_whole(engine, connect):
    def act(handler):
        handler.begin()
        for _ in range(8):
            time.sleep(0.3)  # together longer than `first` and `silence`
            handler.event(chunk("x"))
        handler.event(chunk(finish="stop"))

    engine.acts.append(act)
    assert text(take(connect())) == "x" * 8


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_fault_before_the_reply_is_tried_again(engine, connect, status):
    engine.acts += [fails(status, {"error": {"message": "busy"}}), says(done=False)]
    assert text(take(connect())) == "Hello there"
    assert len(engine.bodies) == 3


@pytest.mark.parametrize(("status", "kind"), [(429, EngineBusy), (500, EngineFailed)])
def test_a_fault_that_stays_is_told_after_four_attempts(engine, connect, status, kind):
    engine.acts += [fails(status, "oops")] * 10
    faulty(connect(), kind)
    assert len(engine.bodies) == 4


def test_an_engine_that_asks_for_a_long_pause_is_not_waited_for(engine, connect):
    engine.acts += [fails(429, "", retry_after="3600")] * 2
    faulty(connect(), EngineBusy)
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 422])
def test_a_refusal_is_not_tried_again(engine, connect, status):
    engine.acts += [fails(status, {"error": {"message": "no such thing"}})] * 2
    with pytest.raises(QwenError):
        take(connect())
    assert len(engine.bodies) == 1


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 4096 tokens. However, you requested 9"},
        {"message": "x", "code": "context_length_exceeded"},
        {"message": "The input (900 tokens) is longer than the model's context length (512)."},
        {"type": "exceed_context_size_error", "n_prompt_tokens": 3030, "n_ctx": 1024},
        *({"message": message} for message in OVER_LONG),
    ],
)
@pytest.mark.parametrize("status", [400, 500])
def test_over_long_prompts_are_our_error_and_not_asked_again(engine, connect, status, error):
    engine.acts.append(fails(status, {"error": error}))
    _, told = faulty(connect(), PromptTooLong)
    assert "Shorten" in str(told)
    assert "n_ctx" not in error or "3,030 tokens of 1,024" in str(told)
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("message", OVER_LONG)
def test_a_prompt_that_an_engine_finds_too_long_in_its_stream_is_our_error(
    engine, connect, message
):
    engine.acts.append(says({"error": {"message": message, "code": 500}}))
    faulty(connect(), PromptTooLong)
    assert len(engine.bodies) == 1


def test_a_context_that_fills_up_in_the_middle_of_a_reply_keeps_its_text(engine, connect):
    full = {"error": {"message": "Context size has been exceeded.", "code": 500}}
    engine.acts.append(says(chunk("half"), full))
    said, told = faulty(connect(), EngineFailed)
    assert said == "half" and "context is full" in str(told)


@pytest.mark.parametrize("message", ["CUDA error: invalid device context", "lost the GL context"])
def test_a_fault_of_a_gpus_context_is_no_long_prompt(engine, connect, message):
    engine.acts += [fails(500, {"error": {"message": message}})] * 4
    faulty(connect(), EngineFailed)


def test_another_refusal_says_what_the_engine_said(engine, connect):
    engine.acts.append(fails(400, {"error": {"message": "tools need --enable-auto-tool-choice"}}))
    with pytest.raises(InvalidRequest, match="enable-auto-tool-choice"):
        take(connect())


def test_the_engines_words_and_the_users_are_not_logged(engine, connect, caplog):
    caplog.set_level(logging.INFO)
    engine.acts.append(fails(400, {"error": {"message": "bad: my secret diary"}}))
    with pytest.raises(InvalidRequest):
        take(connect(), ChatRequest(messages=(Message("user", "my secret diary"),)))
    assert "diary" not in caplog.text


def test_an_engine_that_went_away_and_came_back_with_another_model_answers(open_port):
    with ScriptedEngine(open_port) as first:
        backend = OpenAIBackend(RemoteOptions(first.url), times=TIMES)
        take(backend)
    try:
        faulty(backend, EngineUnreachable)
        began = time.monotonic()
        assert backend.count_tokens(HI).prompt > 0
        assert time.monotonic() - began < 5
        with ScriptedEngine(open_port) as second:
            second.models = [{"id": "newer", "max_model_len": 512, "owned_by": "vllm"}]
            assert text(take(backend)) == "Hello there"
            assert second.bodies[0]["model"] == "newer"
            assert backend.info.name == "newer"
    finally:
        backend.close()


def test_a_model_that_was_exchanged_is_found_again(engine, connect):
    backend = connect()
    engine.models = [{"id": "newer"}]
    engine.acts.append(fails(404, {"error": {"message": "The model `scripted` does not exist."}}))
    assert text(take(backend)) == "Hello there"
    assert engine.bodies[1]["model"] == "newer"


# Counting.


def conversation(turns: int, words: int) -> ChatRequest:
    pair = (Message("user", "word " * words), Message("assistant", "word " * words))
    return ChatRequest(messages=(Message("system", "s"), *pair * turns, Message("user", "now")))


def test_the_engine_counts_each_text_once(engine, connect):
    asked: list[str] = []
    engine.tokens = lambda given: asked.append(given) or len(given.split())
    backend = connect()
    usage = backend.count_tokens(conversation(2, 10))
    assert (usage.system, usage.history, usage.query) == (6, 2 * (15 + 15), 1 + 8)
    backend.count_tokens(conversation(2, 10))
    assert sorted(asked) == sorted(["s", "word " * 10, "now"])


def test_without_a_count_of_the_engine_it_is_estimated(connect):
    usage = connect().count_tokens(conversation(1, 100))
    assert usage.is_estimate
    assert 200 < usage.prompt < 400


def test_the_oldest_turns_drop_out_and_the_reply_has_room(engine, connect):
    engine.tokens = lambda given: len(given.split())
    backend = connect()
    request = conversation(30, 100)
    usage = backend.count_tokens(request)
    assert usage.dropped and len(usage.dropped) % 2 == 0
    events = take(backend, request)
    sent = engine.bodies[0]
    assert events[0].context is not None and events[0].context.dropped == usage.dropped
    assert [m["role"] for m in sent["messages"][:2]] == ["system", "user"]
    assert len(sent["messages"]) == len(request.messages) - len(usage.dropped)
    assert usage.prompt + sent["max_tokens"] <= 4096


@pytest.mark.parametrize("is_old", [True, False])
def test_arguments_of_calls_count_like_text(connect, is_old):
    backend = connect()

    def usage(arguments: str):
        call = Message("assistant", "", tool_calls=(ToolCall("c1", "store", arguments),))
        turn = (Message("user", "go"), call, Message("tool", "ok", tool_call_id="c1"))
        return backend.count_tokens(ChatRequest(messages=(*turn, *HI.messages * is_old)))

    short, long = usage("{}"), usage('{"text": "' + "word " * 1000 + '"}')
    grown = (long.history - short.history) if is_old else (long.query - short.query)
    assert 1000 < grown < 2000


def test_a_text_that_can_never_fit_is_refused_without_sending_it(engine, connect):
    with pytest.raises(MessageTooLong):
        take(connect(), ChatRequest(messages=(Message("user", "x" * 100_000),)))
    assert engine.bodies == []


def test_a_slow_count_is_given_up_and_not_asked_for_at_once_again(engine, connect):
    asked: list[str] = []
    engine.tokens = lambda given: asked.append(given) or time.sleep(1) or 1
    backend = connect()
    assert backend.count_tokens(HI).prompt > 0
    assert backend.count_tokens(conversation(2, 3)).prompt > 0
    assert asked == ["hi"]


def test_no_thread_or_connection_is_left_behind(engine):
    backend = OpenAIBackend(RemoteOptions(engine.url), times=TIMES)
    for _ in range(20):
        stream = backend.stream(HI, threading.Event())
        next(stream)
        next(stream)
        stream.close()
    backend.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "remote-engine"])


def test_usage_after_the_end_is_still_read(engine, connect):
    engine.acts.append(says(chunk("a"), chunk(finish="stop"), USAGE))
    assert take(connect())[-1].usage == Usage(11, 2)
