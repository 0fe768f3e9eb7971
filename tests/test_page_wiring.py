"""Which event updates what: a reply streams to few outputs, the rest follows."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from stranger import Stranger, controls

from webapp.page_updates import FRAME_VIEW

REPLIES = ("send", "send_example", "edit", "regenerate", "continue_reply", "complete")


@pytest.fixture
def url(serve_page) -> str:
    return serve_page(FakeBackend("alpha beta"))


def events(url: str) -> dict[str, Any]:
    config = httpx.get(url + "config").json()
    return {event["api_name"]: event for event in config["dependencies"]}


@pytest.mark.parametrize("name", REPLIES)
def test_reply_streams_to_one_component_and_states_only(url, name):
    config = httpx.get(url + "config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    outputs = [kinds.get(output, "state") for output in events(url)[name]["outputs"]]
    assert len(outputs) == 3
    assert len([kind for kind in outputs if kind != "state"]) == 1


def test_new_turn_of_a_reply_triggers_what_follows_once_at_its_begin_and_once_at_its_end(url):
    follow = events(url)["follow"]
    ((turn, trigger),) = follow["targets"]
    assert trigger == "change"
    assert len(follow["outputs"]) == len(FRAME_VIEW)
    messages = Stranger(url).send("hello")
    changes = [m for m in messages if turn in m.get("output", {}).get("changed_state_ids", [])]
    assert len(changes) == 2


def test_whole_reply_comes_with_the_one_event_that_sends(url):
    stranger = Stranger(url)
    stranger.join("send", "hello", None, None, *controls())
    with stranger.listening() as messages:
        shown = str(list(messages)[-1]["output"]["data"])
    assert "alpha beta" in shown
    assert "2 token" in shown
