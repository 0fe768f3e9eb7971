"""The API's routes over a scripted backend on a real socket."""

import json
import threading

import pytest
from api_server import HELLO, ScriptedBackend
from fake_backend import FakeBackend

from qwen.backend import BackendInfo
from qwen.errors import (
    BackendFailed,
    BackendNotReady,
    CheckpointDamaged,
    OutOfMemory,
    PromptTooLong,
    TooManyRequests,
)
from qwen.messages import ChatRequest, Message, StreamEvent, TokenLogprobs, ToolCallDelta
from webapp.activity import Activity

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = (
    StreamEvent(tool_calls=(ToolCallDelta(0, id="call_1", name="weather"),)),
    StreamEvent(tool_calls=(ToolCallDelta(0, arguments='{"city": '),)),
    StreamEvent(tool_calls=(ToolCallDelta(0, arguments='"Paris"}'),)),
)


def events_of(answer):
    """The JSON objects of an event stream, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in answer.text.split("\n") if line[:5] == "data:"]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def error_of(answer):
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


def test_reply_has_openais_shape_with_usage_and_reason(serve_api):
    answer = serve_api(FakeBackend("alpha beta")).chat(model="Qwen")
    body = answer.json()
    assert answer.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "Fake")
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"]["content"] == "alpha beta"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_two_replies_have_two_ids(serve_api):
    api = serve_api(FakeBackend())
    assert api.chat().json()["id"] != api.chat().json()["id"]


def test_reply_that_is_cut_says_length(serve_api):
    body = serve_api(FakeBackend("a b c")).chat(max_tokens=2).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_streamed_chunks_join_to_the_reply_with_one_id_and_usage_last(serve_api):
    api = serve_api(FakeBackend("alpha beta gamma"))
    answer = api.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(answer)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "alpha beta gamma"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 4


def test_without_include_usage_no_chunk_tells_any(serve_api):
    chunks = events_of(serve_api(FakeBackend("alpha")).chat(stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_every_streamed_delta_has_text_that_a_script_of_2023_can_print(serve_api):
    chunks = events_of(serve_api(FakeBackend("alpha beta")).chat(stream=True, stop=[]))
    printed = "".join(str(chunk["choices"][0]["delta"].get("content")) for chunk in chunks)
    assert printed == "alpha beta"


def test_line_ends_within_a_reply_do_not_cut_an_event(serve_api):
    text = "a\u2028b\u0085c\r\nd"
    answer = serve_api(FakeBackend(text)).chat(stream=True)
    assert "\u2028" not in answer.text
    told = "".join(c["choices"][0]["delta"]["content"] for c in events_of(answer))
    assert told == text


def test_raw_completion_streams_and_does_not(serve_api):
    api = serve_api(backend := FakeBackend("alpha beta"))
    body = api.client.post("/v1/completions", json={"prompt": "once upon"}).json()
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "alpha beta")
    assert body["usage"]["prompt_tokens"] == 2
    answer = api.client.post("/v1/completions", json={"prompt": ["once"], "stream": True})
    assert "".join(c["choices"][0]["text"] for c in events_of(answer)) == "alpha beta"
    assert [request.raw_prompt for request in backend.requests] == ["once upon", "once"]


def test_tool_calls_are_joined_in_a_reply_and_streamed_in_parts(serve_api):
    api = serve_api(ScriptedBackend(StreamEvent(text="Well"), *CALL, finish="tool_calls"))
    choice = api.chat(tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well"
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": function}
    ]
    chunks = events_of(api.chat(tools=[TOOL], stream=True))
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", ())]
    assert parts[0]["id"] == "call_1" and parts[0]["function"]["name"] == "weather"
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city": "Paris"}'
    assert all("id" not in part for part in parts[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_call_without_text_has_null_content(serve_api):
    api = serve_api(ScriptedBackend(*CALL, finish="tool_calls"))
    assert api.chat(tools=[TOOL]).json()["choices"][0]["message"]["content"] is None


def test_functions_get_the_older_form_back(serve_api):
    api = serve_api(ScriptedBackend(*CALL, finish="tool_calls"))
    choice = api.chat(functions=[{"name": "weather"}]).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "weather"
    assert "tool_calls" not in choice["message"]
    chunks = events_of(api.chat(functions=[{"name": "weather"}], stream=True))
    parts = [c["choices"][0]["delta"]["function_call"] for c in chunks[1:-1]]
    assert parts[0]["name"] == "weather"
    assert "".join(part["arguments"] for part in parts) == '{"city": "Paris"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


LOGGED = (
    StreamEvent(
        text="é",
        token_ids=(1, 2),
        logprobs=(
            TokenLogprobs(b"\xc3", -0.5, ((b"\xc3", -0.5), (b"x", -1.0))),
            TokenLogprobs(b"\xa9", float("-inf"), ((b"\xa9", -0.1), (b"y", -2.0))),
        ),
    ),
    StreamEvent(text="b", token_ids=(3,), logprobs=(TokenLogprobs(b"b", -0.25, ((b"b", -0.25),)),)),
)


def test_chat_logprobs_tell_token_bytes_and_alternatives(serve_api):
    api = serve_api(backend := ScriptedBackend(*LOGGED))
    content = api.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert backend.requests[0].params.top_logprobs == 2
    assert [one["bytes"] for one in content] == [[0xC3], [0xA9], [98]]
    assert [one["logprob"] for one in content] == [-0.5, -9999.0, -0.25]
    assert content[0]["token"] == "\ufffd"
    assert content[0]["top_logprobs"][1] == {"token": "x", "logprob": -1.0, "bytes": [120]}
    chunks = events_of(api.chat(logprobs=True, stream=True))
    told = [c["choices"][0]["logprobs"] for c in chunks]
    assert [len(one["content"]) for one in told if one] == [2, 1]


def test_completion_logprobs_tell_offsets_in_characters(serve_api):
    api = serve_api(ScriptedBackend(*LOGGED))
    ask = {"prompt": "x", "logprobs": 2}
    told = api.client.post("/v1/completions", json=ask).json()["choices"][0]["logprobs"]
    assert told["tokens"] == ["\ufffd", "\ufffd", "b"]
    assert told["token_logprobs"] == [-0.5, -9999.0, -0.25]
    assert told["top_logprobs"][0] == {"\ufffd": -0.5, "x": -1.0}
    assert told["text_offset"] == [0, 0, 1]
    chunks = events_of(api.client.post("/v1/completions", json=ask | {"stream": True}))
    offsets = [c["choices"][0]["logprobs"]["text_offset"] for c in chunks[:-1]]
    assert offsets == [[0, 0], [1]]


def test_models_are_listed_and_described(serve_api):
    api = serve_api(FakeBackend())
    assert [card["id"] for card in api.client.get("/v1/models").json()["data"]] == ["Fake"]
    assert api.client.get("/v1/models/Qwen").json()["id"] == "Fake"
    answer = api.client.get("/v1/models/other")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("name", ["Fake", "Qwen"])
def test_model_may_be_ours_or_qwen(serve_api, name):
    assert serve_api(FakeBackend()).chat(model=name).status_code == 200


def test_other_model_is_refused_by_name(serve_api):
    answer = serve_api(backend := FakeBackend()).chat(model="gpt-4")
    assert (answer.status_code, error_of(answer)["param"]) == (404, "model")
    assert not backend.requests


REFUSED = {
    "no_such_field": (1, "no_such_field"),
    "n": (2, "n"),
    "presence_penalty": (0.5, "presence_penalty"),
    "frequency_penalty": (-1, "frequency_penalty"),
    "logit_bias": ({"5": 1}, "logit_bias"),
    "response_format": ({"type": "json_object"}, "response_format.type"),
    "temperature": ("hot", "temperature"),
    "top_p": (1.5, "top_p"),
    "top_k": (1.5, "top_k"),
    "seed": (-1, "seed"),
    "max_tokens": (0, "max_tokens"),
    "stop": ([""], "stop[0]"),
    "top_logprobs": (2, "top_logprobs"),
    "stream_options": ({"include_usage": True}, "stream_options"),
    "tool_choice": ("required", "tool_choice"),
    "function_call": ({"name": "f"}, "function_call"),
    "tools": ([TOOL, TOOL], "tools"),
    "messages": ([], "messages"),
    "stream": ("yes", "stream"),
    "audio": ({}, "audio"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_field_is_refused_by_name(serve_api, field):
    value, param = REFUSED[field]
    answer = serve_api(backend := FakeBackend()).chat(**{field: value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert param in error_of(answer)["message"]
    assert not backend.requests


WITHOUT_EFFECT = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "parallel_tool_calls": False,
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": None,
}


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_field_without_effect_is_accepted(serve_api, field):
    assert serve_api(FakeBackend()).chat(**{field: WITHOUT_EFFECT[field]}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "secret": 1}], "messages[0].secret"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages[0].name"),
        ("hello", "messages"),
    ],
)
def test_wrong_message_is_refused_by_its_place(serve_api, messages, param):
    answer = serve_api(backend := FakeBackend()).chat(messages=messages)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert not backend.requests


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"messages": "\\ud800"}']
)
def test_body_that_is_no_object_is_refused(serve_api, body):
    headers = {"content-type": "application/json"}
    api = serve_api(FakeBackend())
    answer = api.client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "half \ud83d"}]},
        {"functions": [{"name": "f", "parameters": {"\ud800": 1}}]},
        {"stop": ["\udfff"]},
        {"model": "\ud800"},
        {"user": "\ud800"},
    ],
)
def test_half_a_character_never_fails_the_server(serve_api, fields):
    body = json.dumps(HELLO | fields)
    api = serve_api(FakeBackend())
    headers = {"content-type": "application/json"}
    answer = api.client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200 if "user" in fields else answer.status_code in (400, 404)


def test_deep_schema_is_refused(serve_api):
    schema: dict = {}
    for _ in range(100):
        schema = {"properties": schema}
    answer = serve_api(FakeBackend()).chat(functions=[{"name": "f", "parameters": schema}])
    assert (answer.status_code, "deep" in error_of(answer)["message"]) == (400, True)


def test_unknown_path_and_method_are_answered_in_openais_shape(serve_api):
    api = serve_api(FakeBackend())
    assert error_of(api.client.get("/v1/nothing"))["code"] == "not_found"
    assert api.client.get("/v1/nothing").status_code == 404
    answer = api.client.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert error_of(answer)["code"] == "method_not_allowed"


FAULTS = [
    (PromptTooLong("Shorten it."), 400, "context_length_exceeded"),
    (TooManyRequests("Later.", retry_after=2.4, position=9), 429, "rate_limit_exceeded"),
    (OutOfMemory("Shorten it."), 503, "out_of_memory"),
    (CheckpointDamaged("Fetch it."), 503, "model_failed"),
    (BackendNotReady("Wait."), 503, "not_ready"),
    (BackendFailed("See the log."), 500, "internal_error"),
    (RuntimeError("secret detail"), 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status", "code"), FAULTS)
def test_fault_before_the_first_word_has_its_status(serve_api, fault, status, code, stream):
    answer = serve_api(FakeBackend("a b", fault=fault)).chat(stream=stream)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert "secret" not in answer.text
    if status == 429:
        assert answer.headers["retry-after"] == "3"


def test_fault_after_the_first_word_is_told_within_the_stream(serve_api):
    api = serve_api(FakeBackend("a b c", fault=BackendFailed("See the log."), fault_after=1))
    *chunks, last = events_of(api.chat(stream=True))
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == "a "
    assert last["error"]["message"] == "See the log."


def test_base_model_completes_text(serve_api):
    info = BackendInfo(name="Base", context_length=100, is_chat=False)
    api = serve_api(FakeBackend("alpha", info=info))
    answer = api.client.post("/v1/completions", json={"prompt": "x"})
    assert answer.json()["choices"][0]["text"] == "alpha"


def test_a_balancer_may_ask_for_healths_status_alone(serve_api):
    api = serve_api(FakeBackend(), keys=("k",))
    answer = api.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
    api.activity.stop()
    assert api.client.head("/health").status_code == 503


def test_health_tells_when_replies_can_be_had(serve_api):
    api = serve_api(FakeBackend())
    assert api.client.get("/health").json() == {"status": "ok"}
    api.activity.stop()
    answer = api.client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
    assert error_of(api.chat())["code"] == "not_ready"


def test_reply_that_begins_with_thoughts_has_begun():
    watched = (activity := Activity()).watch(ScriptedBackend(StreamEvent(reasoning="hm")))
    stream = watched.stream(ChatRequest((Message("user", "hi"),)), threading.Event())
    while not next(stream).reasoning:
        pass
    figure = activity.registry.get_sample_value
    assert (figure("qwen_replies_queued"), figure("qwen_replies_running")) == (0, 1)
    stream.close()
    assert figure("qwen_replies_running") == 0


def test_metrics_count_requests_tokens_and_times(serve_api):
    api = serve_api(FakeBackend("a b c"))
    api.chat()
    api.chat(n=2)
    assert api.figure("qwen_completion_tokens_total") == 3
    assert api.figure("qwen_prompt_tokens_total") == 1
    assert api.figure("qwen_time_to_first_token_seconds_count") == 1
    assert api.figure("qwen_replies_total") == 1
    assert (api.figure("qwen_replies_running"), api.figure("qwen_replies_queued")) == (0, 0)
    lines = api.client.get("/metrics").text
    assert 'qwen_http_requests_total{path="/v1/chat/completions",status="400"} 1.0' in lines


def test_ten_thousand_lines_are_taken_as_they_are(serve_api):
    text = "\n".join(f"  line {n}\t<|im_end|>" for n in range(10_000))
    api = serve_api(backend := FakeBackend("fine", limit=10**6))
    answer = api.chat(messages=[{"role": "user", "content": text}])
    assert answer.status_code == 200
    assert backend.requests[0].messages[0].content == text


def test_wrong_role_is_answered_with_the_right_ones_and_not_said_back(serve_api):
    answer = serve_api(FakeBackend()).chat(messages=[{"role": "king", "content": "x"}])
    told = error_of(answer)["message"]
    assert "'assistant'" in told and "king" not in told


@pytest.mark.parametrize("body", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_json_that_no_program_reads_is_refused_with_what_to_do(serve_api, body):
    headers = {"content-type": "application/json"}
    answer = serve_api(FakeBackend()).client.post(
        "/v1/chat/completions", content=body, headers=headers
    )
    assert answer.status_code == 400
    assert "plainer JSON" in error_of(answer)["message"]
