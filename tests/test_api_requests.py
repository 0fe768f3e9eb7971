"""From OpenAI's JSON to what a backend is asked for."""

import pytest

from qwen.messages import Message, SamplingParams, ToolCall
from webapp.api_errors import ApiError
from webapp.api_requests import build_chat_request, build_completion_request
from webapp.api_schemas import ChatCompletionRequest, CompletionRequest

DEFAULTS = SamplingParams(temperature=0.3, top_p=0.4, top_k=5, max_new_tokens=77)
USER = {"role": "user", "content": "x"}


def chat(*messages, **fields):
    body = ChatCompletionRequest.model_validate({"messages": list(messages or [USER])} | fields)
    return build_chat_request(body, DEFAULTS)


def test_what_is_left_out_or_null_is_the_checkpoints_own():
    assert chat().params == DEFAULTS
    assert chat(temperature=None, top_p=None, stop=None, max_tokens=None).params == DEFAULTS


def test_every_setting_arrives():
    params = chat(
        temperature=1.5,
        top_p=0.9,
        top_k=7,
        repetition_penalty=1.1,
        seed=3,
        max_tokens=9,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=4,
    ).params
    assert params == SamplingParams(1.5, 0.9, 7, 1.1, 3, 9, ("a", "b"), 4)


def test_stop_may_be_one_text_and_the_new_name_of_max_tokens_is_known():
    params = chat(stop="END", max_completion_tokens=5).params
    assert (params.stop, params.max_new_tokens) == (("END",), 5)


def test_logprobs_without_a_number_ask_for_the_token_alone():
    assert chat(logprobs=True).params.top_logprobs == 0
    assert chat(logprobs=False).params.top_logprobs is None


def test_other_servers_ways_to_say_no_limit_and_only_the_likeliest_are_known():
    assert chat(top_k=-1).params.top_k == 0
    assert (chat(top_p=0).params.top_k, chat(top_p=0).params.top_p) == (1, 1.0)
    assert chat(top_p=0.001).params.top_p == 0.01


def test_roles_and_parts_become_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = chat(
        {"role": "developer", "content": "s", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        USER,
    )
    assert [(m.role, m.content) for m in got.messages] == [
        ("system", "s"),
        ("user", "ab"),
        ("assistant", ""),
        ("user", "x"),
    ]


def test_calls_and_their_results_keep_their_ids():
    function = {"name": "f", "arguments": "{}"}
    got = chat(
        USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "c7", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c7", "content": "done"},
    )
    assert got.messages[1] == Message("assistant", "", tool_calls=(ToolCall("c7", "f", "{}"),))
    assert got.messages[2] == Message("tool", "done", tool_call_id="c7")


def test_the_older_form_of_a_call_and_its_result_share_an_id():
    got = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "done"},
    )
    (call,) = got.messages[1].tool_calls
    assert (got.messages[2].role, got.messages[2].tool_call_id) == ("tool", call.id)


def test_reply_that_was_begun_is_gone_on_with():
    begun = [{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": "Once"}]
    request = chat(messages=begun)
    assert (request.messages, request.reply_prefix) == ((Message("user", "Tell me"),), "Once")


def test_tools_functions_and_qwens_own_form_become_tools():
    schema = {"type": "object", "properties": {"q": {"type": "string"}}}
    function = {"name": "f", "description": "d", "parameters": schema}
    (tool,) = chat(tools=[{"type": "function", "function": function}]).tools
    assert (tool.name, tool.description, tool.parameters) == ("f", "d", schema)
    assert chat(functions=[function]).tools == (tool,)
    of_2023 = {
        "name_for_human": "谷歌搜索",
        "name_for_model": "google_search",
        "description_for_model": "搜索",
        "parameters": [
            {"name": "q", "description": "词", "required": True, "schema": {"type": "string"}}
        ],
    }
    (tool,) = chat(functions=[of_2023]).tools
    assert (tool.name, tool.description) == ("google_search", "搜索")
    assert tool.human_name == "谷歌搜索"
    assert tool.parameters == of_2023["parameters"]  # as Qwen v1's prompt has them


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, "auto"),
        ({"tool_choice": "none"}, "none"),
        ({"tool_choice": "required"}, "required"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "f"),
    ],
)
def test_tool_choice_arrives(fields, choice):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, **fields).tool_choice == choice


def test_function_call_chooses_in_the_older_form():
    assert chat(functions=[{"name": "f"}], function_call={"name": "f"}).tool_choice == "f"
    assert chat(functions=[{"name": "f"}], function_call="none").tool_choice == "none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "functions": [{"name": "f"}],
            },
            "functions",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(fields, param):
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert refused.value.answer.param == param


def test_completion_takes_raw_text():
    body = CompletionRequest.model_validate({"prompt": ["a b"], "logprobs": 3, "max_tokens": 4})
    request = build_completion_request(body, DEFAULTS)
    assert (request.raw_prompt, request.messages) == ("a b", ())
    assert (request.params.top_logprobs, request.params.max_new_tokens) == (3, 4)
