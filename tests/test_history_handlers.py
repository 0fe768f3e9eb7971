"""Open, undo, clear, step, save a copy: none runs the model, none trusts the browser."""

import json

import pytest
from chat_page import ChatPage
from fake_backend import FakeBackend

from qwen.backend import BackendInfo
from qwen.messages import SamplingParams
from webapp.conversation import MAX_CHARACTERS
from webapp.settings import Settings
from webapp.views import WINDOW


def page_with(*questions, reply="r", **options):
    page = ChatPage(FakeBackend(reply, **options))
    for text in questions:
        page.send(text)
    return page


def stored(*nodes, leaf=0):
    listed = [{"parent": None, "role": "user", "content": "x", "note": None} | n for n in nodes]
    return {"conversation": {"version": 1, "leaf": leaf, "nodes": listed}}


# Open


def test_opened_page_offers_examples_and_the_default_settings():
    params = SamplingParams(temperature=0.3, top_k=7)
    info = BackendInfo("Fake", 1000, default_params=params)
    page = ChatPage(FakeBackend(info=info), Settings(system_prompt="Be brief."))
    page.open()
    assert len(page.shown["chatbot"]["examples"]) == 4
    assert page.controls["temperature"] == 0.3
    assert page.controls["top_k"] == 7
    assert page.controls["system_prompt"] == "Be brief."
    assert page.notice == ""


def test_reopened_page_shows_the_stored_conversation_and_settings():
    page = page_with("a")
    page.regenerate()
    page.controls |= {"temperature": 0.9, "system_prompt": "Be kind."}
    page.send("b")
    again = ChatPage(backend := FakeBackend("r2"))
    again.open(json.loads(json.dumps(page.saved)))
    assert again.texts == page.texts
    assert again.controls == page.controls
    assert again.visible("stepper")
    again.send("c")
    assert [m.content for m in backend.requests[-1].messages[1:]] == ["a", "r", "b", "r", "c"]


@pytest.mark.parametrize(
    "saved",
    [
        stored({"role": "system"}),
        stored({"role": "tool"}),
        stored({"content": {"path": "/etc/passwd"}}),
        stored({"content": "x" * (MAX_CHARACTERS + 1)}),
        {"conversation": "text"},
        {"conversation": {"version": 99}},
        stored({}, leaf=7),
    ],
)
def test_forged_history_is_refused_with_a_notice_and_a_new_conversation(saved):
    page = ChatPage(FakeBackend("r"))
    page.open(saved)
    assert page.texts == []
    assert "refused" in page.notice
    page.send("a")
    assert page.texts == ["a", "r"]


@pytest.mark.parametrize("saved", [None, "x", 5, [], {}, {"controls": {"temperature": 99}}])
def test_page_without_a_stored_conversation_begins_a_new_one_in_silence(saved):
    page = ChatPage(FakeBackend("r"))
    page.open(saved)
    assert page.texts == []
    assert page.notice == ""
    assert page.controls["temperature"] == 0.7


def test_opening_a_page_does_not_write_to_the_browser():
    page = ChatPage(FakeBackend("r"))
    page.open(stored({"role": "system"}))
    assert page.saved is None


@pytest.mark.parametrize("event", ["send", "undo"])
def test_late_answer_that_opens_the_page_is_put_right(event):
    saved = page_with("a").saved
    page = ChatPage(FakeBackend("r"))
    page.open(saved)
    late = dict(page.shown["chatbot"])
    page.send("b") if event == "send" else page.undo()
    expected = page.texts
    page.shown["chatbot"] = late
    page.settle()
    assert page.texts == expected != ["a", "r"]


def test_page_on_which_nothing_has_happened_is_left_as_it_was_opened():
    page = ChatPage(FakeBackend("r"))
    page.open(page_with("a").saved)
    before = dict(page.shown)
    page.shown["chatbot"] = {}
    page.settle()
    assert "value" not in page.shown["chatbot"]
    assert page.shown["saved"] == before["saved"]


def test_reply_that_is_being_written_shows_itself():
    page = ChatPage(FakeBackend("r s t"))
    page.open()
    running = page.sending("a")
    next(running)
    page.shown["chatbot"] = {}
    page.settle()
    assert "value" not in page.shown["chatbot"]
    for _ in running:
        pass
    assert page.texts == ["a", "r s t"]


# Undo and clear


def test_undo_takes_the_last_turn_back_and_puts_its_question_into_the_box():
    page = page_with("a", "b")
    page.undo()
    assert page.texts == ["a", "r"]
    assert page.box == "b"


def test_undo_leaves_what_is_being_typed():
    page = page_with("a")
    page.box = "draft"
    page.undo()
    assert page.texts == []
    assert page.box == "draft"


def test_undone_turn_is_not_lost():
    page = page_with("a", "b")
    page.undo()
    page.send("B")
    page.do("step_back")
    assert page.texts == ["a", "r", "b", "r"]


def test_clear_begins_anew_and_forgets_what_the_browser_stored():
    page = page_with("a")
    page.do("clear")
    assert page.texts == []
    assert page.saved["conversation"]["nodes"] == []
    assert not page.enabled("clear")
    page.send("b")
    assert page.texts == ["b", "r"]


def test_undo_clear_and_step_wait_for_the_running_reply():
    page = page_with("a")
    page.regenerate()
    before = page.session.conversation
    with page.session.reply():
        page.box = ""
        page.undo()
        page.do("clear")
        page.do("step_back")
        assert page.session.conversation == before
    page.do("step_back")
    assert page.session.conversation != before


def test_page_that_outlived_its_server_undoes_and_clears_its_own_history():
    page = page_with("a", "b")
    page.session = None  # the server was started anew
    page.undo()
    assert page.texts == ["a", "r"]
    page.session = None
    page.do("clear")
    assert page.texts == []


# Versions


def test_stepper_stays_on_its_message_when_the_branches_differ():
    page = page_with("a", "b")
    page.edit(0, "A")
    page.do("step_back")
    assert page.texts == ["a", "r", "b", "r"]
    assert page.shown["version"]["value"] == "Version 1 of 2"
    page.do("step_forward")
    assert page.texts == ["A", "r"]
    assert page.shown["version"]["value"] == "Version 2 of 2"


def test_chosen_fork_is_what_the_stepper_works_on():
    page = page_with("a")
    page.regenerate()
    page.send("b")
    page.regenerate()
    choices = page.shown["fork"]["choices"]
    assert len(choices) == 2
    page.do("choose_fork", choices[0][1])
    page.do("step_back")
    assert page.texts == ["a", "r"]


@pytest.mark.parametrize("node_id", [99, -1, "0", None, [0], True])
def test_fork_that_is_not_shown_is_not_chosen(node_id):
    page = page_with("a")
    page.regenerate()
    page.do("choose_fork", node_id)
    assert page.session.stepped_fork == 2


def test_stepping_is_stored_too():
    page = page_with("a")
    page.regenerate()
    page.do("step_back")
    again = ChatPage(FakeBackend())
    again.open(page.saved)
    assert again.session.conversation.leaf == 1


def test_long_history_is_shown_in_part_until_asked_for():
    page = page_with(*(str(n) for n in range(WINDOW)))
    assert len(page.texts) == WINDOW
    assert page.visible("earlier")
    page.do("show_earlier")
    assert len(page.texts) == 2 * WINDOW
    assert not page.visible("earlier")


# Context bar


def test_context_bar_counts_what_is_being_typed():
    page = page_with("a b", reply="c d e")
    bar = page.history.draft_context("f g h i", page.session, *page.controls.values())
    for part in ("System 5", "History 5", "Message 4"):
        assert part in bar


def test_context_bar_names_the_turns_that_will_be_dropped():
    page = page_with("first question", "b", reply="r " * 10, limit=30)
    bar = page.history.draft_context("word " * 10, page.session, *page.controls.values())
    assert "will be left out" in bar
    assert "first question" in bar


def test_context_bar_says_when_the_text_is_too_long():
    page = page_with("a", limit=20)
    bar = page.history.draft_context("word " * 50, page.session, *page.controls.values())
    assert "too long" in bar


def test_context_bar_says_which_setting_is_wrong():
    page = page_with("a")
    page.controls["temperature"] = "hot"
    bar = page.history.draft_context("", page.session, *page.controls.values())
    assert "temperature" in bar


# Copies


@pytest.mark.parametrize("kind", ["html", "json", "markdown"])
def test_saved_copy_holds_the_shown_conversation(kind):
    page = page_with("what is up", reply="not much")
    export = getattr(page.history, f"export_{kind}")
    name, media_type, text = export(page.session, *page.controls.values())
    assert name.startswith("qwen-chat-")
    assert "/" in media_type
    assert "what is up" in text
    assert "not much" in text
    assert export(None, *page.controls.values()) is None


def test_empty_conversation_is_not_saved():
    page = ChatPage(FakeBackend())
    page.open()
    assert page.history.export_json(page.session, *page.controls.values()) is None
