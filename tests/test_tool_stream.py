import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen.messages import StreamEvent, ToolCallDelta
from qwen.tool_stream import ReplyPart, TaggedCallReader, new_call_id, read_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def parts_of(text, sizes=(1,), heard=""):
    reader = TaggedCallReader(["f", "g"], new_id=lambda: "call_1")
    pieces, place, index = [], 0, 0
    while place < len(text):
        pieces.append(text[place : place + sizes[index % len(sizes)]])
        place += len(pieces[-1])
        index += 1
    return list(read_calls(map(StreamEvent, pieces), reader, heard=heard))


def read(text, sizes=(1,), heard=""):
    """Read a reply cut into pieces of these sizes: its text and its calls."""
    parts = parts_of(text, sizes, heard)
    calls = {}
    for delta in (delta for part in parts for delta in part.tool_calls):
        name, arguments = calls.get(delta.index, ("", ""))
        calls[delta.index] = (name + delta.name, arguments + delta.arguments)
    return "".join(part.text for part in parts), list(calls.values())


def tagged(body):
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        ("Hello", "Hello", []),
        ("", "", []),
        (CALL, "", [("f", '{"a": 1}')]),
        (f"I look.\n{CALL}", "I look.", [("f", '{"a": 1}')]),
        (f"{CALL}\n{CALL}", "", [("f", '{"a": 1}')] * 2),
        (f"{CALL}\n\nDone.", "\n\nDone.", [("f", '{"a": 1}')]),
        (tagged('{"arguments": {"a": 1}, "name": "g"}'), "", [("g", '{"a": 1}')]),
        (tagged('{"name": "f", "parameters": {}}'), "", [("f", "{}")]),
        (tagged('{"name": "f"}'), "", [("f", "{}")]),
        (tagged('{"name": "f", "arguments": {}, "id": 3}') + "x", "x", [("f", "{}")]),
        (tagged('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [("f", '{"a": 1}')]),
        (tagged('{"name": "unheard", "arguments": {}}'), "", [("unheard", "{}")]),
        (
            tagged('{"name": "f", "arguments": {"s": "} ] \\" {"}}'),
            "",
            [("f", '{"s": "} ] \\" {"}')],
        ),
    ],
)
@pytest.mark.parametrize("sizes", [(1,), (2, 5), (10**6,)], ids=str)
def test_calls_are_told_from_text(reply, text, calls, sizes):
    assert read(reply, sizes) == (text, calls)


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {a: 1}}', "{a: 1}"),
        ('{"name": "f", "arguments": {"a": "x}}', '{"a": "x}}'),
        ('{"name": "f", "arguments": {"a": [1}', '{"a": [1}'),
        ('{"name": "f", "arguments": null}', "null"),
        ('{"name": "f", "arguments": }', ""),
    ],
)
def test_malformed_arguments_are_passed_on_as_written(body, arguments):
    assert read(f"{tagged(body)} so") == (" so", [("f", arguments)])


NO_CALLS = ["a <tool_", "a <tool_call", "<tool_call>", "<tool_call>\n{", "a < b", '{"x": 1}']
NO_CALLS += [tagged("no json") + " b", "a \n" + tagged("b"), tagged('["f", {}]')]
NO_CALLS += [tagged('{"name": 7, "arguments": {}}'), tagged('{"name": ""}'), '{"name": "f"}']
NO_CALLS += ['{"name": "unheard", "arguments": {}}', "```json\n[1]\n```", "```python\nx\n```"]
NO_CALLS += ['{"name', "```js", "<tools> here"]


@pytest.mark.parametrize("reply", NO_CALLS)
def test_what_turns_out_to_be_no_call_is_shown_whole(reply):
    assert read(reply) == (reply, [])


def test_call_that_is_cut_short_keeps_what_was_written():
    assert read('<tool_call>\n{"name": "f", "arguments": {"a": "x y') == ("", [("f", '{"a": "x y')])


def test_call_within_a_tag_that_was_none_is_found():
    assert read(f"<tool_call>abc{CALL}") == ("<tool_call>abc", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '```json\n{"name": "f", "arguments": {"a": 1}}\n```',
        '\n<tools>\n{"name": "f", "arguments": {"a": 1}}\n</tools>',
    ],
)
def test_call_of_an_offered_tool_without_its_tags_is_read_where_a_reply_begins(reply):
    assert read(reply) == ("", [("f", '{"a": 1}')])
    assert read(f"{reply}\n{reply}") == ("", [("f", '{"a": 1}')] * 2)
    assert read(f"For example: {reply}") == (f"For example: {reply}", [])


def test_text_before_a_call_is_given_out_at_once_and_a_tag_never():
    reader = TaggedCallReader(["f"], new_id=lambda: "call_1")
    assert reader.feed("I look").text == "I look"
    assert reader.feed(" it up \n<tool_").text == " it up"
    assert reader.feed('call>{"name": "f", "argu') == ReplyPart()
    assert reader.feed('ments": ').calls == (ToolCallDelta(index=0, id="call_1", name="f"),)
    assert reader.feed('{"a"').calls == (ToolCallDelta(index=0, arguments='{"a"'),)
    assert reader.feed(": 1}").calls == (ToolCallDelta(index=0, arguments=": 1}"),)
    assert reader.feed("}\n</tool_call>") == ReplyPart()


def test_tag_that_is_none_is_given_out_as_soon_as_that_is_certain():
    reader = TaggedCallReader([])
    assert reader.feed("a <tool").text == "a"
    assert reader.feed("s ").text == " <tools"


def test_what_was_put_in_the_models_mouth_counts_as_its_own():
    heard = '<tool_call>\n{"name": "f", "arguments":'
    parts = parts_of(' {"a": 1}}\n</tool_call>', (3,), heard)
    assert parts[0].tool_calls == (ToolCallDelta(index=0, id="call_1", name="f"),)
    assert read(' {"a": 1}}\n</tool_call>', heard=heard) == ("", [("f", '{"a": 1}')])


def test_each_event_stays_one_with_all_else_that_it_tells():
    events = [StreamEvent(text=c, token_ids=(i,)) for i, c in enumerate(f"ab {CALL} cd")]
    read_events = list(read_calls(events, TaggedCallReader([])))
    assert [event.token_ids for event in read_events] == [event.token_ids for event in events]


def test_ids_of_calls_differ():
    assert len({new_call_id() for _ in range(100)}) == 100
    assert new_call_id().startswith("call_")


MARKS = ["<tool_call>", "</tool_call>", '{"name": ', '"f"', ', "arguments": ', "{", "}", "[", '"']
OTHERS = ["\n", " ", "a", "```json", "```", "<tools>", "</tools>", "\\", ",", "<", "天", "null"]
PIECES = st.sampled_from([*MARKS, *OTHERS, CALL, '{"name": "f", "arguments": {'])
REPLIES = st.lists(PIECES, max_size=16).map("".join) | st.text(max_size=60)


@given(text=REPLIES, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=1000, deadline=None)
def test_reading_does_not_depend_on_where_the_reply_is_cut(text, sizes):
    assert read(text, sizes) == read(text) == read(text, [len(text) or 1])


@given(text=REPLIES)
@settings(max_examples=400, deadline=None)
def test_reply_without_a_call_loses_nothing(text):
    shown, calls = read(text)
    if not calls:
        assert shown == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
WORDS = st.sampled_from(["", "I look.", "天气 it is\nso", "a < b"])


@given(
    replies=st.lists(st.tuples(WORDS, st.dictionaries(st.text(max_size=5), JSON)), max_size=3),
    last=WORDS,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_texts_and_calls_that_were_written_are_read_back(replies, last, sizes):
    reply = "".join(
        f'{text}\n<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for text, arguments in replies
    )
    text, calls = read(reply + last, sizes)
    assert text == "".join(text for text, _ in replies) + last
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("f", arguments) for _, arguments in replies
    ]
