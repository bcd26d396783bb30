"""The report of a plan: one HTML page that needs nothing beside it and runs no script.

It says which plan and routing it is of, the headline against contiguous and EPLB, and shows the
maps of ``pictures``. Headline and pictures are of what was held out, where there is any. Text from
files, as names, is escaped. What a plan's own file says of its bound is shown as said there.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from moeserve.placement.fitted import FITTED, HELD_OUT, UNKNOWN
from moeserve.placement.heat_map import HeatMap, figure
from moeserve.placement.tables import JUDGED, OURS, Row

PREFERRED = (HELD_OUT, FITTED, UNKNOWN)
_NOTES = {
    HELD_OUT: "on routing that the plan was not fitted on",
    FITTED: "on the routing that the plan was fitted on",
    UNKNOWN: "on routing of which the plan does not say whether it was fitted on it",
}


@dataclass(frozen=True, slots=True)
class DrawnPoint:
    """A plan that could have been: priced copies per token-layer against imbalance held out."""

    name: str
    copies: float
    imbalance: float
    chosen: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PlacementReport:
    """What the page is made of; ``rows`` have all plans on all parts of the routing."""

    name: str
    outline: str
    routing: Sequence[str]
    rows: Sequence[Row]
    loads: Sequence[HeatMap]
    layers: Sequence[HeatMap] = ()
    traffic: Sequence[HeatMap] = ()
    frontier: Sequence[DrawnPoint] = ()
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def page(report: PlacementReport) -> str:
    """The whole document."""
    css = resources.files("moeserve.placement").joinpath("page.css").read_text(encoding="utf-8")
    name = html.escape(report.name)
    routing = "; ".join(html.escape(text) for text in report.routing)
    sections = "\n".join(_sections(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Expert placement: {name}</title><style>\n{css}</style></head><body>\n"
        f"<h1>Expert placement: {name}</h1><p>{html.escape(report.outline)}</p>"
        f'<p class="soft">Routing: {routing}</p>\n'
        f"{_headline(report.rows)}\n{sections}\n</body></html>\n"
    )


def judged_first(rows: Sequence[Row]) -> str:
    """The kind of routing that headline and pictures are of."""
    kinds = {kind for _, kind, _ in rows}
    return next(kind for kind in PREFERRED if kind in kinds)


def _sections(report: PlacementReport) -> Iterator[str]:
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    yield _section("Beside contiguous and EPLB", _table(report.rows) + notes)
    kind = judged_first(report.rows)
    share = '<p class="scale">0 <i class="share"></i> the most</p>'
    yield _section(
        "Load of each device",
        f"<p>Over the mean of its layer, {_NOTES[kind]}. What is even has no colour.</p>"
        '<p class="scale">half <i class="load"></i> twice or more</p>' + _maps(report.loads),
    )
    if report.layers:
        yield _section(
            "Experts used together",
            "<p>Grouped well, strong colour lies within the borders of devices.</p>"
            + share
            + _maps(report.layers),
        )
    if report.traffic:
        yield _section(
            "Traffic between devices",
            f"<p>Share of token-layers that use both devices, {_NOTES[kind]}: the less, the fewer "
            "copies.</p>" + share + _maps(report.traffic),
        )
    if report.frontier:
        yield _section("What could be had instead", _frontier(report.frontier))
    raw = html.escape(json.dumps(report.figures, indent=1))
    yield f"<section><details><summary>All figures, as JSON</summary><pre>{raw}</pre></details></section>"  # noqa: E501


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _maps(maps: Sequence[HeatMap]) -> str:
    return f'<div class="maps">{"".join(map(figure, maps))}</div>'


def _headline(rows: Sequence[Row]) -> str:
    """This plan in a few numbers, each against the others."""
    kind = judged_first(rows)
    of = {name: figures for name, judged, figures in rows if judged == kind}
    ours = of.pop(OURS)
    tiles = []
    for key, (title, digits) in _HEADLINES.items():
        value = _value(ours, key)
        if value is None:
            continue
        beside = "".join(
            _against(name, value, _value(figures, key)) for name, figures in of.items()
        )
        tiles.append(f"<div><b>{value:,.{digits}f}</b><span>{title}</span>{beside}</div>")
    return (
        f'<div class="tiles">{"".join(tiles)}</div><p class="soft">{_NOTES[kind].capitalize()}.</p>'
    )


def _against(name: str, value: float, other: float | None) -> str:
    if not other:
        return ""
    change = value / other - 1
    css = "better" if change < -0.0005 else "worse" if change > 0.0005 else "even"
    return f'<span class="{css}">{change:+.1%} against {html.escape(name)}</span>'


# Key of a row's figures: what it is, digits shown.
_HEADLINES = {
    "step": ("predicted step, a copy being 1", 2),
    "balance": ("fullest device over the mean", 3),
    "copies": ("copies per token and layer", 3),
    "across": ("of these across nodes", 3),
    "bytes_inside": ("bytes per token inside nodes", 0),
    "bytes_across": ("bytes per token across nodes", 0),
}


def _value(figures: Mapping[str, Any], key: str) -> float | None:
    sent = figures.get("bytes_per_token", {})
    found: dict[str, float | None] = {
        "step": figures.get("step"),
        "balance": figures["imbalance"]["mean"],
        "copies": figures["copies_per_token_layer"],
        "across": figures["cross_node_copies_per_token_layer"] or None,
        "bytes_inside": sent.get("inside_nodes"),
        "bytes_across": sent.get("across_nodes") or None,
    }
    return found[key]


def _table(rows: Sequence[Row]) -> str:
    shown = [
        key for key in _HEADLINES if any(_value(figures, key) is not None for *_, figures in rows)
    ]
    heads = "".join(f"<th>{_HEADLINES[key][0]}</th>" for key in shown)
    lines = []
    for name, kind, figures in rows:
        values = [(_value(figures, key), _HEADLINES[key][1]) for key in shown]
        cells = "".join(
            f"<td>{'–' if v is None else format(v, f',.{digits}f')}</td>" for v, digits in values
        )
        worst = f"<td>{figures['imbalance']['worst']:.3f}</td>"
        css = ' class="ours"' if name == OURS else ""
        lines.append(
            f"<tr{css}><td>{html.escape(name)}</td><td>{JUDGED[kind]}</td>{cells}{worst}</tr>"
        )
    heads += "<th>fullest over the mean, worst layer</th>"
    return (
        f'<div class="scroll"><table><thead><tr><th>plan</th><th>judged on</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _frontier(points: Sequence[DrawnPoint]) -> str:
    """Copies against balance, as a drawing whose numbers are those of the list below it."""
    across = _axis([p.imbalance for p in points], 80, 640)
    up = _axis([p.copies for p in points], 280, 50)
    ordered = sorted(points, key=lambda p: p.imbalance)
    line = "L".join(f"{across(p.imbalance):.1f} {up(p.copies):.1f}" for p in ordered)
    dots = "".join(
        f'<circle class="{"ours" if p.chosen else "other"}" cx="{across(p.imbalance):.1f}" '
        f'cy="{up(p.copies):.1f}" r="{7 if p.chosen else 4}"/>'
        f'<text x="{across(p.imbalance):.1f}" y="{up(p.copies) - 11:.1f}" text-anchor="middle">'
        f"{number}</text>"
        for number, p in enumerate(ordered, 1)
    )
    listed = "".join(
        f"<li{' class=ours' if p.chosen else ''}>{html.escape(p.name)}: fullest {p.imbalance:.3f} "
        f"of the mean, {p.copies:.3f} copies{', chosen' if p.chosen else ''}</li>"
        for p in ordered
    )
    return (
        "<p>Priced copies per token and layer (upwards) against the fullest device over the mean "
        '(to the right), held out. In colour: what was chosen.</p><svg class="frontier" role="img" '
        'viewBox="0 0 700 310" aria-label="Copies against balance, held out">'
        f'<path d="M50 20V300H680"/><path d="M{line}"/>{dots}</svg><ol>{listed}</ol>'
    )


def _axis(values: Sequence[float], begin: float, end: float) -> Any:
    least, most = min(values), max(values)
    span = (most - least) or 1.0
    return lambda value: begin + (end - begin) * (value - least) / span
