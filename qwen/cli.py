"""Chat in the terminal: `python -m qwen.cli`. Flags → backend → questions and replies.

With a pipe or a file in place of the keyboard, all of it is one question, and the reply alone goes
to standard output. Exit codes: 0, 1 after a failure, 2 for wrong flags, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from qwen.backend import ChatBackend, ReportProgress
from qwen.cli_commands import BY_NAME, CommandLine, dropped_text
from qwen.cli_session import ChatSession, reply_note
from qwen.errors import EmptyMessage, QwenError
from qwen.load_options import add_load_arguments, read_checkpoint, read_load_options
from qwen.messages import StreamEvent, checked_number
from qwen.remote_options import add_remote_arguments, read_remote_options

if TYPE_CHECKING:
    from qwen.cli_screen import Screen

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."

Load = Callable[[argparse.Namespace, ReportProgress], ChatBackend]
Stream = Callable[[threading.Event], Iterator[StreamEvent]]


def main() -> int:
    """Run the program; returns its exit code."""
    return run(sys.argv[1:], os.environ)


def run(argv: Sequence[str], environ: Mapping[str, str], *, load: Load | None = None) -> int:
    """Chat until the user leaves, or answer what a pipe says.

    Args:
        argv: The command line.
        environ: The environment.
        load: Builds the backend; by default the one that the flags ask for.
    """
    given, chosen = _parse(argv, environ)
    _make_streams_sturdy()
    try:
        with _loaded(given, load or chosen) as session:
            from qwen.cli_screen import Screen

            if sys.stdin is not None and sys.stdin.isatty():
                return _converse(session, Screen(sys.stdout, sys.stderr))
            return _answer_pipe(session, Screen(sys.stdout, sys.stderr, plain=True))
    except QwenError as error:
        print(f"Error: {_plain(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; the last flush would fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[argparse.Namespace, Load]:
    parser = argparse.ArgumentParser(
        prog="python -m qwen.cli",
        description="Chat with a Qwen model in the terminal; :help there lists the commands. "
        "echo TEXT | python -m qwen.cli prints the reply alone.",
        epilog="Checkpoints are named as for app.py: auto, ./folder, ./model.gguf, OWNER/NAME, "
        "modelscope:OWNER/NAME.",
    )
    add_load_arguments(parser)
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "-s", "--seed", type=_seed, metavar="N", help="the same seed gives the same replies"
    )
    chat.add_argument(
        "--system-prompt",
        metavar="TEXT",
        default=DEFAULT_SYSTEM_PROMPT,
        help="system prompt to start with (default: %(default)s)",
    )
    add_remote_arguments(parser)
    given = parser.parse_args(argv)
    options = read_load_options(parser, given)
    remote = read_remote_options(parser, given, environ)
    checkpoint = read_checkpoint(given, environ)

    def load(given: argparse.Namespace, report: ReportProgress) -> ChatBackend:
        from qwen.chosen_backend import load_chosen_backend

        return load_chosen_backend(checkpoint, options, remote, report=report)

    return given, load


def _seed(text: str) -> int:
    try:
        return int(checked_number("seed", int(text)))
    except (ValueError, QwenError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on") from None


def _make_streams_sturdy() -> None:
    """Let no character end the program that the terminal's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _plain(text: str) -> str:
    from qwen.cli_text import safe_text

    return safe_text(text)


@contextmanager
def _loaded(given: argparse.Namespace, load: Load) -> Iterator[ChatSession]:
    """Load the backend with progress on the error stream; close it at the end."""
    from qwen.cli_progress import StderrProgress

    with StderrProgress(sys.stderr) as progress:
        backend = load(given, progress)
    try:
        yield ChatSession(backend, system_prompt=given.system_prompt, seed=given.seed)
    finally:
        backend.close()


def _answer_pipe(session: ChatSession, screen: Screen) -> int:
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    text = data.decode("utf-8", "replace").strip("\r\n")
    if not text.strip():
        raise EmptyMessage("Nothing came through the pipe. Try: echo hi | python -m qwen.cli")
    final = show_reply(screen, lambda cancel: session.ask(text, cancel))
    return 130 if final is not None and final.finish_reason == "cancelled" else 0


def _converse(session: ChatSession, screen: Screen) -> int:
    from qwen.cli_input import build_reader, open_history, quiet_keys
    from qwen.weights_cache import cache_folder

    def reply(stream: Stream) -> None:
        with quiet_keys():
            show_reply(screen, stream)

    commands = CommandLine(session, screen, reply)
    read = build_reader(
        open_history(cache_folder() / "chat-history"), [f":{name}" for name in BY_NAME]
    )
    _greet(session, screen)
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            continue  # Ctrl-C empties the line
        except EOFError:
            return 0
        try:
            outcome = commands.run(line)
            if outcome == "leave":
                return 0
            if outcome is None and line.strip():
                text = line[1:] if line.startswith(" :") else line
                reply(lambda cancel, text=text: session.ask(text, cancel))  # type: ignore[misc]
        except QwenError as error:
            screen.error(f"{error}")
        except KeyboardInterrupt:
            screen.note("Interrupted; Ctrl-D leaves.")


def _greet(session: ChatSession, screen: Screen) -> None:
    info = session.info
    facts = [info.name, info.device, info.dtype]
    if info.context_length:
        facts.append(f"context {info.context_length:,} tokens")
    screen.say(" · ".join(filter(None, facts)), style="bold")
    for notice in info.notices:
        screen.note(notice)
    if not info.is_chat:
        screen.note("A base model: each text is continued by itself; it knows no conversation.")
    screen.note(":help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.\n")


def show_reply(screen: Screen, stream: Stream) -> StreamEvent | None:
    """Show a reply until it ends; Ctrl-C stops it and keeps it. Returns the last event.

    Raises:
        QwenError: As the stream, after what came before it has been shown.
    """
    cancel = threading.Event()
    final = None
    with _stopped_by_ctrl_c(cancel), closing(stream(cancel)) as events:  # type: ignore[type-var]
        shown = screen.reply()
        note = ""
        said = False
        try:
            for event in events:
                if event.context is not None and event.context.dropped and screen.draws:
                    screen.note(f"({dropped_text(len(event.context.dropped))})")
                said = said or bool(event.text.strip())
                shown.feed(event)
                if event.finish_reason is not None:
                    final, note = event, reply_note(event)
            if not said:
                note = "stopped before the first word" if cancel.is_set() else "an empty reply"
                note += "; the question is not kept, ↑ brings it back"
        finally:
            shown.finish(note)
    return final


@contextmanager
def _stopped_by_ctrl_c(cancel: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set an event; a second one does not wait for the reply's end."""

    def stop(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


if __name__ == "__main__":
    sys.exit(main())
