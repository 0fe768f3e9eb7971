"""The API's routes over a scripted backend on a real socket."""

import json

import pytest
from api_server import HELLO, ScriptedBackend
from fake_backend import FakeBackend

from qwen.backend import BackendInfo
from qwen.errors import BackendFailed, OutOfMemory, PromptTooLong, TooManyRequests
from qwen.messages import StreamEvent, TokenLogprobs, ToolCallDelta

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def events_of(answer):
    """The JSON objects of an event stream, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line[:5] == "data:"]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def error_of(answer):
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


def test_reply_has_openai_shape_with_usage_and_reason(serve_api):
    api = serve_api(FakeBackend("alpha beta"))
    answer = api.chat(model="Qwen")
    body = answer.json()
    assert answer.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "Fake")
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"]["content"] == "alpha beta"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


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
