"""Pictures of a growing reply: their pace, their end, their errors."""

import logging
import threading
import time
from contextlib import ExitStack
from itertools import pairwise

import pytest
from fake_backend import wait_until

from qwen.errors import BackendFailed, OutOfMemory
from qwen.messages import ContextUsage, Message, QueuePlace, StreamEvent, Timing, Usage
from webapp.conversation import Conversation, ReplyNote
from webapp.reply_stream import (
    HEARTBEAT_SECONDS,
    PACE_SECONDS,
    SLOWEST_PACE_SECONDS,
    UNHURRIED_STREAMS,
    Growth,
    Pace,
    Snapshot,
    reply_note,
    stream_snapshots,
)

CONTEXT = ContextUsage(1, 2, 3, 100, dropped=(Message("user", "old"),))
END = StreamEvent(finish_reason="stop", usage=Usage(6, 2), timing=Timing(0.5, 20.0))
NOTE = ReplyNote(2, 20.0, 0.5, "stop", dropped=1)


def snapshots(*events):
    return list(stream_snapshots(lambda: iter(events), threading.Event(), Pace()))


def running_readers():
    return [thread for thread in threading.enumerate() if thread.name == "reply-stream"]


def test_last_picture_holds_all_text_the_context_and_the_final_event():
    *growing, last = snapshots(
        StreamEvent(context=CONTEXT), StreamEvent("a"), StreamEvent("b"), END
    )
    assert last == Snapshot("ab", CONTEXT, END)
    assert all(picture.final is None for picture in growing)


def test_picture_tells_the_place_in_the_queue_until_the_reply_begins():
    def waits():
        yield StreamEvent(queued=QueuePlace(2, 20.0))
        time.sleep(2 * HEARTBEAT_SECONDS)
        yield StreamEvent("a")
        yield END

    pictures = list(stream_snapshots(waits, threading.Event(), Pace()))
    assert pictures[0].queued == QueuePlace(2, 20.0)
    assert pictures[-1].queued is None


def test_every_picture_begins_with_the_one_before():
    def slow():
        for word in ("one ", "two ", "three "):
            time.sleep(PACE_SECONDS)
            yield StreamEvent(word)
        yield END

    texts = [picture.text for picture in stream_snapshots(slow, threading.Event(), Pace())]
    assert len(set(texts)) >= 3
    assert all(after.startswith(before) for before, after in pairwise(texts))


def test_fast_tokens_are_gathered_into_few_pictures():
    def fast():
        for _ in range(200):
            time.sleep(0.001)
            yield StreamEvent("x")
        yield END

    begun = time.monotonic()
    taken = list(stream_snapshots(fast, threading.Event(), Pace()))
    assert len(taken) <= (time.monotonic() - begun) / PACE_SECONDS + 2
    assert taken[-1].text == "x" * 200


def test_crowd_of_replies_is_shown_less_often_and_one_alone_at_the_usual_pace():
    pace = Pace()
    with ExitStack() as crowd:
        paces = []
        for _ in range(20):
            crowd.enter_context(pace.streaming())
            paces.append(pace.seconds)
    assert paces[UNHURRIED_STREAMS - 1] == pace.seconds == PACE_SECONDS
    assert paces[2 * UNHURRIED_STREAMS - 1] == pytest.approx(2 * PACE_SECONDS)
    assert paces[-1] == SLOWEST_PACE_SECONDS


def test_reply_counts_for_the_pace_only_while_it_produces_text():
    pace, speaks = Pace(), threading.Event()
    counted = []

    def begins():
        yield StreamEvent(queued=QueuePlace(1, 5.0))
        speaks.wait(10)
        yield StreamEvent("a")
        yield END

    pictures = stream_snapshots(begins, threading.Event(), pace)
    next(pictures)
    counted.append(pace.streams)
    speaks.set()
    counted += [pace.streams for picture in pictures if picture.text]
    assert counted[0] == 0
    assert set(counted[1:]) == {1}
    assert pace.streams == 0


def test_model_thread_does_not_wait_for_the_page():
    produced = []

    def fast():
        for number in range(50):
            produced.append(number)
            yield StreamEvent("x")
        yield END

    pictures = stream_snapshots(fast, threading.Event(), Pace())
    first = next(pictures)
    wait_until(lambda: len(produced) == 50)
    assert [first, *pictures][-1].text == "x" * 50


def test_silent_backend_still_gives_a_picture_every_heartbeat():
    said = threading.Event()

    def silent():
        said.wait(10)
        yield END

    pictures = stream_snapshots(silent, threading.Event(), Pace())
    begun = time.monotonic()
    assert [next(pictures).text for _ in range(3)] == [""] * 3
    assert time.monotonic() - begun >= 2 * HEARTBEAT_SECONDS
    said.set()
    assert list(pictures)[-1].final == END


def test_error_of_the_backend_comes_after_a_picture_of_the_text_before_it():
    def failing():
        yield StreamEvent("half ")
        yield StreamEvent("a reply")
        raise OutOfMemory("Memory ran out.")

    taken = []
    with pytest.raises(OutOfMemory, match=r"Memory ran out\."):
        for picture in stream_snapshots(failing, threading.Event(), Pace()):
            taken.append(picture.text)
    assert taken[-1] == "half a reply"


def test_unexpected_fault_becomes_backend_failed_and_only_the_log_has_the_details(caplog):
    def failing():
        yield StreamEvent("some text")
        raise KeyError("layer 7")

    with caplog.at_level(logging.ERROR), pytest.raises(BackendFailed) as failed:
        list(stream_snapshots(failing, threading.Event(), Pace()))
    assert "layer 7" not in str(failed.value)
    assert "KeyError" in caplog.text
    assert "some text" not in caplog.text


def test_fault_before_the_first_event_is_raised_too():
    def unopened():
        raise OutOfMemory("Memory ran out.")

    with pytest.raises(OutOfMemory):
        list(stream_snapshots(unopened, threading.Event(), Pace()))


def test_closing_the_pictures_sets_cancel_and_ends_the_reading_thread():
    cancel = threading.Event()

    def endless():
        while not cancel.wait(0.001):
            yield StreamEvent("x")

    pictures = stream_snapshots(endless, cancel, Pace())
    next(pictures)
    assert running_readers()
    pictures.close()
    assert cancel.is_set()
    wait_until(lambda: not running_readers())


def test_reply_grows_behind_the_question():
    growth = Growth(Conversation().ask("q"))
    assert [m.content for m in growth.at(Snapshot("ab")).messages] == ["q", "ab"]
    assert len(growth.at(Snapshot("abc")).nodes) == 2


def test_continued_reply_grows_behind_its_beginning_and_adds_up_the_tokens():
    cut = Conversation().ask("q").answer("once", ReplyNote(7, 1.0, 1.0, "length"))
    whole = Growth(cut).at(Snapshot(" upon", CONTEXT, END))
    assert whole.path[-1].content == "once upon"
    assert whole.path[-1].note.tokens == 7 + 2
    assert whole.path[-1].note.finish_reason == "stop"


def test_note_is_made_at_the_end_only_and_counts_the_dropped_messages():
    assert reply_note(Snapshot("a", CONTEXT)) is None
    assert reply_note(Snapshot("a", CONTEXT, END)) == NOTE
