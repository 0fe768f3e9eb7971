"""The loading of a model on the error stream: a bar on a terminal, elsewhere a line for a step."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class StderrProgress:
    """A `ReportProgress`; use as a context, at whose end the bar is gone."""

    def __init__(self, err: TextIO) -> None:
        self._console = Console(file=err, highlight=False, markup=False)
        self._step = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("Starting", total=None, amount="")

    def __enter__(self) -> StderrProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, step: str, *, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Report a step and how much of it is done."""
        if not self._console.is_terminal:
            if step != self._step:
                self._console.print(f"{step} …", soft_wrap=True)
        else:
            amount = f"{done / 1e6:,.0f} / {total / 1e6:,.0f} MB" if unit == "bytes" else ""
            self._bar.update(
                self._task,
                description=step,
                completed=done,
                total=total or None,
                amount=amount if total else "",
            )
        self._step = step
