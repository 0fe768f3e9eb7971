"""The server's log: one line an event, as key=value or as JSON, on standard error.

No line holds what users wrote: only our own messages and figures, and tracebacks of faults.
"""

from __future__ import annotations

import logging
import sys
from typing import IO, Literal

LogFormat = Literal["text", "json"]

#: What `logging` itself puts on a record; the rest came with `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """Writes `time level logger message key=value …`."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        given = {key: value for key, value in vars(record).items() if key not in _OWN}
        pairs = [f"{key}={value}" for key, value in given.items()]
        return " ".join([super().formatMessage(record), *pairs])


def set_up_logs(form: LogFormat, *, stream: IO[str] | None = None) -> logging.Handler:
    """Send the log of this process to standard error; returns the handler.

    The server's rooms tell what happens, everybody else only what is wrong.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    if form == "json":
        from pythonjsonlogger.json import JsonFormatter

        handler.setFormatter(
            JsonFormatter(
                "{asctime}{levelname}{name}{message}",
                style="{",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(KeyValueFormatter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("webapp").setLevel(logging.INFO)
    return handler
