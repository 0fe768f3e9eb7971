"""What `make bench-users` and `make soak` read and count; the figures themselves are no test."""

import os
import threading

import pytest
from fake_backend import FakeBackend, wait_until

from qwen.errors import BackendFailed
from qwen.evals import bench_users
from qwen.evals.page_users import PageReply, PageUser, total_speed
from qwen.evals.soak import Crowd, Footprint, _compare, read_footprint, read_unfinished


def bubble(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def page_that_says(*steps):
    """A user whose page sends these pictures of the chat: whole first, then as differences."""

    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def iter_lines(self):
            import json

            for step in steps:
                yield "data:" + json.dumps(
                    {"msg": "process_generating", "output": {"data": [step]}}
                )
            yield 'data:{"msg": "process_completed"}'

    class Client:
        def post(self, *arguments, **options):
            return self

        def raise_for_status(self):
            pass

        def stream(self, *arguments, **options):
            return Stream()

    user = object.__new__(PageUser)
    user._client, user._event, user._chat = Client(), 0, 0
    return user


WAITING = [bubble("user", "hi"), bubble("assistant", '<small class="note">Reading …</small>')]
PLACE = [1, "content", 0, "text"]


def test_user_counts_the_changes_of_the_reply_and_not_the_notes_before_it():
    user = page_that_says(
        WAITING,
        [["replace", PLACE, '<small class="note">Number 2 in the queue</small>']],
        [["replace", PLACE, "One"]],
        [],
        [["append", PLACE, " two"]],
        [["append", PLACE, '<small class="note">1,234 tokens · 9 tokens/s</small>']],
    )
    reply = user.ask("hi", 4)
    assert (len(reply.changes), reply.tokens) == (2, 1234)


def test_page_that_shows_an_error_instead_of_a_reply_is_an_error():
    user = page_that_says(WAITING, [["replace", PLACE, "<small>The server is busy</small>"]])
    with pytest.raises(BackendFailed, match="busy"):
        user.ask("hi", 4)


def test_pause_is_the_longest_time_without_text_within_a_span():
    reply = PageReply(0.0, (1.0, 1.2, 2.0, 5.0), 5.1, 9)
    assert reply.pause(1.0, 3.0) == pytest.approx(1.0)
    assert reply.pause(6.0, 7.0) == 0.0


def test_total_speed_counts_from_the_first_question_to_the_last_end():
    replies = [PageReply(0.0, (1.0,), 4.0, 10), PageReply(1.0, (2.0,), 5.0, 20)]
    assert total_speed(replies) == 6.0


def test_no_two_questions_begin_alike():
    asked = bench_users.questions(1) + bench_users.questions(2) + bench_users.questions(12)
    assert len({question[:25] for question in asked}) == 24


def test_footprint_of_a_process_is_read():
    own = read_footprint(os.getpid())
    assert own.memory > 10**7 and own.threads >= 1 and own.files >= 3


def test_replies_that_run_or_wait_are_read_from_the_app(serve_api):
    backend = FakeBackend("one two")
    backend.gate.clear()
    server = serve_api(backend)
    assert read_unfinished(server.url + "/") == 0
    asked = threading.Thread(target=server.chat)
    asked.start()
    wait_until(lambda: read_unfinished(server.url + "/") == 1)
    backend.gate.set()
    asked.join()
    assert read_unfinished(server.url + "/") == 0


def test_soak_misses_growth_threads_and_errors():
    def verdicts(last, threads, errors):
        looks = [Footprint(100, 5, 9)] * 3 + [Footprint(last, 5, 9)] * 3
        crowd = Crowd([1.0, 2.0], errors)
        after = Footprint(last, threads, 9)
        return [row.is_met for row in _compare(crowd, looks, looks[0], after, 32)]

    assert verdicts(104, 6, []) == [True, True, True, True]
    assert verdicts(106, 60, ["x"]) == [False, False, False, True]
