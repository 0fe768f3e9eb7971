"""One page: one reply at a time, stopped by its own Stop."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from webapp.conversation import Conversation, ReplyNote
from webapp.session import OpenPages, PageBusy, PageSession, restored_session
from webapp.text import Words


def session_with(conversation=None):
    session = PageSession(Words("en"))
    session.conversation = conversation or Conversation()
    return session


def note(finish_reason):
    return ReplyNote(1, 1.0, 1.0, finish_reason)


def test_second_reply_is_refused_while_one_runs_and_allowed_afterwards():
    session = session_with()
    with session.reply():
        assert session.is_busy
        with pytest.raises(PageBusy), session.reply():
            pass
        assert session.is_busy
    assert not session.is_busy
    with session.reply() as cancel:
        assert not cancel.is_set()


def test_stop_sets_the_running_replys_event():
    session = session_with()
    with session.reply() as cancel:
        session.stop()
        assert cancel.is_set()


def test_stop_without_a_running_reply_does_not_stop_the_next_one():
    session = session_with()
    session.stop()
    with session.reply() as cancel:
        assert not cancel.is_set()


def test_place_is_free_again_after_a_fault_and_its_event_is_set():
    session = session_with()
    with pytest.raises(RuntimeError), session.reply() as cancel:
        raise RuntimeError
    assert cancel.is_set()
    assert not session.is_busy


def test_two_pages_write_replies_at_the_same_time():
    first, second = session_with(), session_with()
    with first.reply(), second.reply():
        assert first.is_busy and second.is_busy


def test_stepper_works_on_the_last_fork_until_another_is_chosen():
    chat = Conversation().ask("a").answer("b", None).answer("b2", None).ask("c").edit(3, "c2")
    session = session_with(chat)
    assert session.stepped_fork == 4
    session.fork = 2
    assert session.stepped_fork == 2
    session.fork = 99
    assert session.stepped_fork == 4
    assert session_with().stepped_fork is None


@pytest.mark.parametrize(
    ("last_note", "can"),
    [(note("length"), True), (note("cancelled"), True), (None, True), (note("stop"), False)],
)
def test_only_a_reply_that_was_cut_off_can_be_continued(last_note, can):
    assert session_with(Conversation().ask("a").answer("b", last_note)).can_continue is can


def test_question_without_a_reply_cannot_be_continued():
    assert not session_with(Conversation().ask("a")).can_continue
    assert not session_with().can_continue


def test_events_of_one_page_get_the_same_session_whichever_is_first():
    def request(page):
        return SimpleNamespace(headers={}, session_hash=page)

    pages = OpenPages()
    first = pages.session_of(request("one"), None)
    assert pages.session_of(request("one"), None) is first
    assert pages.session_of(request("another"), None) is not first
    assert OpenPages().session_of(request("one"), None) is not first  # of a server started anew
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None  # nothing is kept of a page that is closed


def test_session_speaks_the_language_of_its_browser():
    request = SimpleNamespace(headers={"accept-language": "ja,en;q=0.5"})
    page = restored_session(request, None)
    assert page.words("send") == "送信"
