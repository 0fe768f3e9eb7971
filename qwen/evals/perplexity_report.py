"""What was measured of a model's perplexity: a table, a JSON file that can be gone on with, a plot.

Knows no model and no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen.errors import InvalidRequest, StartupError

Key = tuple[str, int]

#: Positions that make one point of a cell's curve.
CURVE_STEP = 1024


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table.

    Attributes:
        length: Tokens of each window.
        windows: How many were averaged.
        tokens: How many predictions were counted in all.
        seconds: What it took; 0 for a cell that equals another by definition.
        curve: Perplexity of each `CURVE_STEP` positions of the windows, in their order.
    """

    row: str
    length: int
    perplexity: float
    windows: int
    tokens: int
    seconds: float
    curve: tuple[float, ...] = ()


@dataclass
class Results:
    """The figures so far, kept in a file after each one.

    Attributes:
        settings: What figures of one file have in common.
        machine: What they were measured on last.
        path: None keeps nothing.
    """

    settings: Mapping[str, Any]
    machine: str
    path: Path | None = None
    cells: dict[Key, Cell] = field(default_factory=dict)

    def has(self, row: str, length: int, *, windows: int) -> bool:
        """Tell whether a figure is there, averaged over so many windows."""
        cell = self.cells.get((row, length))
        return cell is not None and cell.windows == windows

    def add(self, cell: Cell) -> None:
        """Take in a figure and write the file anew; a cut leaves the old one whole."""
        self.cells[cell.row, cell.length] = cell
        self.save()

    def save(self) -> None:
        """Write all figures to the file."""
        if self.path is None:
            return
        content = {
            "settings": dict(self.settings),
            "machine": self.machine,
            "cells": [asdict(cell) for cell in self.cells.values()],
        }
        write_json(self.path, content)

    def resume(self) -> None:
        """Take over the figures that the file holds already.

        Raises:
            InvalidRequest: It holds something else, or figures of other settings.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            cells = [Cell(**{**cell, "curve": tuple(cell["curve"])}) for cell in found["cells"]]
            settings = found["settings"]
        except (OSError, ValueError, LookupError, TypeError):
            raise InvalidRequest(
                f"{self.path} is there and holds no results of this program. Name another file."
            ) from None
        wanted = json.loads(json.dumps(dict(self.settings)))
        differing = [key for key in wanted if settings.get(key) != wanted[key]]
        if differing:
            key = differing[0]
            raise InvalidRequest(
                f"{self.path} holds results of another {key} ({settings.get(key)!r}, now "
                f"{wanted[key]!r}). Name another file, or remove this one."
            )
        self.cells |= {(cell.row, cell.length): cell for cell in cells}


def write_json(path: Path, content: Any) -> None:
    """Write beside a file and rename, so that it is whole at any time."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def check_output(path: Path | None) -> None:
    """Refuse a place that cannot be written to before an hour is spent.

    Raises:
        StartupError: With what to do.
    """
    if path is None:
        return
    try:
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise StartupError(
            f"{path} cannot be written to: {error.strerror}. Name a file in a folder that exists."
        ) from None


def render_table(
    cells: Mapping[Key, Cell], titles: Mapping[str, str], lengths: Sequence[int]
) -> str:
    """Render the figures as a Markdown table; what was not measured is a dash.

    Args:
        cells: The figures.
        titles: Of the rows, by their names, in their order.
        lengths: Of the columns.
    """
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---|" + "---:|" * len(lengths))
    for name, title in titles.items():
        figures = [_figure(cells.get((name, length))) for length in lengths]
        lines.append(f"| {title} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _figure(cell: Cell | None) -> str:
    return "–" if cell is None else f"{cell.perplexity:,.2f}"


def check_plotting(path: Path | None) -> None:
    """Refuse a plot that cannot be drawn before an hour is spent.

    Raises:
        StartupError: matplotlib is not installed, or does not write this kind of file.
    """
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise StartupError(
            "A plot needs matplotlib. Install it (pip install -r requirements-evals.txt), or "
            "leave out --plot."
        ) from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise StartupError(f"{path} is of no kind that can be drawn. Name a .png or .svg file.")


def plot_cells(
    cells: Mapping[Key, Cell], titles: Mapping[str, str], path: Path, *, title: str
) -> None:
    """Draw perplexity over window length, both logarithmic, one line for each row."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state of its own

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw_cells(figure.subplots(), cells, titles, title=title)
    figure.savefig(path, dpi=150)


def draw_cells(
    axes: Any, cells: Mapping[Key, Cell], titles: Mapping[str, str], *, title: str
) -> None:
    """Draw what `plot_cells` does on axes of a figure."""
    # Up to the trained length the lines lie on each other.
    for (name, row), style in zip(titles.items(), ("-", "--", ":"), strict=False):
        points = sorted((c.length, c.perplexity) for c in cells.values() if c.row == name)
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", label=row)
    _label_axes(axes, title=title)


def _label_axes(axes: Any, *, title: str) -> None:
    """Label axes with window lengths in k and perplexities in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of the window")
    axes.set_ylabel("perplexity")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
