"""The official `openai` client against the API and the embedded model: every feature it has."""

import json
import socket
import threading

import httpx
import openai
import pytest
from api_server import ApiServer, api_settings
from fake_backend import wait_until

pytestmark = pytest.mark.integration

COUNT = [{"role": "user", "content": "Count from 1 to 20, separated by commas."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France? One short sentence."}]
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city, e.g. San Francisco"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location"],
    },
}
ASK_WEATHER = [{"role": "user", "content": "What is the weather like in Boston now?"}]

#: So small a model needs to be told that it is to answer now.
FOLLOW_UP = {"role": "user", "content": "So how warm is it there? One sentence."}


@pytest.fixture(scope="module")
def api(embedded_backend):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ApiServer(embedded_backend, port, api_settings(port, keys=("test-key",)))
    server.client.headers["authorization"] = "Bearer test-key"
    yield server
    server.close(keep_backend=True)


@pytest.fixture(scope="module")
def client(api):
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="test-key", max_retries=0) as client:
        yield client


def chat(client, messages=CAPITAL, **fields):
    fields = {"model": "Qwen", "temperature": 0, "max_tokens": 32} | fields
    return client.chat.completions.create(messages=messages, **fields)


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_wrong_key_is_an_authentication_error(api):
    with (
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_listed_model_can_be_asked_and_described(client):
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    reply = chat(client, model=name)
    assert reply.model == name
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_other_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-4")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_cut_reply_says_length_and_counts_its_tokens(client, field):
    limit = {"max_tokens": openai.omit} | {field: 8}
    reply = chat(client, COUNT, **limit)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8


def test_streamed_reply_is_the_whole_reply_and_ends_with_usage(client):
    whole = chat(client)
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize("stop", ["5", ["nothing of the kind", "5"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_reply_and_is_not_shown(client, stop, stream):
    reply = chat(client, COUNT, stop=stop, stream=stream, max_tokens=64)
    text = text_of(reply) if stream else reply.choices[0].message.content
    assert "4" in text and "5" not in text
    if not stream:
        assert reply.choices[0].finish_reason == "stop"


def test_same_seed_same_reply(client):
    sampled = {"temperature": 1.5, "top_p": 1, "extra_body": {"top_k": 0}, "max_tokens": 12}
    first, same, other = (
        chat(client, seed=seed, **sampled).choices[0].message.content for seed in (3, 3, 4)
    )
    assert first == same != other


def test_sampling_settings_have_effect(client):
    hot = {"temperature": 2, "top_p": 1, "seed": 1, "max_tokens": 8}
    calm = chat(client, max_tokens=8).choices[0].message.content
    for narrow in ({"top_k": 1}, {"top_k": 0}):
        reply = chat(client, **hot, extra_body=narrow | {"repetition_penalty": 1.05})
        assert (reply.choices[0].message.content == calm) == (narrow["top_k"] == 1)


def test_logprobs_are_those_of_the_shown_tokens(client):
    reply = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    told = b"".join(bytes(one.bytes) for one in content).decode()
    assert told == reply.choices[0].message.content
    for one in content:
        assert one.logprob <= 0 and len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.logprob - 1e-6
    streamed = [
        one.token
        for chunk in chat(client, logprobs=True, max_tokens=6, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == [one.token for one in content]


def test_completion_continues_raw_text_with_logprobs(client):
    ask = {"model": "Qwen", "prompt": "def add(a, b):\n    return", "max_tokens": 4}
    reply = client.completions.create(**ask, temperature=0, logprobs=2)
    assert "a" in reply.choices[0].text
    told = reply.choices[0].logprobs
    assert "".join(told.tokens) == reply.choices[0].text
    assert told.text_offset[0] == 0 and len(told.top_logprobs[0]) == 2
    stream = client.completions.create(**ask, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text


@pytest.mark.parametrize("field", ["no_such_field", "n", "presence_penalty", "logit_bias"])
def test_unsupported_field_is_a_bad_request_that_names_it(client, field):
    value = {"logit_bias": {"5": 1}}.get(field, 2)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={field: value})
    assert refused.value.param == field


def test_json_mode_is_refused_by_name_and_text_accepted(client):
    with pytest.raises(openai.BadRequestError, match="JSON"):
        chat(client, response_format={"type": "json_object"})
    assert chat(client, response_format={"type": "text"}, max_tokens=4).choices


def test_too_long_a_prompt_is_named(client):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, [{"role": "user", "content": "word " * 100_000}], stream=True)
    assert refused.value.code == "context_length_exceeded"


def test_fields_without_effect_are_accepted(client):
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "max_tokens": 2}
    assert chat(client, parallel_tool_calls=False, **fields).choices


def test_closed_stream_frees_its_slot(client, api):
    stream = chat(client, COUNT, stream=True, max_tokens=4000)
    for _ in zip(range(3), stream, strict=False):
        pass
    assert api.activity.num_open == 1
    stream.close()
    wait_until(lambda: not api.activity.num_open, seconds=5)


def test_two_clients_are_answered_at_once(client):
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(chat(client, COUNT, max_tokens=16)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({reply.choices[0].message.content for reply in replies}) == 1


def test_scripts_of_2023_work_with_todays_client(client, capsys):
    """The reference's two snippets, but for `openai.ChatCompletion`, which the client renamed."""
    for chunk in client.chat.completions.create(
        model="Qwen", messages=[{"role": "user", "content": "你好"}], stream=True
    ):
        if hasattr(chunk.choices[0].delta, "content"):
            print(chunk.choices[0].delta.content, end="", flush=True)
    printed = capsys.readouterr().out
    assert printed and "None" not in printed
    response = client.chat.completions.create(
        model="Qwen", messages=[{"role": "user", "content": "你好"}], stream=False, stop=[]
    )
    assert response.choices[0].message.content


def test_required_tool_is_called_and_its_result_is_read(client):
    tools = [{"type": "function", "function": WEATHER}]
    reply = chat(client, ASK_WEATHER, tools=tools, tool_choice="required", max_tokens=128)
    assert reply.choices[0].finish_reason == "tool_calls"
    (call, *_) = reply.choices[0].message.tool_calls
    assert call.function.name == WEATHER["name"]
    assert "Boston" in json.loads(call.function.arguments)["location"]
    history = [
        *ASK_WEATHER,
        reply.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 22}'},
        FOLLOW_UP,
    ]
    answer = chat(client, history, tools=tools, tool_choice="none")
    assert "22" in answer.choices[0].message.content


def test_tool_call_is_streamed(client):
    tools = [{"type": "function", "function": WEATHER}]
    stream = chat(
        client, ASK_WEATHER, tools=tools, tool_choice="required", max_tokens=128, stream=True
    )
    chunks = list(stream)
    parts = [p for chunk in chunks for p in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == WEATHER["name"] and parts[0].id
    arguments = "".join(part.function.arguments or "" for part in parts if part.index == 0)
    assert "Boston" in json.loads(arguments)["location"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_functions_of_2023_are_called_and_their_result_is_read(client):
    forced = {"functions": [WEATHER], "function_call": {"name": WEATHER["name"]}}
    reply = chat(client, ASK_WEATHER, **forced, max_tokens=128)
    assert reply.choices[0].finish_reason == "function_call"
    call = reply.choices[0].message.function_call
    assert "Boston" in json.loads(call.arguments)["location"]
    history = [
        *ASK_WEATHER,
        {"role": "assistant", "content": None, "function_call": call.model_dump()},
        {"role": "function", "name": call.name, "content": '{"temperature": 22}'},
        FOLLOW_UP,
    ]
    answer = chat(client, history, functions=[WEATHER], function_call="none")
    assert "22" in answer.choices[0].message.content


def test_figures_of_the_real_model_are_counted(api):
    assert api.figure("qwen_completion_tokens_total") > 0
    assert httpx.get(f"{api.url}/health").json() == {"status": "ok"}
