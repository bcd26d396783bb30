"""The result of a verb for people: tables that fit 80 columns, and what their columns mean.

A result with a ``frontier`` has ``points`` of ``name``, ``imbalance``, ``copies``, ``step`` and
``admissible``, and the parts of the routing ``judged_on``; ``chosen`` is the name of one, or of
what was made after it.

Piped, lines are at most 80 columns wide, or as many as ``COLUMNS`` says. Every row says on what it
was judged: what the plan was fitted on, what was held out, or both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moeserve.placement.fitted import BOTH, FITTED, HELD_OUT, UNKNOWN

if TYPE_CHECKING:
    from rich.console import Console

JUDGED = {BOTH: "both", FITTED: "fitted", HELD_OUT: "held out", UNKNOWN: "unknown"}
OURS = "this plan"
_COLUMNS = (
    "plan",
    "judged on",
    "balance",
    "worst",
    "copies",
    "across",
    "priced",
    "step",
    "bound",
    "gap",
)
MOST_GAP = 1.0  # more says nothing
_TABLES = ("solve", "evaluate", "compare")


def show(verb: str, result: Mapping[str, Any]) -> None:
    """Print it to standard output."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if verb not in _TABLES:
        for key, value in result.items():
            console.print(f"{key}: {value}")
        return
    if "plan" in result:
        console.print(outline(result["plan"]))
    rows = list(table_rows(verb, result))
    _print_table(console, rows)
    console.print(_legend([figures for _, _, figures in rows]), style="dim")
    if result.get("frontier"):
        _print_frontier(console, result["frontier"], result.get("chosen"))
    for name, why in _refused(result):
        console.print(f"{name} could not run: {why}")
    if verb == "solve":
        console.print(
            f"solver {result['solver']}: {result['seconds']:.1f} s of at most "
            f"{result['time_limit']:g} s (--time-limit); wrote {result['out']}"
        )


def outline(plan: Mapping[str, Any]) -> str:
    """What a plan is of, in a line."""
    many = "s" if plan["nodes"] > 1 else ""
    return (
        f"{plan['layers']} layers, {plan['experts']} experts in {plan['slots']} slots, "
        f"{plan['devices']} devices in {plan['nodes']} node{many}; {plan['dataflow']}, "
        f"{plan['phase']}"
    )


Row = tuple[str, str, Mapping[str, Any]]


def table_rows(verb: str, result: Mapping[str, Any]) -> Iterator[Row]:
    """Name, what it is judged on, figures."""
    for name, parts in result.get("baselines", {}).items():
        yield from _parts(name, parts)
    if verb == "compare":
        for name, row in result["solvers"].items():
            yield from _parts(name, row)
            yield name, result["judged_on"], row
        return
    name = OURS
    if verb != "plot" and (result["judged_on"] != FITTED or "fitted" not in result):
        yield name, result["judged_on"], result
    yield from _parts(name, result)


def _parts(name: str, parts: Mapping[str, Any]) -> Iterator[Row]:
    for kind in (FITTED, HELD_OUT, UNKNOWN):
        if kind in parts:
            yield name, kind, parts[kind]


def _print_table(console: Console, rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    for heading in _COLUMNS:
        table.add_column(heading, justify="left" if heading in _COLUMNS[:2] else "right")
    for name, kind, row in rows:
        table.add_row(name, JUDGED[kind], *_cells(row))
    console.print(table)


def _print_frontier(console: Console, frontier: Mapping[str, Any], chosen: str | None) -> None:
    """What could be had instead, judged on parts that were left out, and what was picked."""
    from rich.table import Table

    parts = ", ".join(frontier["judged_on"])
    console.print(f"copies against balance, each part left out in turn ({parts}), mean over them:")
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    for heading in ("plan", "balance", "copies", "step", ""):
        table.add_column(heading, justify="left" if heading in ("plan", "") else "right")
    for point in frontier["points"]:
        picked = point["name"] == chosen
        note = "picked" if picked else "" if point["admissible"] else "too uneven"
        cells = (point["imbalance"], point["copies"], point["step"])
        table.add_row(point["name"], *(f"{cell:.3f}" for cell in cells), note)
    console.print(table)


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    balance = row["imbalance"]
    yield from (f"{balance['mean']:.4f}", f"{balance['worst']:.3f}")
    for key in ("copies_per_token_layer", "cross_node_copies_per_token_layer"):
        yield "-" if row[key] is None else f"{row[key]:.3f}"
    yield f"{row['objective']:.4f}"[:7]
    yield f"{row['step']:.3f}"[:7] if "step" in row else "-"
    loose = row["gap"] is None or _is_loose(row)
    gap = "-" if loose else f"{row['gap']:.1%}" if row["gap"] < MOST_GAP else f">{MOST_GAP:.0%}"
    yield from ("-" if loose else f"{row['bound']:.4f}"[:7], gap)


def _is_loose(row: Mapping[str, Any]) -> bool:
    """A bound that is known at once and says next to nothing of a plan: it stays in ``--json``."""
    return bool(row["bound_is"].startswith("pairs"))


def _legend(rows: list[Mapping[str, Any]]) -> str:
    priced = ", ".join(sorted({row["objective_is"] for row in rows}))
    bounds = ", ".join(sorted({row["bound_is"] for row in rows if not _is_loose(row)}))
    gap = (
        f"gap: no plan within the same limits is better by more, by a certified bound ({bounds})."
        if bounds
        else "gap: no bound that says anything was certified in the time (--bound-limit SECONDS)."
    )
    return (
        "balance, worst: load of the fullest device over the mean, mean and worst layer. copies, "
        f"across: per token and layer, in all and across nodes. priced: {priced}. step: predicted "
        f"time of a layer, in that of a copy inside a node{_rate(rows)}.\n{gap}"
    )


def _rate(rows: list[Mapping[str, Any]]) -> str:
    """What an expert takes in it; the same in every row."""
    found = next((row["rates"] for row in rows if "rates" in row), None)
    return (
        "" if found is None else f" (an expert on a token: {found['expert'] / found['copy']:.3g})"
    )


def _refused(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from result.get("refused", {}).items()
    for name, parts in result.get("baselines", {}).items():
        if "refused" in parts:
            yield name, parts["refused"]
