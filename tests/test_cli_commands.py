"""Commands, settings and files of the terminal chat, without a terminal."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from qwen.cli_commands import BY_NAME, CommandLine, changed_params
from qwen.cli_input import open_history
from qwen.cli_session import ChatSession
from qwen.errors import BackendFailed, InvalidRequest, InvalidSetting, QwenError
from qwen.messages import SamplingParams, StreamEvent


class Output:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.cleared = 0

    def say(self, text: str, *, style: str = "") -> None:
        self.lines.append(text)

    note = markdown = say

    def clear(self) -> None:
        self.cleared += 1


class Chat:
    """A conversation with a scripted backend, and its command line."""

    def __init__(self, backend: FakeBackend | None = None, **options: object) -> None:
        self.backend = backend or FakeBackend(lambda r: f"reply {len(self.backend.requests)}")
        self.session = ChatSession(self.backend, **options)
        self.output = Output()
        self.line = CommandLine(self.session, self.output, self.show)

    def show(self, stream: Callable[[threading.Event], Iterator[StreamEvent]]) -> None:
        list(stream(threading.Event()))

    def ask(self, text: str) -> None:
        list(self.session.ask(text, threading.Event()))

    @property
    def texts(self) -> list[str]:
        return [message.content for message, _ in self.session.entries]


def test_every_command_of_the_reference_is_there_with_its_short_forms():
    assert {
        *("help", "h", "exit", "quit", "q", "clear", "cl", "clear-his", "clh"),
        *("history", "his", "seed", "conf", "reset-conf"),
        *("system", "save", "load", "regen", "undo", "tokens"),
    } == set(BY_NAME)


def test_help_names_every_command():
    chat = Chat()
    chat.line.run(":help")
    assert all(f":{name}" in chat.output.lines[0] for name in BY_NAME)


@pytest.mark.parametrize("line", ["hello", " :exit", ":)", ": exit", "::", "a :exit", ""])
def test_a_message_is_no_command(line):
    assert Chat().line.run(line) is None


@pytest.mark.parametrize("line", [":exit", ":quit", ":q", ":Q", ":exit "])
def test_exit_leaves(line):
    assert Chat().line.run(line) == "leave"


@pytest.mark.parametrize("line", [":nonsense", ":helpme", ":conf-x", ":h now", ":undo 3"])
def test_what_is_unknown_is_refused_by_name(line):
    with pytest.raises(InvalidRequest, match=line.split()[0]):
        Chat().line.run(line)


def test_regen_replaces_the_reply_and_draws_another_seed():
    chat = Chat(seed=5)
    chat.ask("hi")
    chat.line.run(":regen")
    assert chat.texts == ["hi", "reply 2"]
    assert [r.params.seed for r in chat.backend.requests] == [5, 6]
    chat.ask("next")
    assert chat.backend.requests[-1].params.seed == 5


def test_a_failed_regen_keeps_the_old_reply():
    chat = Chat()
    chat.ask("hi")
    chat.backend.fault = BackendFailed("no")
    with pytest.raises(BackendFailed):
        chat.line.run(":regen")
    assert chat.texts == ["hi", "reply 1"]


def test_a_reply_that_fails_midway_is_kept_as_far_as_it_came():
    chat = Chat(FakeBackend("one two three", fault=BackendFailed("no"), fault_after=2))
    with pytest.raises(BackendFailed):
        chat.ask("hi")
    assert chat.texts == ["hi", "one two "]


@pytest.mark.parametrize("line", [":regen", ":undo"])
def test_without_a_conversation_there_is_nothing_to_take_back(line):
    with pytest.raises(InvalidRequest):
        Chat().line.run(line)


def test_undo_and_clear():
    chat = Chat()
    chat.ask("one")
    chat.ask("two")
    chat.line.run(":undo")
    assert chat.texts == ["one", "reply 1"]
    chat.line.run(":clear-his")
    assert chat.texts == []
    chat.line.run(":clear")
    assert chat.output.cleared == 1


def test_the_system_prompt_is_sent_and_can_be_taken_away():
    chat = Chat(system_prompt="first")
    for line, roles in ((":system Be brief.", 2), (":system none", 1)):
        chat.line.run(line)
        chat.ask("hi")
        chat.session.clear()
        assert len(chat.backend.requests[-1].messages) == roles
    assert chat.backend.requests[0].messages[0].content == "Be brief."


def test_conf_changes_all_or_nothing():
    chat = Chat()
    chat.line.run(":conf temperature=0.3 top_k=5 max_new_tokens=7")
    assert (chat.session.params.temperature, chat.session.params.top_k) == (0.3, 5)
    with pytest.raises(InvalidSetting):
        chat.line.run(":conf temperature=0.9 top_k=-1")
    assert chat.session.params.temperature == 0.3
    chat.line.run(":reset-conf")
    assert chat.session.params == chat.session.default_params


@pytest.mark.parametrize(
    ("argument", "stop"),
    [
        ("stop=END", ("END",)),
        (r'stop="\n\n"', ("\n\n",)),
        ('stop=["a b", "c"]', ("a b", "c")),
        ("stop=none", ()),
        ("stop=", ()),
    ],
)
def test_stop_texts_can_be_said(argument, stop):
    assert changed_params(SamplingParams(), argument).stop == stop


@pytest.mark.parametrize(
    "argument",
    [
        "temperature=hot",
        "temperature=3",
        "temperature=nan",
        "temperature=1e999",
        "top_k=1.5",
        "do_sample=True",
        "__class__=1",
        "temperature = 1",
        "temperature",
        "stop=[1]",
        'stop="open',
        "seed=__import__('os').system('true')",
        "temperature=" + "9" * 5000,
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_evaluated(argument):
    with pytest.raises(InvalidSetting):
        changed_params(SamplingParams(), argument)


@given(st.text())
def test_any_line_is_a_message_a_command_or_refused(text):
    chat = Chat()
    try:
        assert chat.line.run(":conf " + text) == "go on"
    except QwenError:
        assert chat.session.params == chat.session.default_params


@pytest.mark.parametrize(("argument", "seed"), [("7", 7), ("none", None), ("0", 0)])
def test_seed_is_set_and_shown(argument, seed):
    chat = Chat(seed=3)
    chat.line.run(f":seed {argument}")
    assert chat.session.params.seed == seed


def test_history_shows_both_sides():
    chat = Chat()
    chat.ask("my question")
    chat.line.run(":his")
    assert any("my question" in line for line in chat.output.lines)
    assert "reply 1" in chat.output.lines


def test_tokens_counts_the_conversation():
    chat = Chat(system_prompt="two words")
    chat.ask("one two three")
    chat.line.run(":tokens")
    assert "system 2, history 5" in chat.output.lines[-1]


def test_save_and_load_bring_everything_back(tmp_path):
    chat = Chat(system_prompt="Sei kurz.")
    chat.ask("你好")
    chat.line.run(f":save {tmp_path / 'a b.json'}")
    other = Chat(system_prompt="else")
    other.line.run(f":load {tmp_path / 'a b.json'}")
    assert other.session.entries == chat.session.entries
    assert other.session.system_prompt == "Sei kurz."
    chat.line.run(f":save {tmp_path / 'a b.json'}")  # another saved conversation may be replaced
    assert not list(tmp_path.glob("*.part"))


def test_save_leaves_other_files_alone(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(InvalidRequest, match="left alone"):
        Chat().line.run(f":save {file}")
    assert file.read_text() == "years of work"


@pytest.mark.parametrize(
    "line", [":save", ":load", ":load /nowhere/x", ":save /nowhere/x", ":load /"]
)
def test_files_that_cannot_be_are_refused(line):
    with pytest.raises(InvalidRequest):
        Chat().line.run(line)


@pytest.mark.parametrize("text", ["", "{}", "[", "[]", '{"format": "qwen-chat-transcript"}'])
def test_load_refuses_other_files_and_keeps_the_conversation(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    chat = Chat()
    chat.ask("hi")
    with pytest.raises(InvalidRequest, match=":save"):
        chat.line.run(f":load {file}")
    assert chat.texts == ["hi", "reply 1"]


def test_what_the_page_exports_can_be_loaded(tmp_path):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "note": "3 tokens"},
        {"role": "user", "content": "never answered"},
    ]
    document = {
        "format": "qwen-chat-transcript", "version": 1, "title": "t", "model": "m",
        "created": "2026-01-01T00:00:00+00:00", "system_prompt": "s", "messages": messages,
    }  # fmt: skip
    file = tmp_path / "x.json"
    file.write_text(json.dumps(document))
    chat = Chat()
    chat.line.run(f":load {file}")
    assert chat.texts == ["q", "a"]
    assert chat.session.system_prompt == "s"


def test_a_history_file_that_others_could_read_is_closed_to_them(tmp_path):
    file = tmp_path / "chat-history"
    file.write_text("")
    file.chmod(0o644)
    open_history(file).append_string("secret")
    assert os.stat(file).st_mode & 0o077 == 0
    assert "secret" in file.read_text()


def test_a_history_that_cannot_be_kept_stays_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    history = open_history(Path(tmp_path / "file" / "chat-history"))
    history.append_string("x")
    assert list(history.get_strings()) == ["x"]


def test_a_huge_history_loses_its_older_half(tmp_path):
    file = tmp_path / "chat-history"
    file.write_text("\n# 2026\n+old entry\n" * 200_000)
    open_history(file)
    assert file.stat().st_size < 1_100_000
    assert file.stat().st_mode & 0o077 == 0
