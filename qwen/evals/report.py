"""Figures measured side by side: one line each, JSON, and a plot. Measures nothing itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qwen.errors import StartupError


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one thing.

    Attributes:
        values: In the order in which they were taken.
        unit: Such as "tok/s".
    """

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        """The figure that counts."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Show the median and, of several values, the lowest and highest."""
        if len(self.values) == 1:
            return f"{self.median:.4g} {self.unit}"
        return f"{self.median:.4g} {self.unit} [{min(self.values):.4g}–{max(self.values):.4g}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against a peer, or against a limit.

    Attributes:
        ratio: Ours / peer, whatever is better.
        target: What the ratio is to reach, or not to pass.
        better: Whether a higher ratio is better, or a lower.
    """

    name: str
    ours: Samples
    peer_name: str
    peer: Samples
    target: float
    better: Literal["higher", "lower"]

    @property
    def ratio(self) -> float:
        """Median of ours over the median of the peer's."""
        return self.ours.median / self.peer.median

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        reached = (
            self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target
        )
        return bool(reached)

    def __str__(self) -> str:
        """`name: ours X, peer Y, ratio Z, target T`, and the verdict."""
        sign = "≥" if self.better == "higher" else "≤"
        verdict = "met" if self.is_met else "MISSED"
        return (
            f"{self.name}: ours {self.ours}, {self.peer_name} {self.peer}, "
            f"ratio {self.ratio:.3f}, target {sign} {self.target:g}: {verdict}"
        )


def write_json(path: Path, machine: str, comparisons: Sequence[Comparison]) -> None:
    """Write machine, medians and all values."""
    rows = [
        {**asdict(row), "ratio": row.ratio, "is_met": row.is_met, "line": str(row)}
        for row in comparisons
    ]
    text = json.dumps({"machine": machine, "rows": rows}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_plot(path: Path, machine: str, comparisons: Sequence[Comparison]) -> None:
    """Draw each row's ratio beside its target."""
    draw_bars(
        path,
        title=machine,
        names=[f"{row.name} / {row.peer_name}" for row in comparisons],
        values=[row.ratio for row in comparisons],
        marks=[row.target for row in comparisons],
        colors=["#2a7f4f" if row.is_met else "#b3432b" for row in comparisons],
        label="ratio to the peer; black: target (green: met)",
    )


def draw_bars(
    path: Path,
    *,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    marks: Sequence[float | None],
    label: str,
    colors: Sequence[str] | str = "#35618f",
) -> None:
    """Draw a bar for each value with a mark where it has one; the suffix decides the format.

    Raises:
        StartupError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no state of its own
    except ImportError:
        raise StartupError(
            "A plot needs matplotlib: python -m pip install -r requirements-evals.txt"
        ) from None
    figure = Figure(figsize=(9, 0.55 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, values, color=colors)
    for place, mark in zip(places, marks, strict=True):
        if mark is not None:
            axes.plot([mark, mark], [place - 0.45, place + 0.45], color="black")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
