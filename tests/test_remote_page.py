"""`python app.py --base-url …`: the page before a scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from conftest import RunningApp
from scripted_engine import HELLO, ScriptedEngine, chunk, fails, hangs, says
from stranger import Stranger

KEY = "sk-private-4711"


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as scripted:
        scripted.models.append({"id": "second"})
        yield scripted


@pytest.fixture
def open_page(
    engine: ScriptedEngine, run_app: Callable[..., RunningApp], open_port: int
) -> Iterator[tuple[RunningApp, Stranger]]:
    app = run_app(
        *("--server-port", str(open_port), "--base-url", engine.url, "--api-key-env", "MY_KEY"),
        env={"MY_KEY": KEY},
    )
    app.wait_for("The model is ready")
    app.wait_for(f"Open http://127.0.0.1:{open_port}")
    stranger = Stranger(f"http://127.0.0.1:{open_port}/")
    yield app, stranger
    stranger.client.close()


def test_the_page_shows_the_engines_reply_and_neither_key_nor_address(engine, open_page):
    app, stranger = open_page
    engine.acts += [HELLO, fails(401, {"error": {"message": f"Incorrect API key {KEY}"}})]
    seen = str(stranger.send("hi"))
    assert "Hello there" in seen
    seen += str(stranger.send("again"))
    assert "wants another key" in seen
    seen += str(stranger.open()) + stranger.instant("show_status", None, *[None] * 7).text
    seen += stranger.client.get("").text + stranger.client.get("config").text
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in engine.headers)
    assert KEY not in seen + app.output
    assert str(engine.port) not in seen


def test_the_api_lists_all_models_of_the_engine_and_answers_with_each(engine, open_page):
    _, stranger = open_page
    listed = stranger.client.get("v1/models").json()["data"]
    assert [(card["id"], card["context_length"]) for card in listed] == [
        ("scripted", 4096),
        ("second", 0),
    ]
    assert stranger.client.get("v1/models/second").json() == listed[1]
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for asked, named, sent in [
        ("second", "second", "second"),
        ("scripted", "scripted", "scripted"),
        ("Qwen", "scripted", "scripted"),
    ]:
        answer = stranger.client.post("v1/chat/completions", json=body | {"model": asked}).json()
        assert answer["choices"][0]["message"]["content"] == "Hello there"
        assert (answer["model"], engine.bodies[-1]["model"]) == (named, sent)
    raw = {"model": "second", "prompt": "hi"}
    engine.acts.append(says({"choices": [{"text": "on", "finish_reason": "stop"}]}))
    assert stranger.client.post("v1/completions", json=raw).json()["model"] == "second"
    assert engine.bodies[-1]["model"] == "second"
    answer = stranger.client.post("v1/chat/completions", json=body | {"model": "third"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert stranger.client.get("v1/models/third").status_code == 404


def test_the_page_shows_thoughts_while_there_is_no_text(engine, open_page):
    _, stranger = open_page
    engine.acts.append(hangs(chunk(reasoning="carrying the one")))
    with stranger.sending("1 + 1") as growing:
        assert any("carrying the one" in str(message) for message in growing)


def test_the_page_says_that_the_engine_broke_off_and_keeps_the_text(engine, open_page):
    _, stranger = open_page
    engine.acts.append(says(chunk("half a reply"), done=False))
    last = str(stranger.send("hi")[-1])
    assert "half a reply" in last and "before it was complete" in last
    assert "Hello there" in str(stranger.send("again"))
