"""The page in a real Chromium, over a scripted backend: what a user does and sees.

Every test ends with three facts about each tab that it opened: no error on the console, no
request to another origin, no traceback on the page.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend, ready, wait_until
from gradio.context import Context
from page_driver import PATIENCE, PageDriver
from playwright.sync_api import APIResponse, Browser, BrowserContext, Route, expect

from qwen.backend import BackendInfo, DeferredBackend, MemoryUse
from qwen.errors import CheckpointNotFound, DoesNotFit, OutOfMemory
from webapp.server import launch_page
from webapp.settings import Settings

pytestmark = pytest.mark.browser

MANY_WORDS = " ".join(f"w{number}" for number in range(400))
PHONE = {"width": 390, "height": 844}


@pytest.fixture
def new_context(chromium: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Make browsers that know nothing of each other."""
    contexts: list[BrowserContext] = []

    def make(**options: Any) -> BrowserContext:
        contexts.append(chromium.new_context(**options))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def open_tab(
    serve_page: Callable[..., str], new_context: Callable[..., BrowserContext]
) -> Iterator[Callable[..., PageDriver]]:
    """Open a tab: `open_tab(url, context=None, **context_options)`.

    Depends on `serve_page` so that the tabs are looked at before their server ends.
    """
    tabs: list[PageDriver] = []

    def make(url: str, context: BrowserContext | None = None, **options: Any) -> PageDriver:
        tabs.append(PageDriver(context or new_context(**options), url))
        return tabs[-1]

    yield make
    for tab in tabs:
        assert tab.problems == []
        assert tab.foreign_requests() == []
        if not tab.page.is_closed():
            assert "Traceback" not in tab.page.content()


@pytest.fixture
def chat(open_tab, serve_page):
    """Serve the page over a fake and open it: `chat(backend, **context_options)`."""

    def make(backend: FakeBackend | DeferredBackend, **options: Any) -> PageDriver:
        return open_tab(serve_page(backend), **options)

    return make


# Chat


def test_enter_sends_and_the_reply_comes_with_its_figures(chat):
    tab = chat(FakeBackend("alpha beta gamma"))
    reply = tab.ask("hello")
    assert "alpha beta gamma" in reply
    assert "3 tokens · 10.0 tokens/s · first token after 0.1 s · complete" in reply
    tab.expect_questions("hello")
    expect(tab.box).to_have_value("")


def test_send_button_sends(chat):
    tab = chat(FakeBackend("alpha"))
    tab.box.fill("hello")
    tab.send_button.click()
    tab.expect_reply("alpha")


def test_shift_enter_breaks_the_line(chat):
    tab = chat(backend := FakeBackend("alpha"))
    tab.box.type("first")
    tab.box.press("Shift+Enter")
    tab.box.type("second")
    expect(tab.box).to_have_value("first\nsecond")
    assert not backend.requests
    tab.box.press("Enter")
    tab.expect_reply("alpha")
    assert backend.requests[0].messages[-1].content == "first\nsecond"


def test_enter_that_confirms_an_input_method_candidate_does_not_send(chat):
    tab = chat(backend := FakeBackend("alpha"))
    tab.box.focus()
    devtools = tab.page.context.new_cdp_session(tab.page)
    devtools.send(
        "Input.imeSetComposition", {"text": "你好", "selectionStart": 2, "selectionEnd": 2}
    )
    tab.page.keyboard.press("Enter")
    devtools.send("Input.insertText", {"text": "你好"})
    expect(tab.box).to_have_value(re.compile("你好"))
    expect(tab.questions).to_have_count(0)
    assert not backend.requests
    tab.box.press("Enter")
    tab.expect_reply("alpha")
    assert "你好" in backend.requests[0].messages[-1].content


def test_reply_is_seen_growing_and_first_before_a_quarter_of_it_exists(chat):
    tab = chat(backend := FakeBackend(MANY_WORDS, pause=0.02))
    tab.send("count")
    tab.expect_reply("w0 ")
    backend.gate.clear()
    seen = [tab.replies.last.inner_text()]
    for _ in range(2):
        backend.gate.set()
        expect(tab.replies.last).not_to_have_text(seen[-1], timeout=PATIENCE)
        backend.gate.clear()
        seen.append(tab.replies.last.inner_text())
    backend.pause = 0
    backend.gate.set()
    tab.wait_for_end()
    tab.expect_reply("w399")
    assert len(seen[0].split()) < 100
    assert len(set(seen)) == 3


def test_stop_in_the_middle_keeps_the_text_and_offers_to_continue(chat):
    tab = chat(backend := FakeBackend(MANY_WORDS, pause=0.02))
    tab.send("count")
    tab.expect_reply("w3 ")
    tab.stop_button.click()
    tab.wait_for_end()
    kept = tab.replies.last.inner_text()
    assert "w0 w1 w2 w3" in kept
    assert "w399" not in kept
    assert "stopped" in kept
    assert backend.active == 0
    expect(tab.action("continue")).to_be_enabled()


def test_stop_pressed_at_once_ends_the_reply(chat):
    tab = chat(backend := FakeBackend(MANY_WORDS, pause=0.02))
    tab.send("count")
    tab.stop_button.click()
    tab.wait_for_end()
    tab.expect_questions("count")
    assert "w399" not in tab.replies.last.inner_text()
    wait_until(lambda: backend.active == 0)
    backend.reply, backend.pause = "still here", 0
    assert "still here" in tab.ask("next")


def test_stop_is_there_and_the_box_empty_while_the_model_is_silent(chat):
    tab = chat(backend := FakeBackend("alpha"))
    backend.gate.clear()
    tab.box.fill("hello")
    tab.send_button.dblclick()
    expect(tab.stop_button).to_be_visible(timeout=PATIENCE)
    expect(tab.send_button).to_be_hidden()
    expect(tab.box).to_have_value("")
    backend.gate.set()
    tab.wait_for_end()
    expect(tab.stop_button).to_be_hidden(timeout=PATIENCE)
    tab.expect_questions("hello")
    assert len(backend.requests) == 1


def test_replies_without_a_pause_leave_the_page_at_rest(chat):
    tab = chat(backend := FakeBackend("alpha"))
    for number in range(10):
        tab.ask(f"q{number}")
        expect(tab.stop_button).to_have_count(0)
        expect(tab.action("undo")).to_be_enabled()
    assert len(backend.requests) == 10


def test_stop_works_while_the_model_is_silent(chat):
    tab = chat(backend := FakeBackend("alpha"))
    backend.gate.clear()
    tab.send("hello")
    tab.expect_reply("Reading your message")
    tab.stop_button.click()
    tab.expect_reply("Stopped before the first word")
    tab.expect_questions("hello")


def test_regenerated_reply_and_the_one_before_are_a_step_apart(chat):
    replies = iter(["first version", "second version"])
    tab = chat(FakeBackend(lambda request: next(replies)))
    tab.ask("hello")
    expect(tab.page.locator("#stepper")).to_be_hidden()
    tab.action("regenerate").click()
    tab.expect_reply("second version")
    expect(tab.page.locator("#version")).to_have_text("Version 2 of 2")
    tab.button("‹").click()
    tab.expect_reply("first version")
    expect(tab.page.locator("#version")).to_have_text("Version 1 of 2")
    tab.button("›").click()
    tab.expect_reply("second version")


def test_earlier_message_is_edited_and_its_old_branch_stays(chat):
    tab = chat(FakeBackend(lambda request: f"reply to {request.messages[-1].content}"))
    tab.ask("one")
    tab.ask("two")
    tab.edit(0, "ONE")
    tab.expect_reply("reply to ONE")
    tab.expect_questions("ONE")
    tab.wait_for_end()
    tab.button("‹").click()
    tab.expect_questions("one", "two")
    tab.expect_reply("reply to two")


def test_cut_reply_is_continued_in_its_place(chat):
    tab = chat(backend := FakeBackend("alpha beta gamma"))
    backend.info = BackendInfo("Fake", 1000)
    tab.open_settings()
    longest = tab.page.get_by_label("number input for Longest reply in tokens")
    longest.fill("16")
    longest.press("Tab")
    backend.reply = MANY_WORDS
    assert "cut at the longest length" in tab.ask("count")
    assert backend.requests[-1].params.max_new_tokens == 16
    backend.reply = "the end"
    tab.action("continue").click()
    tab.expect_reply("w15 the end")
    expect(tab.replies).to_have_count(1)


def test_undo_takes_the_turn_back_and_puts_its_text_into_the_box(chat):
    tab = chat(FakeBackend("alpha"))
    tab.ask("one")
    tab.ask("two")
    tab.action("undo").click()
    tab.expect_questions("one")
    expect(tab.box).to_have_value("two")


def test_clear_begins_anew_for_good(chat):
    tab = chat(FakeBackend("alpha"))
    tab.ask("one")
    tab.action("clear").click()
    expect(tab.questions).to_have_count(0)
    tab.open()
    expect(tab.questions).to_have_count(0)


def test_example_prompt_is_sent_by_a_click(chat):
    tab = chat(backend := FakeBackend("alpha"))
    tab.page.get_by_text("Compare Python, Go and Rust in a table.").click()
    tab.expect_reply("alpha")
    assert backend.requests[0].messages[-1].content == "Compare Python, Go and Rust in a table."


# Refused and failing


def test_empty_message_is_refused_with_an_alert(chat):
    tab = chat(backend := FakeBackend("alpha"))
    tab.send("   ")
    expect(tab.alert).to_contain_text("empty", timeout=PATIENCE)
    assert not backend.requests
    assert "alpha" in tab.ask("hello")
    expect(tab.alert).to_have_count(0)


def test_refused_message_stays_in_the_box_under_an_alert(chat):
    tab = chat(FakeBackend("alpha", limit=50))
    long = "word " * 100 + "end"
    tab.send(long)
    expect(tab.page.locator("#notice").get_by_role("alert")).to_contain_text(
        "too long", timeout=PATIENCE
    )
    expect(tab.box).to_have_value(long)
    expect(tab.questions).to_have_count(0)


def test_seed_beyond_all_bounds_is_refused_and_the_text_stays(chat):
    tab = chat(backend := FakeBackend("alpha"))
    tab.open_settings()
    tab.page.get_by_label("Seed").fill("9" * 30)
    tab.send("hello")
    expect(tab.page.locator("#notice").get_by_role("alert")).to_contain_text(
        "seed must be", timeout=PATIENCE
    )
    expect(tab.box).to_have_value("hello")
    assert not backend.requests


def test_failure_midway_keeps_the_text_so_far_and_the_next_message_works(chat):
    fault = OutOfMemory("Memory ran out while generating. Shorten the conversation.")
    tab = chat(backend := FakeBackend("alpha beta gamma", fault=fault, fault_after=2))
    tab.send("hello")
    tab.expect_reply("alpha beta")
    tab.expect_reply("Memory ran out while generating")
    backend.fault = None
    assert "gamma" in tab.ask("again")
    tab.expect_questions("hello", "again")


# History


def test_history_survives_a_reload(chat):
    tab = chat(FakeBackend("alpha"))
    tab.ask("one")
    tab.open()
    tab.expect_questions("one")
    tab.expect_reply("alpha")
    tab.ask("two")
    tab.expect_questions("one", "two")


def test_history_survives_a_restart_of_the_server(open_tab, open_port):
    settings = Settings(server_port=open_port)
    demo = launch_page(settings, ready(FakeBackend("alpha")))
    try:
        tab = open_tab(f"http://127.0.0.1:{open_port}/")
        tab.ask("one")
        tab.page.goto("about:blank")
    finally:
        demo.close(verbose=False)
    demo = launch_page(settings, ready(backend := FakeBackend("beta")))
    try:
        tab.open()
        tab.expect_questions("one")
        tab.ask("two")
        assert [m.content for m in backend.requests[0].messages[1:]] == ["one", "alpha", "two"]
        tab.page.goto("about:blank")
    finally:
        demo.close(verbose=False)


def test_tab_that_stays_open_over_a_restart_of_the_server_keeps_its_history(
    open_tab, open_port, monkeypatch
):
    settings = Settings(server_port=open_port)
    monkeypatch.setattr(Context, "id", 0)
    demo = launch_page(settings, ready(FakeBackend("alpha")))
    tab = open_tab(f"http://127.0.0.1:{open_port}/")
    tab.ask("one")
    demo.server.force_exit = True  # as when the process ends: it waits for no open page
    demo.close(verbose=False)
    monkeypatch.setattr(Context, "id", 0)  # a new process numbers its components from 0 again
    demo = launch_page(settings, ready(backend := FakeBackend("beta")))
    try:
        tab.ask("two")
        assert [m.content for m in backend.requests[0].messages[1:]] == ["one", "alpha", "two"]
        tab.open()
        tab.expect_questions("one", "two")
        tab.problems.clear()  # the connection to the first server was lost, as it must be
        tab.page.goto("about:blank")
    finally:
        demo.close(verbose=False)


def test_tab_that_the_server_has_forgotten_keeps_its_conversation(
    open_tab, serve_page, monkeypatch
):
    monkeypatch.setattr("webapp.server.SESSIONS_KEPT", 1)
    backend = FakeBackend(lambda request: f"re {request.messages[-1].content}")
    url = serve_page(backend)
    first = open_tab(url)
    first.ask("one")
    open_tab(url).ask("two")  # another browser's
    first.ask("three")
    said = [m.content for m in backend.requests[-1].messages[1:]]
    assert said == ["one", "re one", "three"]
    first.expect_questions("one", "three")


def test_reply_stays_when_the_answer_that_opens_the_page_comes_after_it(
    open_tab, serve_page, new_context
):
    url = serve_page(FakeBackend("alpha beta"))
    events = httpx.get(url + "config").json()["dependencies"]
    (opening,) = (event["id"] for event in events if event["api_name"] == "open_page")
    late: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        if route.request.post_data_json["fn_index"] == opening:
            late.append((route, route.fetch()))
        else:
            route.continue_()

    context = new_context()
    context.route("**/run/predict*", hold)
    tab = open_tab(url, context)
    tab.send("hello")
    tab.expect_reply("alpha beta")
    tab.wait_for_end()
    ((route, answer),) = late
    with tab.page.expect_response(lambda r: f'"fn_index":{opening},' in r.request.post_data):
        route.fulfill(response=answer)
    tab.page.wait_for_timeout(1000)  # what is wrongly shown would be shown by now
    assert tab.texts()[0] == "hello"
    tab.expect_reply("alpha beta")
    tab.ask("again")
    tab.expect_questions("hello", "again")


def test_two_browsers_see_nothing_of_each_other(open_tab, serve_page):
    url = serve_page(FakeBackend(lambda request: f"re {request.messages[-1].content}"))
    first, second = open_tab(url), open_tab(url)
    first.ask("secret of the first")
    second.ask("secret of the second")
    for tab, other in ((first, "second"), (second, "first")):
        assert f"secret of the {other}" not in tab.page.content()
        tab.open()
        expect(tab.questions).to_have_count(1)
        assert f"secret of the {other}" not in tab.page.content()


def test_second_tab_opens_with_the_history_and_each_shows_what_the_other_wrote(
    open_tab, serve_page, new_context
):
    backend = FakeBackend(lambda request: f"re {request.messages[-1].content}")
    url, context = serve_page(backend), new_context()
    first = open_tab(url, context)
    first.ask("one")
    second = open_tab(url, context)
    second.expect_questions("one")
    first.box.fill("half a message")
    second.ask("two")
    first.expect_questions("one", "two")  # it has loaded again by itself
    expect(first.box).to_have_value("half a message")
    expect(first.other_tab_notice).not_to_be_visible()
    first.ask("three")
    said = [m.content for m in backend.requests[-1].messages[1:]]
    assert said == ["one", "re one", "two", "re two", "three"]
    second.expect_questions("one", "two", "three")
    expect(second.alert).to_have_count(0)


def test_two_tabs_stream_at_the_same_time(open_tab, serve_page, new_context):
    backend = FakeBackend(MANY_WORDS, pause=0.02)
    url, context = serve_page(backend), new_context()
    first, second = open_tab(url, context), open_tab(url, context)
    first.send("one")
    second.send("two")
    first.expect_reply("w1 ")
    second.expect_reply("w1 ")
    first.stop_button.click()
    first.wait_for_end()
    expect(second.stop_button).to_be_visible()
    second.stop_button.click()
    second.wait_for_end()
    for tab, question in ((first, "one"), (second, "two")):
        expect(tab.other_tab_notice).to_be_visible()
        tab.expect_questions(question)  # neither has thrown its own away


def test_long_message_is_edited_in_a_box_of_the_chats_width(chat):
    tab = chat(FakeBackend("re"))
    tab.ask("short")
    tab.page.locator('#chat button[aria-label="Edit"]').click()
    field, chat_log = tab.page.locator("#chat textarea"), tab.page.locator("#chat")
    assert field.bounding_box()["width"] > 0.7 * chat_log.bounding_box()["width"]
    assert field.bounding_box()["height"] > 100


def test_negative_seed_is_refused_and_the_conversation_stays_in_sight(chat):
    tab = chat(FakeBackend("re"))
    tab.ask("one")
    tab.open_settings()
    tab.page.get_by_label("Seed").fill("-5")
    tab.box.fill("two")
    tab.box.press("Enter")
    expect(tab.alert).to_contain_text("seed must be")
    expect(tab.box).to_have_value("two")
    tab.expect_questions("one")


@pytest.mark.parametrize("silent", [False, True], ids=["speaking", "silent"])
def test_closed_tab_stops_its_reply(chat, silent):
    tab = chat(backend := FakeBackend(MANY_WORDS, pause=0.02))
    if silent:
        backend.gate.clear()
    tab.send("count")
    tab.expect_reply("Reading your message" if silent else "w1 ")
    assert backend.active == 1
    tab.page.close()
    wait_until(lambda: backend.active == 0)


# Loading


def loading(*outcomes: FakeBackend | Exception) -> tuple[DeferredBackend, threading.Semaphore]:
    """A backend whose loading ends with the next outcome at each release of the semaphore."""
    gate, ends = threading.Semaphore(0), iter(outcomes)

    def load(report):
        report("Downloading the model", done=250_000_000, total=1_000_000_000, unit="bytes")
        gate.acquire()
        outcome = next(ends)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    deferred = DeferredBackend(load)
    deferred.start()
    return deferred, gate


def test_page_is_up_while_the_model_loads_and_answers_without_a_reload(chat):
    deferred, gate = loading(FakeBackend("alpha", info=BackendInfo("Tiny Qwen", 32768)))
    tab = chat(deferred)
    strip = tab.page.locator("#status")
    expect(strip).to_contain_text("Downloading the model 25 % (250 / 1,000 MB)")
    tab.send("early")
    tab.expect_reply("Downloading the model 25 %")
    gate.release()
    tab.expect_reply("alpha")
    expect(strip).to_contain_text("Tiny Qwen", timeout=PATIENCE)
    expect(strip.locator("progress")).to_have_count(0)


def test_failed_load_says_why_and_try_again_loads(chat):
    missing = CheckpointNotFound("No model is called Kwen.")
    deferred, gate = loading(missing, FakeBackend("alpha"))
    gate.release()
    tab = chat(deferred)
    expect(tab.alert).to_contain_text("No model is called Kwen.", timeout=PATIENCE)
    tab.send("hello")
    expect(tab.page.locator("#notice")).to_contain_text("Kwen")
    expect(tab.box).to_have_value("hello")
    tab.button("Try again").click()
    expect(tab.page.locator("#status")).to_contain_text("Downloading", timeout=PATIENCE)
    gate.release()
    expect(tab.page.locator("#status")).to_contain_text("Fake", timeout=PATIENCE)
    expect(tab.button("Try again")).to_be_hidden()
    assert "alpha" in tab.ask("hello")


def test_model_that_does_not_fit_is_refused_on_the_page_line_by_line(chat):
    refused = DoesNotFit("Qwen-7B-Chat does not fit: 34.22 GB.\nNeeded: weights 15.44 GB.")
    deferred, gate = loading(refused, FakeBackend("alpha"))
    gate.release()
    tab = chat(deferred)
    expect(tab.alert).to_contain_text("does not fit", timeout=PATIENCE)
    assert "34.22 GB.\nNeeded" in tab.alert.inner_text()


def test_memory_of_the_model_opens_under_its_name(chat):
    backend = FakeBackend("alpha")
    gb = 10**9
    use = MemoryUse(weights=2 * gb, cache=gb, activations=gb, program=gb, context=4096, free=8 * gb)
    backend.info = replace(backend.info, memory=use)
    tab = chat(backend)
    strip = tab.page.locator("#status .strip")
    expect(strip.locator("details")).not_to_contain_text("cache", use_inner_text=True)
    strip.locator("summary", has_text="Memory: 5.0 GB of 8.0 GB").click()
    expect(strip).to_contain_text("cache of 4,096 tokens 1.0 GB", use_inner_text=True)


# Base model


def test_base_model_completes_text_in_its_place_and_stops(chat):
    backend = FakeBackend(MANY_WORDS, pause=0.02, info=BackendInfo("Base", 1000, is_chat=False))
    tab = chat(backend)
    text = tab.page.locator("#completion-text textarea")
    text.wait_for()
    expect(tab.box).to_be_hidden()
    text.fill("Once upon ")
    tab.page.locator("#complete").click()
    expect(text).to_have_value(re.compile(r"^Once upon w0 w1 "), timeout=PATIENCE)
    tab.page.locator("#stop-completion").click()
    expect(tab.page.locator("#completion-note")).to_contain_text("stopped", timeout=PATIENCE)
    assert "w399" not in text.input_value()
    assert backend.requests[0].raw_prompt == "Once upon "
    backend.reply, backend.pause = "the end", 0
    tab.page.locator("#complete").click()
    expect(text).to_have_value(re.compile(r"w1 .*the end$"), timeout=PATIENCE)


# Context bar, copies, look


def test_context_bar_counts_while_typing_and_names_the_turns_that_drop_out(chat):
    tab = chat(FakeBackend("reply " * 9 + "end", limit=30))
    tab.ask("the first question")
    bar = tab.page.locator("#context")
    expect(bar).to_contain_text("System 5")
    expect(bar).to_contain_text("History 13")
    expect(bar).to_contain_text("12 of 30 tokens left")
    tab.box.type("x " * 20)
    expect(bar).to_contain_text("Message 20", timeout=PATIENCE)
    expect(bar.get_by_role("status")).to_contain_text("the first question")


@pytest.mark.parametrize("kind", ["HTML", "JSON", "Markdown"])
def test_saved_copy_holds_the_conversation(chat, kind):
    tab = chat(FakeBackend("not **much**"))
    tab.ask("what is up 你好")
    tab.open_settings()
    with tab.page.expect_download() as download:
        tab.button(kind).click()
    copy = download.value.path().read_text("utf-8")
    assert "what is up 你好" in copy
    assert "much" in copy
    assert download.value.suggested_filename.startswith("qwen-chat-")
    if kind == "JSON":
        assert "not **much**" in json.dumps(json.loads(copy))


def test_phone_shows_box_and_send_without_scrolling_sideways(chat):
    wide = "| " + " | ".join(f"column{n}" for n in range(20)) + " |\n|" + "---|" * 20
    tab = chat(FakeBackend(f"```\n{'x' * 300}\n```\n\n{wide}\n\n{'y' * 300}"), viewport=PHONE)

    def check():
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for part in (tab.box, tab.send_button, tab.action("clear")):
            spot = part.bounding_box()
            assert spot["x"] >= 0
            assert spot["x"] + spot["width"] <= PHONE["width"]
            assert spot["y"] + spot["height"] <= PHONE["height"]

    check()
    tab.ask("show me something wide " + "z" * 200)
    check()


CONTRAST_JS = """(element) => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map((c) => {
      c /= 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  const see_through = (e) => /, 0\\)$|transparent/.test(getComputedStyle(e).backgroundColor);
  while (behind.parentElement && see_through(behind)) behind = behind.parentElement;
  const text = luminance(getComputedStyle(element).color);
  const back = luminance(getComputedStyle(behind).backgroundColor);
  return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
}"""


def test_light_and_dark_follow_the_system_and_both_are_readable(open_tab, serve_page):
    url, colours = serve_page(FakeBackend("alpha")), set()
    for scheme in ("light", "dark"):
        tab = open_tab(url, color_scheme=scheme)
        tab.ask("hello")
        colours.add(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for text in (
            tab.replies.last.locator("p").first,
            tab.questions.last.locator("p").first,
            tab.replies.last.locator("small.note"),
            tab.box,
            tab.send_button,
            tab.page.locator("#status .strip"),
            tab.page.locator("#context .key").first,
        ):
            # 4.5 is what WCAG 2.2 asks of text of this size (AA).
            assert text.evaluate(CONTRAST_JS) >= 4.5, (scheme, text)
    assert len(colours) == 2


def test_theme_button_switches_between_light_and_dark(chat):
    tab = chat(FakeBackend("alpha"), color_scheme="light")
    body = tab.page.locator("body")
    tab.open_settings()
    tab.button("◐ Light / dark").click()
    expect(body).to_have_class(re.compile(r"\bdark\b"))
    tab.button("◐ Light / dark").click()
    expect(body).not_to_have_class(re.compile(r"\bdark\b"))


@pytest.mark.parametrize(
    ("locale", "send", "regenerate", "example"),
    [
        ("zh-CN", "发送", "↻ 重新生成", "用表格比较 Python、Go 和 Rust。"),
        ("ja-JP", "送信", "↻ 再生成", "Python、Go、Rust を表で比較してください。"),
    ],
)
def test_page_speaks_the_language_of_the_browser(chat, locale, send, regenerate, example):
    tab = chat(FakeBackend("alpha"), locale=locale)
    expect(tab.send_button).to_have_text(send)
    expect(tab.action("regenerate")).to_have_text(regenerate)
    tab.page.get_by_text(example).click()
    tab.expect_reply("alpha")


def test_settings_are_reached_by_keyboard_only_while_their_panel_is_open(chat):
    tab = chat(FakeBackend("alpha"))
    prompt = tab.page.locator(".sidebar textarea")
    expect(prompt).to_be_hidden()
    tab.open_settings()
    expect(prompt).to_be_visible()
    tab.open_settings()
    expect(prompt).to_be_hidden()


def test_message_box_has_a_name_for_screen_readers(chat):
    tab = chat(FakeBackend("alpha"))
    expect(tab.page.get_by_label("Message", exact=True)).to_be_visible()
