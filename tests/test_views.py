"""What the page displays, from plain values: windowed, named, and with nothing left to execute."""

import html

import pytest

from qwen.backend import BackendInfo, LoadStatus, MemoryUse
from qwen.errors import CheckpointNotFound
from qwen.messages import ContextUsage, Message, QueuePlace
from webapp.conversation import Conversation, ReplyNote
from webapp.render import restore_text
from webapp.text import LOCALES, Words
from webapp.views import (
    chat_messages,
    context_html,
    fork_choices,
    loading_text,
    note_text,
    notice_html,
    queue_text,
    status_html,
    version_text,
)

EN = Words("en")
NOTE = ReplyNote(1234, 9.87, 0.25, "stop")
EVIL = "<img src=x onerror=alert(1)>"


def chat(turns):
    made = Conversation()
    for number in range(turns):
        made = made.ask(f"question {number}").answer(f"reply {number}", NOTE)
    return made


def bubbles(conversation, **options):
    options = {"window": 50} | options
    shown = chat_messages(conversation, EN, **options)
    return [(bubble["role"], bubble["content"][0]["text"]) for bubble in shown]


def words_of(shown):
    """What a reader sees of a bubble's Markdown that holds no markup but a note."""
    return html.unescape(shown[1])


def test_messages_are_text_parts_since_plain_strings_lose_their_indentation():
    (bubble,) = chat_messages(Conversation().ask("  x"), EN, window=5, growing=True)
    assert bubble["content"] == [{"type": "text", "text": "  x"}]


def test_only_the_window_is_shown_newest_last():
    shown = bubbles(chat(5), window=4)
    assert [restore_text(text) for _, text in shown] == [
        "question 3",
        "reply 3",
        "question 4",
        "reply 4",
    ]


def test_note_stands_under_the_reply_and_not_in_its_text():
    reply = bubbles(chat(1))[1]
    assert "1,234 tokens · 9.9 tokens/s" in words_of(reply)
    assert restore_text(reply[1]) == "reply 0"


def test_growing_reply_has_no_note_yet():
    (_, text) = bubbles(chat(1), growing=True)[1]
    assert text == "reply 0"


def test_reply_without_figures_is_called_interrupted():
    (_, text) = bubbles(Conversation().ask("a").answer("b", None))[1]
    assert "interrupted" in text


def test_notice_takes_the_place_of_the_note_under_a_reply():
    reply = bubbles(chat(1), notice="Memory ran out.")[1]
    assert "Memory ran out." in words_of(reply)
    assert "tokens/s" not in words_of(reply)


def test_notice_after_a_question_gets_a_bubble_of_its_own():
    shown = bubbles(Conversation().ask("a"), notice="Reading")
    assert [role for role, _ in shown] == ["user", "assistant"]
    assert "Reading" in shown[1][1]


def test_question_without_a_reply_says_so_unless_one_is_on_its_way():
    assert "No reply yet" in bubbles(Conversation().ask("a"))[1][1]
    assert len(bubbles(Conversation().ask("a"), growing=True)) == 1


def test_empty_conversation_shows_nothing():
    assert bubbles(Conversation(), notice="") == []


def test_html_in_notices_and_notes_is_text():
    assert "<img" not in bubbles(Conversation().ask("a"), notice=EVIL)[1][1]
    assert "<img" not in notice_html(EVIL)
    assert "&lt;img" in notice_html(EVIL)


def test_notice_is_an_alert_and_no_notice_is_nothing():
    assert 'role="alert"' in notice_html("No.")
    assert notice_html("") == ""


@pytest.mark.parametrize(
    ("finish", "words"), [("stop", "complete"), ("length", "Continue"), ("cancelled", "stopped")]
)
def test_note_tells_why_the_reply_ended(finish, words):
    line = note_text(ReplyNote(12, 3.0, 0.5, finish), EN)
    assert line.startswith("12 tokens · 3.0 tokens/s · first token after 0.5 s")
    assert words in line


def test_note_tells_how_many_messages_were_left_out():
    assert "2 earlier messages" in note_text(ReplyNote(1, 1.0, 1.0, "stop", dropped=2), EN)


def test_ready_strip_names_the_model_and_escapes_it():
    info = BackendInfo(EVIL, 32768, device="cpu", dtype="bf16", notices=("<b>no GPU</b>",))
    strip = status_html(LoadStatus("ready"), info, EN)
    assert "32,768" in strip
    assert "cpu · bf16" in strip
    assert "<img" not in strip
    assert "<b>" not in strip


def test_ready_strip_tells_what_the_model_takes_in_every_language():
    use = MemoryUse(
        weights=15_440_000_000,
        cache=4_290_000_000,
        activations=200_000_000,
        program=500_000_000,
        context=8192,
        free=24_000_000_000,
    )
    info = BackendInfo("Qwen-7B-Chat", 8192, memory=use)
    for locale in LOCALES:
        strip = status_html(LoadStatus("ready"), info, Words(locale))
        assert strip.index("<details>") < strip.index("20.4 GB") < strip.index("</summary>")
        for part in ("15.4 GB", "4.3 GB", "0.7 GB", "24.0 GB", "8,192"):
            assert part in strip


def test_ready_strip_says_nothing_of_memory_that_is_not_known():
    assert "<details>" not in status_html(LoadStatus("ready"), BackendInfo("m", 8192), EN)


def test_failed_strip_says_what_happened_and_escapes_it():
    status = LoadStatus("failed", error=CheckpointNotFound(f"No model {EVIL}"))
    strip = status_html(status, None, EN)
    assert 'role="alert"' in strip
    assert "No model &lt;img" in strip


def test_loading_strip_shows_the_step_the_share_and_the_seconds():
    status = LoadStatus(step="Fetch <x>", done=250_000_000, total=1_000_000_000, unit="bytes")
    strip = status_html(status, None, EN)
    for part in ("Fetch &lt;x&gt;", "25 %", "250 / 1,000 MB", 'value="250000000"', "0 s"):
        assert part in strip


def test_loading_without_a_measure_shows_a_bar_without_end():
    strip = status_html(LoadStatus(step="Reading"), None, EN)
    assert "<progress></progress>" in strip
    assert "%" not in strip


def test_loading_line_shows_the_share():
    assert "Reading 50 %" in loading_text(LoadStatus(step="Reading", done=1, total=2), EN)


def test_context_bar_shows_all_numbers():
    bar = context_html(ContextUsage(10, 20, 30, 1000), EN)
    for part in ("System 10", "History 20", "Message 30", "940 of 1,000", "width:1.000%"):
        assert part in bar
    assert "no longer fit" not in bar


def test_context_bar_of_a_remote_engine_marks_estimates_and_says_no_more_than_is_known():
    bar = context_html(ContextUsage(10, 20, 30, 1000, is_estimate=True), EN)
    assert "≈ 20" in bar and "≈ 940" in bar
    bar = context_html(ContextUsage(10, 20, 30, 0, is_estimate=True), EN)
    assert "≈ 20" in bar and " 0" not in bar


def test_strip_leaves_out_what_a_remote_engine_does_not_tell():
    strip = status_html(LoadStatus(stage="ready"), BackendInfo("m", 0, device="r", dtype=""), EN)
    assert "m · r<" in strip


def test_context_bar_never_draws_more_than_the_whole():
    bar = context_html(ContextUsage(0, 0, 5000, 1000), EN)
    assert "width:100.000%" in bar
    assert "0 of 1,000" in bar


def test_context_bar_names_the_dropped_messages_and_escapes_them():
    dropped = tuple(Message("user", f"{EVIL} {n} " + "x" * 100) for n in range(6))
    bar = context_html(ContextUsage(0, 0, 5, 1000, dropped), EN)
    assert "The 6 oldest messages" in bar
    assert bar.count("“") == 4
    assert "<img" not in bar
    assert "x" * 60 not in bar


def test_context_bar_is_empty_while_nothing_is_known():
    assert context_html(None, EN) == ""


def test_versions_are_counted_and_forks_named():
    twice = chat(1).answer("second\nreply", NOTE)
    assert version_text(twice, twice.leaf, EN) == "Version 2 of 2"
    assert version_text(twice, None, EN) == ""
    assert fork_choices(twice) == [("2: second reply", twice.leaf)]
    assert fork_choices(chat(1)) == []


def test_queue_line_tells_place_and_seconds_until_the_turn_has_come():
    assert queue_text(QueuePlace(3, 19.6), EN) == "Number 3 in the queue, about 20 s …"
    assert queue_text(QueuePlace(0, 0.0), EN) == EN("waiting")
