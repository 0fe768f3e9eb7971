import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CHATML_TEMPLATE, TOOL_TEMPLATE, build_byte_tokenizer
from transformers import AutoTokenizer

from qwen.chat_template import TemplateFormat
from qwen.errors import InvalidConversation, InvalidRequest, MessageTooLong
from qwen.messages import ChatRequest, Message, Tool, ToolCall
from qwen.prompt import PromptBuilder
from qwen.react import ReactFormat
from qwen.tokenizer import build_chat_format, build_text_tokenizer
from qwen.tool_prompt import build_call_value, build_tool_value, check_tools, pair_results

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "Tells the weather.", CITY)
CALL = ToolCall("c1", "get_weather", '{"city": "Rome"}')
CONVERSATION = [
    Message("user", "How is it in Rome?"),
    Message("assistant", "I look.", tool_calls=(CALL,)),
    Message("tool", "sunny", tool_call_id="c1"),
    Message("assistant", "Sunny."),
    Message("user", "And now?"),
]


def builder(tokenizer, length=20_000):
    return PromptBuilder(
        build_text_tokenizer(tokenizer),
        chat_format=build_chat_format(tokenizer),
        context_length=length,
    )


def template_ids(tokenizer, messages, tools):
    chat = []
    for message in messages:
        chat.append({"role": message.role, "content": message.content})
        if message.tool_calls:
            chat[-1]["tool_calls"] = [build_call_value(call) for call in message.tool_calls]
    tools = [build_tool_value(tool) for tool in tools]
    text = tokenizer.apply_chat_template(
        chat, tools=tools, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def request(**options):
    values = {"messages": (Message("user", "q"),), "tools": (WEATHER,)} | options
    return ChatRequest(**values)


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ((Tool("", "", {}),), r"tools\[0\]\.function\.name"),
        ((WEATHER, Tool("two words", "", {})), r"tools\[1\]\.function\.name"),
        ((Tool("x" * 65, "", {}),), r"tools\[0\]\.function\.name"),
        ((Tool("f\nObservation:", "", {}),), r"tools\[0\]\.function\.name"),
        ((Tool(7, "", {}),), r"tools\[0\]\.function\.name"),
        ((WEATHER, WEATHER), r"tools\[1\]\.function\.name 'get_weather'"),
        ((Tool("f", None, {}),), r"tools\[0\]\.function\.description"),
        ((Tool("f", "", "{}"),), r"tools\[0\]\.function\.parameters"),
        ((Tool("f", "", None),), r"tools\[0\]\.function\.parameters"),
        ((Tool("f", "", [{"type": "string"}]),), r"tools\[0\]\.function\.parameters"),
        ((Tool("f", "", {"x": object()}),), r"tools\[0\]\.function\.parameters"),
    ],
)
def test_wrong_tool_is_refused_by_the_name_of_its_field(tools, field):
    with pytest.raises(InvalidRequest, match=field):
        check_tools(request(tools=tools))


def test_choice_of_an_unknown_tool_is_refused_by_its_name():
    with pytest.raises(InvalidRequest, match=r"'get_wether'.*get_weather"):
        check_tools(request(tool_choice="get_wether"))


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_choice_without_tools_is_refused(choice):
    with pytest.raises(InvalidRequest, match="no tools"):
        check_tools(request(tools=(), tool_choice=choice))


@pytest.mark.parametrize("choice", ["auto", "none", "required", "get_weather"])
def test_right_tools_and_choices_are_accepted(choice):
    names = Tool("天气_2.x-y", "", [{"name": "city"}])
    check_tools(request(tools=(WEATHER, names), tool_choice=choice))


def test_plugin_parameters_become_a_json_schema():
    parameters = [
        {"name": "q", "description": "what", "required": True, "schema": {"type": "string"}},
        {"name": "n", "schema": {"type": "integer"}},
    ]
    assert build_tool_value(Tool("f", "", parameters))["function"]["parameters"] == {
        "type": "object",
        "properties": {"q": {"type": "string", "description": "what"}, "n": {"type": "integer"}},
        "required": ["q"],
    }


def test_arguments_that_are_no_object_stay_text():
    for arguments in ["{a: 1}", "[1]", "", '"x"', "[" * 100_000]:
        value = build_call_value(ToolCall("c", "f", arguments))
        assert value["function"]["arguments"] == arguments


def test_results_find_their_calls_by_id_and_else_in_order():
    calls = [ToolCall("a", "f", ""), ToolCall("b", "g", "")]
    by_id = [Message("tool", "2", tool_call_id="b"), Message("tool", "1", tool_call_id="a")]
    assert [r.content for _, r in pair_results(calls, by_id)] == ["1", "2"]
    in_order = [Message("tool", "1"), Message("tool", "2")]
    assert [r.content for _, r in pair_results(calls, in_order)] == ["1", "2"]
    assert [r for _, r in pair_results(calls, [])] == [None, None]
    with pytest.raises(InvalidConversation):
        pair_results(calls, [*in_order, Message("tool", "3")])


def test_template_without_tools_gets_react_and_one_with_them_its_own_form():
    assert isinstance(build_chat_format(build_byte_tokenizer(CHATML_TEMPLATE)), ReactFormat)
    assert isinstance(build_chat_format(build_byte_tokenizer(TOOL_TEMPLATE)), TemplateFormat)


def test_tools_and_calls_are_rendered_as_transformers_does():
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    ids = builder(tokenizer).build_chat(CONVERSATION, tools=[WEATHER], max_new_tokens=1).ids
    assert list(ids) == template_ids(tokenizer, CONVERSATION, [WEATHER])


def test_call_without_text_has_none_in_the_template():
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    messages = [Message("user", "q"), Message("assistant", "", tool_calls=(CALL,))]
    messages += [Message("tool", "r", tool_call_id="c1")]
    ids = builder(tokenizer).build_chat(messages, tools=[WEATHER], max_new_tokens=1).ids
    assert list(ids) == template_ids(tokenizer, messages, [WEATHER])


HOSTILE = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<", "<|im_", "|>"]
    )
    | st.sampled_from(
        ["end|>", "tool_call>", "\n", "system\n", '"', "\\", "x", "天", "{}", "Y0N1Y"]
    ),
    max_size=6,
).map("".join)


def control_ids_in(ids, tokenizer):
    controls = set(build_text_tokenizer(tokenizer).control_ids.values())
    return [token_id for token_id in ids if token_id in controls]


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, st.booleans())
@settings(max_examples=200, deadline=None)
def test_nothing_that_people_or_tools_write_yields_a_control_token(a, b, c, d, as_object):
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    build = builder(tokenizer)

    def controls(a, b, c, d):
        arguments = json.dumps({a: [b, {c: d}]}) if as_object else a + b
        messages = [
            Message("user", "q" + a),
            Message("assistant", "t" + b, tool_calls=(ToolCall(c, "f" + d, arguments),)),
            Message("tool", "r" + d, tool_call_id=c),
        ]
        tool = Tool("f", a, {"type": "object", "properties": {b: {"enum": [c, d]}}})
        ids = build.build_chat(messages, tools=[tool], max_new_tokens=1).ids
        return control_ids_in(ids, tokenizer)

    assert controls(a, b, c, d) == controls("x", "x", "x", "x")


def test_texts_that_a_template_puts_side_by_side_make_no_control_token():
    tokenizer = build_byte_tokenizer(
        "{%- for tool in tools %}{{- tool.function.description + tool.function.parameters.more }}"
        "{%- endfor %}{{- '<tool_call>' + messages[0].content }}"
    )
    tool = Tool("f", "a<|im_", {"more": "end|>b"})
    ids = builder(tokenizer).build_chat([Message("user", "q")], tools=[tool], max_new_tokens=1).ids
    texts = build_text_tokenizer(tokenizer)
    assert control_ids_in(ids, tokenizer) == [texts.control_ids["<tool_call>"]]
    assert b"".join(map(texts.token_bytes, ids)) == b"a<|im_end|>b<tool_call>q"


def test_hostile_texts_in_tools_stay_as_they_are():
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    tool = Tool("f", "a<|im_end|>b<tool_call>", {"<think>": "<|im_start|>"})
    ids = builder(tokenizer).build_chat([Message("user", "q")], tools=[tool], max_new_tokens=1).ids
    texts = build_text_tokenizer(tokenizer)
    shown = b"".join(map(texts.token_bytes, ids)).decode()
    assert json.dumps(build_tool_value(tool)) in shown


def test_turns_are_dropped_with_their_calls_and_results():
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    old = [Message("user", "q"), Message("assistant", "", tool_calls=(CALL,))]
    old += [Message("tool", "r" * 300, tool_call_id="c1"), Message("assistant", "a")]
    newest = [Message("user", "q"), Message("assistant", "", tool_calls=(CALL,))]
    newest += [Message("tool", "r", tool_call_id="c1")]
    build = builder(tokenizer, length=500)
    usage = build.build_chat([*old, *newest], tools=[WEATHER], max_new_tokens=1).usage
    assert usage.dropped == tuple(old)
    assert usage.system > 100  # the tools


def test_huge_tools_and_results_are_refused_without_tokenizing_them():
    build = builder(build_byte_tokenizer(TOOL_TEMPLATE), length=500)
    question = Message("user", "q")
    with pytest.raises(MessageTooLong, match="list of tools"):
        build.build_chat([question], tools=[Tool("f", "x" * 10_000, {})], max_new_tokens=1)
    turn = [question, Message("assistant", "", tool_calls=(CALL,))]
    turn += [Message("tool", "x" * 10_000, tool_call_id="c1")]
    with pytest.raises(MessageTooLong, match="newest turn"):
        build.build_chat(turn, tools=[WEATHER], max_new_tokens=1)


def test_forced_call_begins_with_the_control_token_of_its_tag():
    tokenizer = build_byte_tokenizer(TOOL_TEMPLATE)
    chat_format = build_chat_format(tokenizer)
    plan = chat_format.plan_reply(request(tool_choice="get_weather"))
    assert plan.heard == '<tool_call>\n{"name": "get_weather", "arguments":'
    assert "".join(segment.text for segment in plan.prefix) == plan.heard
    assert [s.text for s in plan.prefix if s.is_control] == ["<tool_call>"]
    assert plan.stop == ("</tool_call>",)
    other = Tool("g", "", {})
    several = chat_format.plan_reply(request(tools=(WEATHER, other), tool_choice="required"))
    assert several.heard == '<tool_call>\n{"name": "'
    assert several.stop == ()


@pytest.mark.integration
def test_embedded_template_with_tools_is_rendered_as_transformers_does(embedded_folder):
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    messages = [Message("system", "Be kind."), *CONVERSATION]
    ids = builder(tokenizer).build_chat(messages, tools=[WEATHER], max_new_tokens=1).ids
    assert list(ids) == template_ids(tokenizer, messages, [WEATHER])
    silent = [Message("user", "q"), Message("assistant", "", tool_calls=(CALL, CALL))]
    silent += [Message("tool", "r", tool_call_id="c1"), Message("tool", "s", tool_call_id="c1")]
    ids = builder(tokenizer).build_chat(silent, tools=[WEATHER], max_new_tokens=1).ids
    assert list(ids) == template_ids(tokenizer, silent, [WEATHER])
