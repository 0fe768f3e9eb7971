"""The line that the terminal chat reads: editing, history, more than one line.

Knows prompt_toolkit and nothing of conversations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

#: Bytes of the history file beyond which its older half is dropped at start.
_LARGEST_HISTORY = 2_000_000


def build_reader(history: History, words: Sequence[str]) -> Callable[[], str]:
    """Return a function that reads one message.

    Enter sends; Alt+Enter and a backslash at the end begin a new line; a paste keeps its lines. The
    function raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D.

    Args:
        history: Where messages are remembered.
        words: What Tab completes at the beginning.
    """
    session: PromptSession[str] = PromptSession(
        message="You> ",
        multiline=True,  # Enter is bound below; so a long message scrolls and is shown whole
        prompt_continuation="… ".rjust(5),
        history=history,
        key_bindings=_key_bindings(),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        enable_suspend=True,
        output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
    )
    return session.prompt


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        """Send the message, or begin a line where a backslash says so."""
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_state = None
            return
        at_end = buffer.cursor_position == len(buffer.text)
        backslashes = len(buffer.text) - len(buffer.text.rstrip("\\"))
        if at_end and backslashes % 2:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        """Begin a new line."""
        event.current_buffer.insert_text("\n")

    return bindings


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Let the terminal not echo keys: a ^C amid a reply would shift what is drawn in place."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, termios.error):  # Windows, or no terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def open_history(path: Path) -> History:
    """Return the history kept in a file that only this user can read; in memory if it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        _shorten(path)
    except OSError:
        return InMemoryHistory()
    return _KeptHistory(str(path))


class _KeptHistory(FileHistory):
    """A history that a full disk does not end."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, ValueError):
            return  # it stays in memory


def _shorten(path: Path) -> None:
    if path.stat().st_size <= _LARGEST_HISTORY:
        return
    data = path.read_bytes()[-_LARGEST_HISTORY // 2 :]
    part = path.with_name(path.name + ".part")
    with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data[data.find(b"\n\n") + 1 :])  # entries begin after an empty line
    part.replace(path)
