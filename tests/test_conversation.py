"""The conversation tree: nothing said is lost, and nothing a browser sends is trusted."""

import json

import pytest

from qwen.errors import InvalidConversation
from webapp.conversation import (
    MAX_CHARACTERS,
    MAX_NODES,
    Conversation,
    ReplyNote,
    parse_conversation,
    to_json,
)

NOTE = ReplyNote(
    tokens=3, tokens_per_second=9.5, time_to_first_token=0.2, finish_reason="stop", dropped=1
)


def chat(*texts: str) -> Conversation:
    """Build a conversation of alternating questions and replies."""
    made = Conversation()
    for place, text in enumerate(texts):
        made = made.answer(text, NOTE) if place % 2 else made.ask(text)
    return made


def shown(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def test_path_follows_questions_and_replies_in_order():
    assert shown(chat("a", "b", "c", "d")) == ["a", "b", "c", "d"]


def test_regenerated_reply_is_a_sibling_and_the_first_one_can_be_stepped_to():
    twice = chat("a", "b").answer("b2", NOTE)
    assert shown(twice) == ["a", "b2"]
    assert shown(twice.step(twice.leaf, -1)) == ["a", "b"]


def test_edited_question_keeps_the_old_branch_with_its_replies():
    edited = chat("a", "b", "c", "d").edit(0, "A")
    assert shown(edited) == ["A"]
    assert shown(edited.answer("B", NOTE)) == ["A", "B"]
    assert shown(edited.step(edited.leaf, -1)) == ["a", "b", "c", "d"]


def test_stepping_past_the_ends_stays_at_the_ends():
    twice = chat("a", "b").answer("b2", NOTE)
    assert shown(twice.step(twice.leaf, +5)) == ["a", "b2"]


def test_forks_are_the_shown_messages_with_other_versions():
    twice = chat("a", "b").answer("b2", NOTE).ask("c")
    assert twice.forks == (2,)


def test_undo_steps_back_and_hands_the_question_over_and_keeps_the_nodes():
    before, text = chat("a", "b", "c", "d").undo()
    assert (shown(before), text, len(before.nodes)) == (["a", "b"], "c", 4)
    assert shown(before.ask("C").step(4, -1)) == ["a", "b", "c", "d"]


def test_undo_of_an_empty_conversation_changes_nothing():
    assert Conversation().undo() == (Conversation(), "")


def test_question_without_a_reply_is_stepped_aside_for_by_the_next_question():
    again = chat("a", "b", "c").ask("c2")
    assert shown(again) == ["a", "b", "c2"]
    assert shown(again.step(again.leaf, -1)) == ["a", "b", "c"]


def test_continued_reply_replaces_its_shorter_form():
    assert shown(chat("a", "b").extend("bcd", NOTE)) == ["a", "bcd"]


def test_reply_without_a_question_is_refused():
    with pytest.raises(InvalidConversation):
        Conversation().answer("b", None)


def test_reply_cannot_be_edited():
    with pytest.raises(InvalidConversation):
        chat("a", "b").edit(1, "B")


def test_stored_conversation_reads_back_equal_through_json():
    made = chat("a", "b").answer("b2", NOTE).ask("你好")
    stored = json.loads(json.dumps(to_json(made, max_characters=1000)))
    assert parse_conversation(stored) == made


def test_storage_leaves_out_hidden_versions_first_then_the_oldest_turns():
    made = chat("a" * 10, "b" * 10).answer("B" * 10, NOTE).ask("c" * 10).answer("d" * 10, NOTE)
    assert shown(parse_conversation(to_json(made, max_characters=40))) == shown(made)
    newest = parse_conversation(to_json(made, max_characters=25))
    assert shown(newest) == ["c" * 10, "d" * 10]


def forged(**change: object) -> dict:
    node = {"parent": None, "role": "user", "content": "x", "note": None} | change
    return {"version": 1, "leaf": 0, "nodes": [node]}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        {},
        {"version": 2, "leaf": None, "nodes": []},
        {"version": 1, "leaf": None, "nodes": "no"},
        {"version": 1, "leaf": 0, "nodes": []},
        {"version": 1, "leaf": True, "nodes": forged()["nodes"]},
        {"version": 1, "leaf": 0, "nodes": ["no"]},
        forged(role="system"),
        forged(role="tool"),
        forged(role="assistant"),
        forged(role=["user"]),
        forged(content=5),
        forged(content={"path": "/etc/passwd"}),
        forged(parent=0),
        forged(parent=-1),
        forged(parent="0"),
        forged(note={"tokens": "many"}),
        forged(note={"finish_reason": "stop", "tokens": "1"}),
        forged(content="x" * (MAX_CHARACTERS + 1)),
        {"version": 1, "leaf": 0, "nodes": forged()["nodes"] * (MAX_NODES + 1)},
    ],
)
def test_forged_storage_is_refused(data: object):
    with pytest.raises(InvalidConversation):
        parse_conversation(data)
