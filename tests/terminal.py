"""A terminal in memory: runs a program on a pseudo-terminal and reads what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pyte
from fake_backend import wait_until

PROJECT = Path(__file__).parent.parent
#: Makes the pseudo-terminal the controlling one, so that Ctrl-C becomes a signal.
_LAUNCH = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
CTRL_C, CTRL_D, ENTER, ALT_ENTER = "\x03", "\x04", "\r", "\x1b\r"


class Terminal:
    """A Python program on a terminal of its own; use as a context, at whose end it is over.

    Attributes:
        raw: Every byte that the program wrote.
    """

    def __init__(
        self, *arguments: str, env: dict[str, str], rows: int = 40, columns: int = 90
    ) -> None:
        self.raw = b""
        self._screen = pyte.HistoryScreen(columns, rows, history=2000)
        self._feed = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # Questions about the cursor are answered, as every real terminal does.
        self._screen.write_process_input = lambda data: os.write(self._master, data.encode())
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *arguments],
            cwd=PROJECT,
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LANG": "C.UTF-8", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the program has ended
                return
            with self._lock:
                self.raw += data
                self._feed.feed(data)

    @property
    def screen(self) -> str:
        """What is to be seen, scrolled-off lines included."""
        with self._lock:
            old = [
                "".join(line[column].data for column in range(self._screen.columns))
                for line in self._screen.history.top
            ]
            return "\n".join(line.rstrip() for line in [*old, *self._screen.display]).rstrip()

    def type(self, text: str) -> None:
        """Press keys."""
        data = text.encode()
        while data:
            data = data[os.write(self._master, data) :]

    def wait_for(self, text: str, *, times: int = 1, seconds: float = 60) -> None:
        """Wait until a text is to be seen so many times."""
        try:
            wait_until(
                lambda: self.screen.count(text) >= times or self.process.poll() is not None, seconds
            )
        finally:
            assert self.screen.count(text) >= times, self.screen

    def end(self, seconds: float = 20) -> int:
        """Wait for the program's end; returns its exit code."""
        return self.process.wait(seconds)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        os.close(self._master)
