"""Perplexity over growing contexts: the long-context table of Qwen's README for any checkpoint.

`python -m qwen.evals.perplexity -c ./qwen-7b --text book.txt --json out.json --plot out.png`. Rows:
plain, + dynamic NTK, + log-n (Qwen v1); columns: window lengths. Figures are exp of the mean of
-log p over every token of every window but each window's first, teacher-forced with the window as
the whole prompt. See docs/long_context.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen.evals.arguments import (
    INTERRUPTED,
    add_common_arguments,
    load_measured,
    parse_count,
    parse_length,
    run_named,
)
from qwen.evals.machine import describe_machine
from qwen.evals.perplexity_report import (
    CURVE_STEP,
    Cell,
    Results,
    check_output,
    check_plotting,
    plot_cells,
    render_table,
)

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
ROW_NAMES = ("plain", "ntk", "ntk-logn")
#: Exit code of a time limit that left cells out.
INCOMPLETE = 3


class _TimeIsUp(Exception):
    """The time limit passed; what was being measured is left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit status."""
    return run_named(_run, _build_parser().parse_args(argv))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwen.evals.perplexity",
        description="Measure perplexity over growing contexts.",
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=parse_length,
        nargs="+",
        default=list(LENGTHS),
        metavar="N",
        help="window lengths in tokens; 8k is 8,192 (default: 1k 2k 4k 8k 16k 32k)",
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROW_NAMES, help="default: all of a Qwen v1, else plain"
    )
    parser.add_argument("--max-seconds", type=parse_count, metavar="N", help="stop after so long")
    return parser


def _run(given: argparse.Namespace) -> int:
    deadline = time.monotonic() + given.max_seconds if given.max_seconds else math.inf
    for path in (given.json, given.plot):
        check_output(path)
    check_plotting(given.plot)
    model, corpus, name = load_measured(given)
    measurement = _Measurement(model, corpus.ids, given.windows, given.chunk, deadline)
    rows = given.rows or (ROW_NAMES if measurement.has_rows else ROW_NAMES[:1])
    lengths = sorted(set(given.lengths))
    measurement.check(rows, lengths)
    results = Results(
        settings={
            "checkpoint": name,
            "corpus": corpus.name,
            "corpus_ids": corpus.digest,
            "corpus_tokens": len(corpus.ids),
            "dtype": str(model.dtype).removeprefix("torch."),
            "trained_length": measurement.trained_length,
        },
        machine=describe_machine("torch", "transformers"),
        path=given.json,
    )
    results.resume()
    print(f"{name} on {corpus.name} ({len(corpus.ids):,} tokens), {results.settings['dtype']}")
    print(results.machine, flush=True)
    status = _fill(measurement, results, rows, lengths)
    _show(results, {row: measurement.titles[row] for row in rows}, lengths, given.plot, name)
    return status


def _fill(
    measurement: _Measurement, results: Results, rows: Sequence[str], lengths: Sequence[int]
) -> int:
    """Measure what is not there yet, the cheap columns first; return the exit status."""
    try:
        for length in lengths:
            for row in rows:
                if not results.has(row, length, windows=measurement.count_windows(length)):
                    cell = measurement.cell(row, length, results)
                    results.add(cell)
                    _print_line(
                        f"{row} {length:,}: {cell.perplexity:.3f} "
                        f"({cell.windows} windows, {cell.seconds:.0f} s)\n"
                    )
    except _TimeIsUp:
        _print_line("The time is up; cells that are missing can be measured by the same command.\n")
        return INCOMPLETE
    except KeyboardInterrupt:
        _print_line("Stopped; the same command goes on from here where --json is given.\n")
        return INTERRUPTED
    return 0


def _show(
    results: Results,
    titles: dict[str, str],
    lengths: Sequence[int],
    plot: Path | None,
    name: str,
) -> None:
    lengths = sorted({*lengths, *(length for _, length in results.cells)})
    print(f"\n{render_table(results.cells, titles, lengths)}")
    if plot is not None and results.cells:
        plot_cells(results.cells, titles, plot, title=f"{name}: {results.settings['corpus']}")


def _print_line(text: str) -> None:
    """Print over a line of progress, where one stands."""
    print("\r\x1b[K" + text if sys.stdout.isatty() else text, end="", flush=True)


class _Measurement:
    """Cells of one model on one text, within a time."""

    def __init__(
        self, model: Any, ids: Sequence[int], windows: int, chunk: int, deadline: float
    ) -> None:
        from qwen.evals import long_context

        self._measure = long_context
        self._model = model
        self._ids = ids
        self._windows = windows
        self._chunk = chunk
        self._deadline = deadline
        self.has_rows = long_context.is_qwen_v1(model)
        self.titles = {row.name: row.title for row in long_context.ROWS.values()}
        config = model.config.get_text_config()
        self.trained_length = int(getattr(config, "seq_length", config.max_position_embeddings))

    def check(self, rows: Sequence[str], lengths: Sequence[int]) -> None:
        """Refuse what cannot be measured before anything is."""
        self._measure.check_rows(self._model, rows)
        self.count_windows(max(lengths))

    def count_windows(self, length: int) -> int:
        """Tell how many windows of a length are averaged."""
        return len(self._measure.window_starts(len(self._ids), length, self._windows))

    def cell(self, row: str, length: int, results: Results) -> Cell:
        """Measure a cell, or copy one that is the same by definition."""
        starts = self._measure.window_starts(len(self._ids), length, self._windows)
        if self._measure.is_like_plain(self._model, length):
            for twin in results.cells.values():
                if (twin.length, twin.windows) == (length, len(starts)):
                    return replace(twin, row=row, seconds=0.0)
        import torch

        started = time.monotonic()
        scored = []
        with self._measure.switched(self._model, self._measure.ROWS[row]):
            for number, start in enumerate(starts, start=1):
                losses = self._measure.window_losses(
                    self._model,
                    self._ids[start : start + length],
                    chunk=self._chunk,
                    on_chunk=partial(
                        self._progress, f"{row} {length:,}: window {number} of {len(starts)}"
                    ),
                )
                scored.append(losses.double())
        losses = torch.stack(scored)
        return Cell(
            row,
            length,
            perplexity=float(losses.mean().exp()),
            windows=len(starts),
            tokens=losses.numel(),
            seconds=round(time.monotonic() - started, 1),
            curve=tuple(
                float(part.mean().exp()) for part in torch.split(losses, CURVE_STEP, dim=1)
            ),
        )

    def _progress(self, line: str, done: int) -> None:
        if sys.stdout.isatty():
            _print_line(f"{line}, {done:,} tokens")
        if time.monotonic() > self._deadline:
            raise _TimeIsUp


if __name__ == "__main__":
    sys.exit(main())
