"""The terminal chat's commands: what begins with a colon and a letter.

Nothing that is typed is evaluated: settings pass `SamplingParams`, files `parse_transcript`.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from qwen.cli_session import ChatSession
from qwen.errors import InvalidRequest, InvalidSetting, QwenError
from qwen.messages import (
    SAMPLING_RANGES,
    ContextUsage,
    SamplingParams,
    StreamEvent,
    checked_number,
)
from qwen.transcript import MAX_CHARACTERS, export_json, parse_transcript

#: What a line that is a command looks like; ":)" is none, and neither is a line after a space.
_COMMAND = re.compile(r":([A-Za-z][\w-]*)(?:\s+(.*))?\Z", re.DOTALL)
_SETTING = re.compile(r"\s*([A-Za-z_]+)=(\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]|\S*)(?=\s|\Z)")
#: Settings that a conversation in the terminal can have.
_SETTINGS = (*(name for name in SAMPLING_RANGES if name != "top_logprobs"), "stop")

Outcome = Literal["go on", "leave"]


class Output(Protocol):
    """What commands need of `qwen.cli_screen.Screen`."""

    def say(self, text: str, *, style: str = "") -> None:
        """Print text."""

    def note(self, text: str) -> None:
        """Print something beside the conversation."""

    def markdown(self, text: str) -> None:
        """Print a reply."""

    def clear(self) -> None:
        """Empty the terminal."""


#: Shows a reply while it is streamed, until it ends or is stopped.
ShowReply = Callable[[Callable[[threading.Event], Iterator[StreamEvent]]], None]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its names, the first being the full one, its arguments and what it does."""

    names: tuple[str, ...]
    arguments: str
    help: str
    method: str


COMMANDS = (
    Command(("help", "h"), "", "show this list", "help"),
    Command(("exit", "quit", "q"), "", "leave; so does Ctrl-D", "exit"),
    Command(("clear", "cl"), "", "clear the screen", "clear"),
    Command(("clear-his", "clh"), "", "forget the conversation and begin a new one", "clear_his"),
    Command(("history", "his"), "", "show the conversation", "history"),
    Command(("seed",), "[N|none]", "show or set the seed; none draws a fresh one", "seed"),
    Command(("conf",), "[KEY=VALUE …]", "show or change the sampling settings", "conf"),
    Command(("reset-conf",), "", "take the sampling settings of the start again", "reset_conf"),
    Command(("system",), "[TEXT|none]", "show or set the system prompt", "system"),
    Command(("regen",), "", "make the last reply anew", "regen"),
    Command(("undo",), "", "take the last question and its reply back", "undo"),
    Command(("tokens",), "", "show how the context is filled", "tokens"),
    Command(("save",), "FILE", "save the conversation as JSON", "save"),
    Command(("load",), "FILE", "go on with a saved or exported conversation", "load"),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}


class CommandLine:
    """Carries out commands on one conversation."""

    def __init__(self, session: ChatSession, output: Output, show_reply: ShowReply) -> None:
        self._session = session
        self._output = output
        self._show_reply = show_reply

    def run(self, line: str) -> Outcome | None:
        """Carry out a line that is a command; None for one that is a message.

        Raises:
            QwenError: The command cannot be carried out as given.
        """
        found = _COMMAND.match(line)
        if found is None:
            return None
        command = BY_NAME.get(found[1].lower())
        if command is None:
            raise InvalidRequest(
                f"There is no command :{found[1]}. Type :help for the list; to send this as a "
                "message, put a space before it."
            )
        argument = (found[2] or "").strip()
        if argument and not command.arguments:
            raise InvalidRequest(f":{command.names[0]} takes nothing behind it.")
        outcome: Outcome | None = getattr(self, f"_{command.method}")(argument)
        return outcome or "go on"

    def _help(self, _: str) -> None:
        usages = [
            " ".join(filter(None, [", ".join(f":{name}" for name in c.names), c.arguments]))
            for c in COMMANDS
        ]
        width = max(map(len, usages)) + 2
        lines = [f"{u:<{width}}{c.help}" for u, c in zip(usages, COMMANDS, strict=True)]
        lines += [
            "",
            "Enter sends; Alt+Enter, or a backslash at the end, begins a new line. Ctrl-C stops "
            "the reply and keeps what was said.",
        ]
        self._output.say("\n".join(lines))

    def _exit(self, _: str) -> Outcome:
        return "leave"

    def _clear(self, _: str) -> None:
        self._output.clear()

    def _clear_his(self, _: str) -> None:
        count = len(self._session.entries) // 2
        self._session.clear()
        self._output.note(f"{_turns(count)} forgotten. The settings stay.")

    def _history(self, _: str) -> None:
        if not self._session.entries:
            self._output.note("The conversation is empty.")
        for message, note in self._session.entries:
            if message.role == "user":
                self._output.say(f"You> {message.content}", style="bold")
            else:
                self._output.markdown(message.content)
                self._output.note(note + "\n")

    def _seed(self, argument: str) -> None:
        if argument:
            self._session.params = replace(self._session.params, seed=_seed_value(argument))
        seed = self._session.params.seed
        self._output.note("seed: none, every reply is drawn afresh" if seed is None else f"{seed=}")

    def _conf(self, argument: str) -> None:
        if argument:
            self._session.params = changed_params(self._session.params, argument)
        self._show_settings()

    def _reset_conf(self, _: str) -> None:
        self._session.params = self._session.default_params
        self._show_settings()

    def _show_settings(self) -> None:
        lines = []
        for name in _SETTINGS:
            value = getattr(self._session.params, name)
            shown = json.dumps(list(value) if name == "stop" else value, ensure_ascii=False)
            allowed = SAMPLING_RANGES.get(name)
            about = f"   from {_plain(allowed.low)} to {_plain(allowed.high)}" if allowed else ""
            if name == "seed":
                shown, about = shown.replace("null", "none"), "   or none"
            lines.append(f"{name}={shown}{about}")
        self._output.note("\n".join(lines))

    def _system(self, argument: str) -> None:
        if argument:
            self._session.system_prompt = "" if argument.lower() == "none" else argument
        prompt = self._session.system_prompt
        self._output.note(f"system prompt: {prompt or 'none'}")

    def _regen(self, _: str) -> None:
        self._show_reply(self._session.regenerate)

    def _undo(self, _: str) -> None:
        question = " ".join(self._session.undo().split())
        shown = question if len(question) <= 60 else question[:60] + "…"
        left = len(self._session.entries) // 2
        self._output.note(f"Taken back: “{shown}”. {_turns(left)} left.")

    def _tokens(self, _: str) -> None:
        self._output.note(usage_text(self._session.usage()))

    def _save(self, argument: str) -> None:
        path = _path(argument, "save")
        save_transcript(path, export_json(self._session.transcript()))
        self._output.note(f"Saved {_turns(len(self._session.entries) // 2)} in {path}.")

    def _load(self, argument: str) -> None:
        path = _path(argument, "load")
        self._session.restore(parse_transcript(_read(path)))
        turns = _turns(len(self._session.entries) // 2)
        self._output.note(
            f"Loaded {turns} with its system prompt; :history shows the conversation."
        )


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"


def changed_params(params: SamplingParams, argument: str) -> SamplingParams:
    """Return the settings with what "KEY=VALUE …" says; all of it or nothing.

    Raises:
        InvalidSetting: A key is unknown, or a value not of its kind or outside its range.
    """
    changes: dict[str, Any] = {}
    at = 0
    while at < len(argument):
        found = _SETTING.match(argument, at)
        if found is None:
            raise InvalidSetting(
                "Settings are given as KEY=VALUE, with spaces between them and none around the "
                "equals sign: :conf temperature=0.5 top_p=0.9"
            )
        changes[found[1]] = _value(found[1], found[2])
        at = found.end()
    return replace(params, **changes)


def _value(name: str, text: str) -> Any:
    if name not in _SETTINGS:
        raise InvalidSetting(f"There is no setting {name}. There are: {', '.join(_SETTINGS)}.")
    if name == "stop":
        return _stop_value(text)
    if name == "seed":
        return _seed_value(text)
    return _number(name, text)


def _number(name: str, text: str) -> float | int:
    for kind in (int, float):
        try:
            return kind(text) if len(text) <= 40 else float("nan")
        except ValueError:
            continue
    return float("nan")  # refused by SamplingParams, which says what is allowed


def _seed_value(text: str) -> int | None:
    if text.lower() == "none":
        return None
    return int(checked_number("seed", _number("seed", text)))


def _stop_value(text: str) -> tuple[str, ...]:
    """Read one text, or a JSON text or list of texts."""
    if not text or text == "none":
        return ()
    if text[0] not in '"[':
        return (text,)
    try:
        value = json.loads(text)
    except ValueError:
        raise InvalidSetting(
            'stop takes a word, a text in quotes or a list: stop="\\n\\n" or stop=["a", "b"].'
        ) from None
    return tuple(value) if isinstance(value, list) else (value,)


def usage_text(usage: ContextUsage) -> str:
    """Return one line on how the context is filled."""
    about = "about " if usage.is_estimate else ""
    parts = [
        f"{about}{usage.prompt:,} tokens: system {usage.system:,}, history {usage.history:,}, "
        f"frame of the next message {usage.query:,}"
    ]
    if usage.total:
        parts.append(f"{about}{usage.left:,} of {usage.total:,} left")
    if usage.dropped:
        parts.append(dropped_text(len(usage.dropped)))
    return " · ".join(parts)


def dropped_text(count: int) -> str:
    """Return the notice that old messages do not fit any more."""
    are = "message does" if count == 1 else "messages do"
    return f"the {count} oldest {are} not fit into the context and are left out"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InvalidRequest(f"Say which file: :{command} FILE")
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise InvalidRequest("The home folder of ~ is not known. Write the whole path.") from None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {_reason(error)}.") from None


def save_transcript(path: Path, text: str) -> None:
    """Write a file whole or not at all; only another saved conversation is replaced.

    Raises:
        InvalidRequest: It cannot be written, or something else has this name.
    """
    if path.exists():
        try:
            parse_transcript(_read(path))
        except QwenError:
            raise InvalidRequest(
                f"{path} exists and is no saved conversation, so it is left alone. Choose another "
                "name."
            ) from None
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise InvalidRequest(
            f"{path} cannot be written: {_reason(error)}. Choose another place."
        ) from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "it is no text"
