"""What a measurement says: rows, as JSON, as a table, as a picture.

A row holds the median, least and most of its samples and, in the same unit, the roofline: what
the machine would allow. A peer that is absent has a row too, whose ``note`` says why.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moeserve.errors import ConfigError
from moeserve.kernels.probe import Machine

BETTER_IS_LESS = frozenset({"us", "ms", "s", "MB"})


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Rows, and what the machine could do while they were measured."""

    machines: tuple[Machine, ...]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        machines = [dataclasses.asdict(machine) for machine in self.machines]
        return {"machine": machines, "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True, slots=True)
class Row:
    """``batch`` sequences at once or ``tokens`` in a call, whichever the measurement varies."""

    what: str
    peer: str
    unit: str
    threads: int
    batch: int | None = None
    tokens: int | None = None
    median: float | None = None
    min: float | None = None
    max: float | None = None
    roofline: float | None = None
    note: str = ""

    @property
    def size(self) -> int:
        """What the measurement varies; 0 where it varies nothing."""
        return (self.tokens if self.batch is None else self.batch) or 0

    @property
    def of_roofline(self) -> float | None:
        """How near to what the machine allows: 1 is there, whatever the unit."""
        if self.median is None or self.roofline is None:
            return None
        less = self.unit in BETTER_IS_LESS
        return self.roofline / self.median if less else self.median / self.roofline

    def to_json(self) -> dict[str, Any]:
        size = "tokens" if self.batch is None else "batch"
        shown = dataclasses.asdict(self)
        shown.pop("batch" if size == "tokens" else "tokens")
        return shown


def summarise(row: Row, samples: Sequence[float]) -> Row:
    """The row with the statistics of its samples."""
    return dataclasses.replace(
        row, median=statistics.median(samples), min=min(samples), max=max(samples)
    )


def table(title: str, rows: Sequence[Row]) -> Table:
    """A line for each peer, a column for each measurement: median, share of roofline, range."""
    made = Table(title=title, title_justify="left", show_lines=True)
    made.add_column("", no_wrap=True)
    columns = list(dict.fromkeys((row.what, row.size, row.unit) for row in rows))
    for what, size, unit in columns:
        made.add_column(f"{what} {size or ''}\n{unit}", justify="right")
    lines: dict[tuple[str, int], dict[tuple[str, int, str], Row]] = {}
    for row in rows:
        line = lines.setdefault((row.peer, row.threads), {})
        line[row.what, row.size, row.unit] = row
    for (peer, threads), found in lines.items():
        cells = [cell(found[column]) if column in found else "" for column in columns]
        made.add_row(f"{peer}\n{threads} thread{'s' * (threads > 1)}", *cells)
    return made


def notes(rows: Iterable[Row]) -> list[str]:
    """What rows say beside their figures, once each."""
    said = (f"{row.peer}: {row.note}" for row in rows if row.note)
    return list(dict.fromkeys(said))


def cell(row: Row) -> str:
    if row.median is None:
        return "-"
    share = "" if row.of_roofline is None else f" {row.of_roofline:.0%}"
    spread = "" if row.min == row.max else f"\n{number(row.min)}-{number(row.max)}"
    return f"{number(row.median)}{share}{spread}"


def number(value: float | None) -> str:
    """Three digits, or all of them before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """One panel for each kind of measurement and number of threads, one line for each peer."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ConfigError(
            f"--plot={str(file)!r}: pictures need matplotlib: pip install 'moeserve[figures]'"
        ) from missing
    measured = [row for row in rows if row.median is not None]
    panels = list(dict.fromkeys((r.what, r.threads, r.unit) for r in measured))
    if not panels:
        raise ConfigError(f"--plot={str(file)!r}: nothing was measured")
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, threads, unit) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        here = [r for r in measured if (r.what, r.threads, r.unit) == (what, threads, unit)]
        for peer in dict.fromkeys(r.peer for r in here):
            mine = [r for r in here if r.peer == peer]
            across = [str(r.size) for r in mine]
            (line,) = axes.plot(across, [r.median or 0.0 for r in mine], "o-", label=peer)
            limits = [r.roofline for r in mine]
            if all(limit is not None for limit in limits):
                axes.plot(across, limits, ":", color=line.get_color(), alpha=0.6)
        axes.set_title(f"{what}, {threads} threads (dotted: roofline)")
        axes.set_ylabel(unit)
        if unit in BETTER_IS_LESS:
            axes.set_yscale("log")
        axes.legend(fontsize="small")
    figure.savefig(file)
