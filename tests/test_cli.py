"""The terminal chat in a pseudo-terminal and in pipes, over a scripted backend."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, PROJECT, Terminal

SCRIPTED = str(PROJECT / "tests" / "scripted_cli.py")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
        "QWEN_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }


@pytest.fixture
def chat(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """Open the terminal chat and wait for its first prompt."""
    running: list[Terminal] = []

    def start(*arguments: str, **more: str) -> Terminal:
        running.append(Terminal(SCRIPTED, *arguments, env={**env, **more}))
        running[-1].wait_for("You>")
        return running[-1]

    yield start
    for terminal in running:
        terminal.__exit__()


def say(terminal: Terminal, line: str, expected: str, *, times: int = 1) -> None:
    """Type a line and wait for a text, and for the next prompt."""
    prompts = terminal.screen.count("You>")
    terminal.type(line + ENTER)
    terminal.wait_for(expected, times=times)
    terminal.wait_for("You>", times=prompts + 1)


def pipe(env: dict[str, str], text: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, SCRIPTED, *arguments],
        input=text,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **env},
        cwd=PROJECT,
        timeout=60,
    )


def test_a_question_gets_its_reply_and_ctrl_d_leaves(chat):
    terminal = chat()
    say(terminal, "hi", "hello there")
    say(terminal, "again", "heard 'again' after 4 messages")
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(chat):
    terminal = chat()
    terminal.type("slow" + ENTER)
    terminal.wait_for("word10")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped")
    terminal.wait_for("You>", times=2)
    assert "word999" not in terminal.screen
    assert terminal.screen.count("word0 ") == 1  # an echoed ^C would leave a drawing behind
    say(terminal, "and now", "heard 'and now' after 4 messages")
    say(terminal, ":history", "word10", times=2)


def test_an_impatient_second_ctrl_c_does_not_cost_the_conversation(chat):
    terminal = chat()
    say(terminal, "hi", "hello there")
    terminal.type("stuck" + ENTER)
    terminal.wait_for("heard")
    terminal.type(CTRL_C)
    time.sleep(0.5)
    terminal.type(CTRL_C)
    terminal.wait_for("Interrupted")
    say(terminal, "and now", "heard 'and now' after 6 messages")


def test_ctrl_c_at_the_prompt_empties_the_line_and_stays(chat):
    terminal = chat()
    terminal.type("half a sente" + CTRL_C)
    say(terminal, "hi", "hello there")


def test_markdown_is_rendered_and_html_like_text_kept(chat):
    terminal = chat()
    say(terminal, "markdown", "x = 1")
    screen = terminal.screen
    assert "Vector<int>" in screen
    assert "\nSecond line." in screen
    assert "# Heading" not in screen
    assert "**bold**" not in screen
    assert "```" not in screen


def test_a_reply_longer_than_the_screen_is_all_there_once(chat):
    terminal = chat()
    say(terminal, "lines", "line 99")
    for number in range(100):
        assert terminal.screen.split().count(str(number)) == 1, number


def test_escape_sequences_of_a_reply_do_not_reach_the_terminal(chat):
    terminal = chat()
    say(terminal, "escape", "after")
    assert "before ␛]0;owned␇␛[2J\ufffd31m after" in terminal.screen
    assert b"\x1b]0;owned" not in terminal.raw
    assert b"\x1b[2J" not in terminal.raw.split(b"before")[1]
    assert b"\xc2\x9b" not in terminal.raw


@pytest.mark.parametrize("new_line", [ALT_ENTER, "\\" + ENTER])
def test_alt_enter_and_a_trailing_backslash_begin_a_line(chat, new_line):
    terminal = chat()
    say(terminal, f"one{new_line}two", r"heard 'one\ntwo'")


def test_a_paste_keeps_its_lines_and_is_not_sent_by_itself(chat):
    terminal = chat()
    terminal.type("\x1b[200~one\ntwo\n:exit\x1b[201~")
    terminal.wait_for(":exit")
    assert "heard" not in terminal.screen
    say(terminal, "", r"heard 'one\ntwo\n:exit'")


def test_a_paste_of_10000_lines_is_one_message(chat):
    terminal = chat()
    terminal.type("\x1b[200~" + "line\n" * 10_000 + "last of them\x1b[201~")
    terminal.wait_for("last of them")
    terminal.type(ENTER)
    terminal.wait_for("The prompt is too long.")
    terminal.type("hi" + ENTER)
    terminal.wait_for("hello there")


def test_history_is_kept_for_the_next_start_in_a_private_file(chat, tmp_path):
    first = chat()
    say(first, "remember me", "heard")
    first.type(CTRL_D)
    first.end()
    file = tmp_path / "cache" / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    say(chat(), "\x1b[A", "heard 'remember me' after 2 messages")


def test_an_error_is_told_and_the_chat_goes_on(chat):
    terminal = chat()
    say(terminal, "fail", "It broke. Try again.")
    say(terminal, "hi", "hello there")


def test_commands_have_effect(chat, tmp_path):
    terminal = chat("--seed", "7")
    say(terminal, "settings", "t=0.5 seed=7 stop=() system=You are a helpful assistant.")
    say(terminal, ":conf temperature=0.25 stop=END", "temperature=0.25")
    say(terminal, ":seed 99", "seed=99")
    say(terminal, ":system Be brief.", "system prompt: Be brief.")
    say(terminal, "settings", "t=0.25 seed=99 stop=('END',) system=Be brief.")
    say(terminal, ":reset-conf", "temperature=0.5")
    say(terminal, ":tokens", "left")
    say(terminal, ":undo", "1 turn left")
    say(terminal, f":save {tmp_path / 'kept.json'}", "Saved 1 turn")
    say(terminal, ":clh", "1 turn forgotten")
    say(terminal, "hi", "hello there")
    say(terminal, f":load {tmp_path / 'kept.json'}", "Loaded 1 turn")
    say(terminal, "next", "heard 'next' after 4 messages")
    say(terminal, ":regen", "heard 'next' after 4 messages", times=2)
    say(terminal, ":nonsense", "There is no command :nonsense")
    say(terminal, ":h", "show this list")
    say(terminal, ":)", "heard ':)'")
    terminal.type(":q" + ENTER)
    assert terminal.end() == 0
    assert json.loads((tmp_path / "kept.json").read_text())["format"] == "qwen-chat-transcript"


def test_a_pipe_gets_the_reply_alone(env):
    ran = pipe(env, b"hi\n")
    assert (ran.returncode, ran.stdout) == (0, b"hello there\n")
    assert ran.stderr == b"Loading something \xe2\x80\xa6\n"


def test_a_piped_question_gets_the_reply_alone_on_a_terminal_too(env):
    code = f"import subprocess, sys; subprocess.run([sys.executable, {SCRIPTED!r}], input=b'hi')"
    with Terminal("-c", code, env=env) as terminal:
        assert terminal.end() == 0
        terminal.wait_for("hello there")
        assert terminal.screen.strip() == "hello there"


def test_a_pipe_is_one_question_with_all_its_lines_and_no_commands(env):
    ran = pipe(env, b":help\nsecond line\n")
    assert ran.stdout == rb"heard ':help\nsecond line' after 2 messages" + b"\n"


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_an_empty_pipe_is_a_failure(env, text):
    ran = pipe(env, text)
    assert ran.returncode == 1
    assert ran.stdout == b""
    assert b"Nothing came through the pipe" in ran.stderr


def test_a_failed_reply_ends_with_1_and_keeps_what_was_said(env):
    ran = pipe(env, b"fail")
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert b"Error: It broke. Try again." in ran.stderr


def test_a_model_that_cannot_be_loaded_ends_with_1(env):
    ran = pipe(env | {"BROKEN": "1"}, b"hi")
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert b"Error: There is no model. Get one." in ran.stderr


def test_a_reader_that_leaves_is_no_traceback(env):
    ran = subprocess.run(
        ["bash", "-c", f"echo slow | {sys.executable} {SCRIPTED} | head -c 20"],
        capture_output=True,
        env={"PATH": os.environ["PATH"], **env},
        timeout=60,
    )
    assert ran.stdout == b"word0 word1 word2 wo"
    assert b"Traceback" not in ran.stderr and b"BrokenPipe" not in ran.stderr


def test_ctrl_c_on_a_pipe_keeps_what_was_said_and_ends_with_130(env):
    process = subprocess.Popen(
        [sys.executable, SCRIPTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], **env},
    )
    with process:
        process.stdin.write(b"slow")
        process.stdin.close()
        first = process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert first == b"word0"
    assert rest.endswith(b"\n") and b"word999" not in rest


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seed", "-1"], b"whole number"),
        (["--base-url", "ftp://x"], b"address"),
        (["--base-url", "http://x/v1", "-c", "auto"], b"contradict"),
        (["--model", "m"], b"--base-url"),
    ],
)
def test_wrong_flags_end_with_2_and_a_reason(env, arguments, reason):
    ran = pipe(env, b"hi", *arguments)
    assert ran.returncode == 2
    assert reason in ran.stderr


@pytest.mark.integration
def test_the_embedded_model_chats_in_a_terminal_and_remembers(embedded_folder, env, tmp_path):
    cache = Path(env["QWEN_CACHE"])
    cache.mkdir()
    for folder in embedded_folder.parent.parent.iterdir():
        if folder.is_dir():  # the weights, but not the history of whoever runs the tests
            (cache / folder.name).symlink_to(folder)
    with Terminal("-m", "qwen.cli", "--cpu-only", "-s", "1", env=env) as terminal:
        terminal.wait_for("You>", seconds=180)
        assert "Qwen2.5-Coder-0.5B-Instruct" in terminal.screen
        say(terminal, ":conf temperature=0 max_new_tokens=40", "temperature=0")
        say(terminal, "What is the capital of France? One word.", "Paris")
        say(terminal, "And of Italy? One word.", "Rome")
        say(terminal, ":tokens", "of 32,768 left")
        say(terminal, f":save {tmp_path / 'chat.json'}", "Saved 2 turns")
        terminal.type(CTRL_D)
        assert terminal.end(30) == 0
    saved = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert "Rome" in saved["messages"][-1]["content"]
