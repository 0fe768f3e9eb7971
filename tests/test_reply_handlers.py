"""Send, edit, regenerate, continue, stop: what the model is asked, what the page shows then."""

import json
import logging
import threading

import gradio as gr
import pytest
from chat_page import REQUEST, ChatPage
from fake_backend import FakeBackend, wait_until

from qwen.backend import DeferredBackend
from qwen.errors import CheckpointNotFound, MessageTooLong, OutOfMemory
from qwen.messages import Message
from webapp.settings import Settings, VisitorLimit
from webapp.text import words_for

SYSTEM = Message("system", "You are a helpful assistant.")


def asked(backend):
    return [(m.role, m.content) for m in backend.requests[-1].messages]


def loading_backend(backend):
    """A backend that is loaded when the returned event is set."""
    loaded = threading.Event()

    def load(report):
        report("Reading the weights", done=1, total=2)
        loaded.wait()
        if isinstance(backend, Exception):
            raise backend
        return backend

    deferred = DeferredBackend(load)
    deferred.start()
    wait_until(lambda: deferred.status.total)
    return deferred, loaded


# Send


def test_sent_message_and_its_reply_are_shown_and_the_box_is_emptied():
    page = ChatPage(FakeBackend("one two three"))
    page.send("hello")
    assert page.texts == ["hello", "one two three"]
    assert page.box == ""
    assert "3 tokens" in page.bubbles[-1]


def test_model_receives_the_system_prompt_the_history_and_the_message():
    page = ChatPage(backend := FakeBackend("r"))
    page.send("a")
    page.send("b")
    assert backend.requests[-1].messages == (
        SYSTEM,
        Message("user", "a"),
        Message("assistant", "r"),
        Message("user", "b"),
    )


def test_history_is_the_raw_text_whatever_the_page_made_of_it():
    raw = "<script>alert(1)</script>\n\n    $5 and $10 `a<b` &amp; <|im_end|>"
    page = ChatPage(backend := FakeBackend(raw))
    page.send(raw)
    page.send("again")
    assert asked(backend)[1:3] == [("user", raw), ("assistant", raw)]


def test_reply_grows_in_several_steps_with_stop_in_the_place_of_send():
    page = ChatPage(FakeBackend("one two three four", pause=0.1))
    texts = []
    for _ in page.sending("hello"):
        if not page.session.is_busy:
            continue
        texts.append(page.texts[-1])
        assert page.visible("stop")
        assert not page.visible("send")
    assert len(set(texts)) >= 3
    assert page.visible("send")
    assert not page.visible("stop")


def test_example_prompt_is_sent_like_a_message_and_leaves_the_box_alone():
    page = ChatPage(FakeBackend("r"))
    page.box = "half a thought"
    page.example("What is a hash table?")
    assert page.texts == ["What is a hash table?", "r"]
    assert page.box == "half a thought"


def test_chosen_settings_reach_the_model():
    page = ChatPage(backend := FakeBackend("r"))
    page.controls |= {"temperature": 0.1, "max_new_tokens": 7, "system_prompt": ""}
    page.send("a")
    assert backend.requests[-1].params.temperature == 0.1
    assert backend.requests[-1].params.max_new_tokens == 7
    assert asked(backend) == [("user", "a")]


def test_fixed_seed_repeats_a_conversation_but_gives_every_version_another_seed():
    def seeds_of_three_versions():
        page = ChatPage(backend := FakeBackend("r"))
        page.controls["seed"] = 5
        page.send("a")
        page.regenerate()
        page.regenerate()
        return [request.params.seed for request in backend.requests]

    seeds = seeds_of_three_versions()
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert seeds == seeds_of_three_versions()


def test_without_a_seed_every_reply_draws_its_own():
    page = ChatPage(backend := FakeBackend("r"))
    page.send("a")
    assert backend.requests[-1].params.seed is None


def test_what_follows_a_reply_asks_the_session_and_a_server_started_anew_changes_nothing():
    page = ChatPage(FakeBackend("r"))
    assert set(map(str, page.reply.follow(None, *page.controls.values()))) == {str(gr.skip())}


# Refused


def test_visitor_with_too_many_replies_keeps_the_text_and_the_conversation():
    page = ChatPage(backend := FakeBackend("r"), Settings(visitors=VisitorLimit(1)))
    page.send("a")
    with page.reply._visitors.reply("unknown", words_for("en")):
        page.send("my long text")
        page.regenerate()
    assert (page.texts, page.box) == (["a", "r"], "my long text")
    assert "at once (1)" in page.notice
    assert len(backend.requests) == 1
    page.send("my long text")
    assert page.texts[2:] == ["my long text", "r"]


@pytest.mark.parametrize("text", ["", " ", "\n\t \n"])
def test_empty_message_is_refused_and_not_added(text):
    page = ChatPage(FakeBackend("r"))
    page.send("a")
    page.send(text)
    assert page.texts == ["a", "r"]
    assert "empty" in page.notice
    assert page.box == text


@pytest.mark.parametrize("text", [None, 5, ["x"], {"text": "x"}])
def test_message_that_is_no_text_counts_as_empty(text):
    page = ChatPage(backend := FakeBackend("r"))
    page.send(text)
    assert not backend.requests
    assert page.texts == []
    assert "empty" in page.notice


def test_message_that_is_too_long_goes_back_into_the_box():
    page = ChatPage(FakeBackend("r", limit=50))
    page.send("short")
    long = "word " * 100
    page.send(long)
    assert page.texts == ["short", "r"]
    assert page.box == long
    assert 'role="alert"' in page.notice
    assert "too long" in page.notice


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 99),
        ("temperature", "abc"),
        ("temperature", None),
        ("top_k", 1.5),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("system_prompt", 5),
    ],
)
def test_wrong_setting_is_refused_by_name_and_the_text_goes_back(name, value):
    page = ChatPage(backend := FakeBackend("r"))
    page.controls[name] = value
    page.send("my text")
    assert not backend.requests
    assert page.texts == []
    assert page.box == "my text"
    assert name.replace("_", " ") in page.notice.replace("_", " ")
    page.controls |= dict.fromkeys([name], ChatPage(FakeBackend()).controls[name])
    page.send(page.box)
    assert page.texts == ["my text", "r"]


def test_request_that_the_backend_refuses_at_the_first_step_is_not_added():
    refusal = MessageTooLong("The message has too many characters.")
    page = ChatPage(FakeBackend("r", fault=refusal))
    page.send("my text")
    assert page.texts == []
    assert page.box == "my text"
    assert "too many characters" in page.notice


def test_second_message_during_a_reply_is_refused_and_goes_back_and_the_reply_goes_on():
    page = ChatPage(backend := FakeBackend("one two"))
    backend.gate.clear()
    first = page.sending("first")
    next(first)
    next(first)
    page.send("second")
    assert page.box == "second"
    assert "still being written" in page.notice
    next(first)
    assert "Reading your message" in page.bubbles[-1]
    backend.gate.set()
    for _ in first:
        pass
    assert page.texts == ["first", "one two"]
    assert len(backend.requests) == 1


def test_refused_edit_keeps_the_conversation_and_hands_the_text_over():
    page = ChatPage(FakeBackend("r"))
    page.send("a")
    page.controls["temperature"] = 99
    page.edit(0, "another")
    assert page.texts == ["a", "r"]
    assert page.box == "another"


# Failing


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OutOfMemory("Memory ran out. Shorten the conversation."), "Memory ran out"),
        (RuntimeError("internal detail"), "unexpected fault"),
    ],
)
def test_failure_midway_keeps_the_text_so_far_and_the_next_message_works(fault, words):
    page = ChatPage(backend := FakeBackend("one two three", fault=fault, fault_after=2))
    page.send("question")
    assert page.texts == ["question", "one two "]
    assert words in page.bubbles[-1]
    assert "internal detail" not in "".join(page.bubbles) + page.notice
    assert page.visible("send")
    backend.fault = None
    page.send("next")
    assert page.texts == ["question", "one two ", "next", "one two three"]


def test_failure_before_the_first_word_keeps_the_question_and_regenerate_answers_it():
    page = ChatPage(backend := FakeBackend("one two", fault=OutOfMemory("Memory ran out.")))
    page.send("question")
    assert page.texts[0] == "question"
    assert "Memory ran out." in page.bubbles[-1]
    backend.fault = None
    page.regenerate()
    assert page.texts == ["question", "one two"]


def test_interrupted_reply_can_be_continued():
    page = ChatPage(backend := FakeBackend("one two", fault=RuntimeError(), fault_after=1))
    page.send("question")
    assert page.enabled("continue")
    backend.fault, backend.reply = None, "three"
    page.continue_reply()
    assert page.texts == ["question", "one three"]


def test_log_of_a_failure_has_the_traceback_and_no_users_text(caplog):
    page = ChatPage(FakeBackend("model-words", fault=RuntimeError("broken"), fault_after=0))
    with caplog.at_level(logging.DEBUG):
        page.send("private-words")
    assert "RuntimeError: broken" in caplog.text
    assert "private-words" not in caplog.text
    assert "model-words" not in caplog.text


# Regenerate, edit, continue


def test_regenerate_adds_a_version_and_keeps_the_first():
    replies = iter(["first", "second"])
    page = ChatPage(FakeBackend(lambda request: next(replies)))
    page.send("a")
    page.regenerate()
    assert page.texts == ["a", "second"]
    assert page.visible("stepper")
    assert "Version 2 of 2" in page.shown["version"]["value"]
    page.do("step_back")
    assert page.texts == ["a", "first"]


def test_regenerate_that_fails_loses_no_version():
    page = ChatPage(backend := FakeBackend("first"))
    page.send("a")
    backend.fault = OutOfMemory("Memory ran out.")
    page.regenerate()
    assert "first" in [node.content for node in page.session.conversation.nodes]
    backend.fault = None
    page.regenerate()
    assert page.shown["version"]["value"] == "Version 2 of 2"


def test_finished_messages_are_rendered_once_while_a_reply_grows(monkeypatch):
    rendered = []
    monkeypatch.setattr("webapp.views.render_reply", lambda text: rendered.append(text) or text)
    page = ChatPage(FakeBackend("one two three four", pause=0.1))
    page.send("first question")
    page.send("second question")
    assert rendered.count("first question") == 1
    assert rendered.count("second question") == 1


def test_regenerate_without_a_message_says_so():
    page = ChatPage(backend := FakeBackend("r"))
    page.regenerate()
    assert "no reply to regenerate" in page.notice
    assert not backend.requests


def test_edit_makes_a_branch_and_the_old_one_can_be_stepped_to():
    page = ChatPage(backend := FakeBackend("r"))
    page.send("a")
    page.send("b")
    page.edit(0, "A")
    assert page.texts == ["A", "r"]
    assert asked(backend) == [("system", SYSTEM.content), ("user", "A")]
    page.do("step_back")
    assert page.texts == ["a", "r", "b", "r"]


def test_edit_counts_from_the_first_shown_message():
    page = ChatPage(FakeBackend("r"))
    for text in "abc":
        page.send(text)
    page.session.window = 2
    page.edit(0, "C")
    shown = [message.content for message in page.session.conversation.messages]
    assert shown == ["a", "r", "b", "r", "C", "r"]


@pytest.mark.parametrize("index", [1, 2, -1, 99])
def test_edit_of_what_is_no_shown_question_is_refused_and_the_text_is_kept(index):
    page = ChatPage(backend := FakeBackend("r"))
    page.send("a")
    page.edit(index, "forged")
    assert page.texts == ["a", "r"]
    assert page.box == "forged"
    assert len(backend.requests) == 1


def test_continue_goes_on_behind_the_cut_reply():
    page = ChatPage(backend := FakeBackend("one two three"))
    page.controls["max_new_tokens"] = 2
    page.send("a")
    assert "Continue" in page.bubbles[-1]
    assert page.enabled("continue")
    page.controls["max_new_tokens"] = 100
    backend.reply = "three"
    page.continue_reply()
    assert page.texts == ["a", "one two three"]
    assert backend.requests[-1].reply_prefix == "one two "
    assert asked(backend)[-1] == ("user", "a")
    assert "3 tokens" in page.bubbles[-1]
    assert not page.enabled("continue")


def test_continue_of_a_complete_reply_is_refused():
    page = ChatPage(backend := FakeBackend("r"))
    page.send("a")
    page.continue_reply()
    assert "nothing to continue" in page.notice
    assert len(backend.requests) == 1


# Stop


def test_stop_keeps_the_text_so_far_and_says_stopped():
    page = ChatPage(FakeBackend("one two three four five six", pause=0.1))
    for _ in page.sending("a"):
        if len(page.texts) > 1 and "two" in page.texts[-1]:
            page.reply.stop(page.session)
    assert page.texts[-1].startswith("one two")
    assert "six" not in page.texts[-1]
    assert "stopped" in page.bubbles[-1]
    assert page.enabled("continue")


def test_stop_before_the_first_word_keeps_the_question():
    page = ChatPage(backend := FakeBackend("one"))
    backend.gate.clear()
    for _ in page.sending("a"):
        page.reply.stop(page.session)
    assert page.texts[0] == "a"
    assert "Stopped before the first word" in page.bubbles[-1]
    backend.gate.set()
    page.regenerate()
    assert page.texts == ["a", "one"]


def test_stop_without_a_reply_changes_nothing():
    page = ChatPage(FakeBackend("one"))
    page.reply.stop(None)
    page.open()
    page.reply.stop(page.session)
    page.send("a")
    assert page.texts == ["a", "one"]


def test_closed_tab_ends_the_stream_even_while_the_model_is_silent():
    page = ChatPage(backend := FakeBackend("one"))
    backend.gate.clear()
    events = page.reply.send(REQUEST, "a", None, None, *page.controls.values())
    page.take_reply(next(events))
    next(events)
    wait_until(lambda: backend.active)
    events.close()
    wait_until(lambda: not backend.active)
    assert not page.session.is_busy


def test_page_that_outlived_its_server_goes_on_with_its_history():
    page = ChatPage(FakeBackend("re"))
    page.send("a")
    page.session = None  # the server was started anew
    page.send("b")
    assert page.texts == ["a", "re", "b", "re"]
    assert len(page.saved["conversation"]["nodes"]) == 4


def test_refused_message_leaves_the_figures_of_the_last_reply_alone():
    page = ChatPage(FakeBackend("re", limit=20))
    page.send("a")
    before = page.bubbles
    page.send("word " * 50)
    assert page.bubbles == before


def test_message_edited_to_nothing_is_shown_again():
    page = ChatPage(FakeBackend("re"))
    page.send("a")
    page.shown["chatbot"]["value"] = []  # the browser shows what was typed
    page.edit(0, "")
    assert page.texts == ["a", "re"]


@pytest.mark.parametrize("value", [99, -1, "abc", None, float("nan"), True, [0.5]])
def test_wrong_setting_is_named_and_the_text_stays(value):
    page = ChatPage(FakeBackend("re"))
    page.controls["temperature"] = value
    page.send("a")
    assert "temperature must be a number from 0 to 2" in page.notice
    assert page.box == "a"


def test_reply_without_any_text_says_so_and_adds_no_empty_message():
    page = ChatPage(FakeBackend(""))
    page.send("a")
    assert "without any text" in page.bubbles[-1]
    assert len(page.session.conversation.nodes) == 1


# Loading


def test_message_sent_while_loading_is_answered_when_the_model_is_there():
    deferred, loaded = loading_backend(FakeBackend("hello"))
    page = ChatPage(deferred)
    waiting = page.sending("early")
    next(waiting)
    next(waiting)
    assert page.texts[0] == "early"
    assert "Reading the weights 50 %" in page.bubbles[-1]
    loaded.set()
    for _ in waiting:
        pass
    assert page.texts == ["early", "hello"]


def test_stop_while_loading_puts_the_text_back():
    deferred, loaded = loading_backend(FakeBackend("hello"))
    page = ChatPage(deferred)
    for _ in page.sending("early"):
        page.reply.stop(page.session)
    assert page.texts == []
    assert page.box == "early"
    assert "back in the box" in page.notice
    loaded.set()


def test_failed_load_puts_the_text_back_and_says_why():
    deferred, loaded = loading_backend(CheckpointNotFound("No model is called Kwen."))
    page = ChatPage(deferred)
    waiting = page.sending("early")
    next(waiting)
    loaded.set()
    for _ in waiting:
        pass
    assert page.texts == []
    assert page.box == "early"
    assert "Kwen" in page.notice


# Storage


def test_browser_stores_the_question_before_the_reply_and_the_reply_at_the_end():
    page = ChatPage(backend := FakeBackend("one"))
    backend.gate.clear()
    events = page.sending("a")
    next(events)
    assert [node["content"] for node in page.saved["conversation"]["nodes"]] == ["a"]
    backend.gate.set()
    for _ in events:
        pass
    assert [node["content"] for node in page.saved["conversation"]["nodes"]] == ["a", "one"]
    json.dumps(page.saved)


def test_long_reply_is_stored_while_it_grows(monkeypatch):
    monkeypatch.setattr("webapp.reply_handlers.SAVE_SECONDS", 0.2)
    page = ChatPage(FakeBackend("one two three four five six", pause=0.1))
    stored = set()
    for _ in page.sending("a"):
        stored.add(page.saved["conversation"]["nodes"][-1]["content"])
    assert len(stored) > 3


def test_system_prompt_of_the_command_line_is_the_new_visitors():
    page = ChatPage(backend := FakeBackend("r"), Settings(system_prompt="Talk like a pirate."))
    page.send("a")
    assert asked(backend)[0] == ("system", "Talk like a pirate.")
