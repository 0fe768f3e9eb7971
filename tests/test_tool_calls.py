"""Tool calls through `LocalBackend`: a scripted model, and the embedded one in both layouts."""

import json
import threading

import pytest
from tiny_model import CHATML_TEMPLATE, TOOL_TEMPLATE, build_byte_tokenizer

from qwen.backend import BackendInfo
from qwen.engine import EngineStep
from qwen.errors import InvalidRequest
from qwen.load_options import LoadOptions
from qwen.local import LocalBackend, load_backend
from qwen.messages import ChatRequest, Message, SamplingParams, Tool, ToolCall
from qwen.tokenizer import build_chat_format, build_text_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "Tells the weather.", CITY)
TAGGED = '\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n'
REACT = 'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Rome"}\nObservation: hot'


class ScriptedEngine:
    """Says given token ids, whatever it is asked, and counts how many were taken."""

    def __init__(self, tokens):
        self.tokens, self.taken = tokens, 0

    def submit(self, ids, params, *, cancel):
        for token_id in self.tokens[: params.max_new_tokens]:
            self.taken += 1
            yield EngineStep(token_id=token_id)
        is_cut = len(self.tokens) > params.max_new_tokens
        yield EngineStep(finish_reason="length" if is_cut else "stop")


def scripted(*parts, template):
    """A backend whose model says texts and, where they are ints, token ids."""
    tokenizer = build_byte_tokenizer(template)
    texts = build_text_tokenizer(tokenizer)
    ids = [i for p in parts for i in ([p] if isinstance(p, int) else texts.encode_text(p))]
    return LocalBackend(
        ScriptedEngine(ids),
        texts,
        chat_format=build_chat_format(tokenizer),
        info=BackendInfo(name="Scripted", context_length=4096),
    )


def control_id(text):
    return build_text_tokenizer(build_byte_tokenizer()).control_ids[text]


def run(backend, request):
    return list(backend.stream(request, threading.Event()))


def tagged(*before, after=""):
    parts = [*before, control_id("<tool_call>"), TAGGED, control_id("</tool_call>"), after]
    return scripted(*parts, template=TOOL_TEMPLATE)


def react(reply=REACT):
    return scripted(reply, template=CHATML_TEMPLATE)


def ask(*later, tools=(WEATHER,), choice="auto", **options):
    params = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 200} | options
    return ChatRequest(
        messages=(Message("user", "How is it in Rome?"), *later),
        tools=tools,
        tool_choice=choice,
        params=SamplingParams(**params),
    )


def text_of(events):
    return "".join(event.text for event in events)


def calls_of(events):
    """Join the parts of calls: their ids, names and arguments."""
    calls = []
    for delta in (delta for event in events for delta in event.tool_calls):
        if delta.id:
            assert delta.index == len(calls) and delta.name
            calls.append(ToolCall(delta.id, delta.name, ""))
        last = calls.pop()
        calls.append(ToolCall(last.id, last.name, last.arguments + delta.arguments))
    return calls


@pytest.mark.parametrize("backend", [tagged("I look."), react()], ids=["template", "react"])
def test_call_is_streamed_in_parts_and_ends_the_reply(backend):
    events = run(backend, ask())
    assert text_of(events) == "I look."
    (call,) = calls_of(events)
    assert call.id.startswith("call_")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Rome"})
    assert len([event for event in events if event.tool_calls]) > 5
    assert events[-1].finish_reason == "tool_calls"


def test_several_calls_have_an_index_and_an_id_each():
    call = (control_id("<tool_call>"), TAGGED, control_id("</tool_call>"))
    events = run(scripted(*call, "\n", *call, template=TOOL_TEMPLATE), ask())
    calls = calls_of(events)
    assert len(calls) == 2 and calls[0].id != calls[1].id
    assert {d.index for event in events for d in event.tool_calls} == {0, 1}


def test_tokens_of_calls_are_counted_and_told():
    events = run(tagged(), ask())
    told = [token_id for event in events for token_id in event.token_ids]
    assert len(told) == events[-1].usage.completion_tokens > 10


@pytest.mark.parametrize("backend", [tagged(), react()], ids=["template", "react"])
def test_reply_cut_within_a_call_says_so(backend):
    size = len(backend._engine.tokens) - 14
    events = run(backend, ask(max_new_tokens=size))
    assert calls_of(events)[0].arguments.startswith('{"c')
    assert events[-1].finish_reason == "length"


def test_call_of_a_react_reply_ends_generation_at_the_observation():
    backend = react()
    run(backend, ask())
    engine = backend._engine
    assert engine.taken == len(engine.tokens) - len(" hot")


def test_reply_without_a_call_is_text_and_ends_as_ever():
    for template in (TOOL_TEMPLATE, CHATML_TEMPLATE):
        events = run(scripted("It is < hot.\n", template=template), ask())
        assert (text_of(events), events[-1].finish_reason) == ("It is < hot.\n", "stop")


def test_answer_of_a_react_reply_is_shown_without_its_thought():
    events = run(react("Thought: I know.\nFinal Answer: Hot."), ask())
    assert text_of(events) == "Hot."


@pytest.mark.parametrize("options", [{"choice": "none"}, {"tools": ()}])
def test_where_no_tool_is_offered_nothing_is_read_as_a_call(options):
    events = run(tagged(), ask(**options))
    assert text_of(events) == f"<tool_call>{TAGGED}</tool_call>"
    assert events[-1].finish_reason == "stop"
    assert text_of(run(react(), ask(**options))) == REACT


def test_named_tool_is_called_whatever_the_model_would_begin_with():
    reply = ' {"city": "Rome"}}\n</tool_call>\n<tool_call>'
    events = run(scripted(reply, template=TOOL_TEMPLATE), ask(choice="get_weather"))
    (call,) = calls_of(events)
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Rome"}')
    assert (text_of(events), events[-1].finish_reason) == ("", "tool_calls")
    (call,) = calls_of(run(react(' {"city": "Rome"}\n'), ask(choice="get_weather")))
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Rome"}')


def test_required_call_may_be_of_any_tool():
    both = (WEATHER, Tool("get_time", "", {}))
    events = run(react(" get_time\nAction Input: {}"), ask(tools=both, choice="required"))
    assert [(c.name, c.arguments) for c in calls_of(events)] == [("get_time", "{}")]


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, CHATML_TEMPLATE])
def test_tools_are_counted_before_a_reply(template):
    backend = scripted("x", template=template)
    counted = backend.count_tokens(ask()).prompt
    assert counted > backend.count_tokens(ask(tools=())).prompt + 50
    assert counted == backend.count_tokens(ask()).prompt == run(backend, ask())[0].context.prompt


def test_wrong_tools_are_refused_before_anything_runs():
    backend = react()
    twice = ask(tools=(WEATHER, WEATHER))
    with pytest.raises(InvalidRequest, match="twice"):
        backend.count_tokens(twice)
    with pytest.raises(InvalidRequest, match="twice"):
        next(backend.stream(twice, threading.Event()))
    with pytest.raises(InvalidRequest, match="raw prompt"):
        run(backend, ChatRequest(raw_prompt="x", tools=(WEATHER,)))


#: A model of half a billion parameters needs to be shown what arguments look like.
HELPFUL = Tool(
    "get_weather", 'Tells the weather of a city. Example of an Action Input: {"city": "Rome"}', CITY
)
PARIS = Message("user", "What is the weather in Paris?")
DEGREES = Message("user", "So, how many degrees is it there now? Answer in plain English.")


def talk(backend, *messages, choice="auto", prefix=""):
    request = ChatRequest(
        messages=messages,
        tools=(HELPFUL,),
        tool_choice=choice,
        reply_prefix=prefix,
        params=SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=80),
    )
    return list(backend.stream(request, threading.Event()))


def assert_calls_for_paris(events):
    (call,) = calls_of(events)
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert events[-1].finish_reason == "tool_calls"
    return call


@pytest.mark.integration
def test_embedded_model_calls_a_tool_and_answers_from_its_result(embedded_backend):
    call = assert_calls_for_paris(talk(embedded_backend, PARIS))
    assert_calls_for_paris(talk(embedded_backend, PARIS, choice="required"))
    asked = Message("assistant", "", tool_calls=(call,))
    result = Message("tool", '{"temperature": 21, "sky": "clear"}', tool_call_id=call.id)
    begun = talk(embedded_backend, PARIS, asked, result, prefix="The weather")
    assert "21" in text_of(begun) and begun[-1].finish_reason == "stop"
    events = talk(embedded_backend, PARIS, asked, result, DEGREES)
    assert "21" in text_of(events) and not calls_of(events)


@pytest.fixture(scope="module")
def v1_backend(embedded_v1_folder):
    backend = load_backend(str(embedded_v1_folder), LoadOptions(device="cpu"))
    yield backend
    backend.close()


@pytest.mark.integration
def test_qwen_v1_calls_a_tool_and_answers_from_its_result(v1_backend):
    call = assert_calls_for_paris(talk(v1_backend, PARIS))
    assert_calls_for_paris(talk(v1_backend, PARIS, choice="get_weather"))
    asked = Message("assistant", "", tool_calls=(call,))
    result = Message("tool", '{"temperature": 21, "sky": "clear"}', tool_call_id=call.id)
    for choice in ("auto", "none"):
        events = talk(v1_backend, PARIS, asked, result, choice=choice)
        assert "21" in text_of(events) and "Thought" not in text_of(events)
        assert events[-1].finish_reason == "stop"
