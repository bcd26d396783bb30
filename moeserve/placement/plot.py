"""What ``moeserve place plot`` puts together: figures of a plan beside contiguous and EPLB, maps.

EPLB is made from what the plan was fitted on; where the plan does not say, or was fitted on other
routing, from the very routing it is judged on, which the page then says. ``frontier`` is read from
the plan's figures, ``{"points": [{"name", "copies", "imbalance"}]}``, with the name that was
``chosen`` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeserve.errors import PlacementError
from moeserve.placement import pictures
from moeserve.placement.baselines import baselines
from moeserve.placement.cluster import Cluster
from moeserve.placement.fitted import judge
from moeserve.placement.judged import judged
from moeserve.placement.page import DrawnPoint, PlacementReport, judged_first, page
from moeserve.placement.plan import Plan, write_whole
from moeserve.placement.problem import Problem
from moeserve.placement.report import CopyBytes
from moeserve.placement.routing import Routing
from moeserve.placement.step_time import PlacementRates
from moeserve.placement.tables import OURS, outline, table_rows

MOST_POINTS = 200
MOST_NAME = 80


@dataclass(frozen=True, slots=True)
class PlotOptions:
    """``layer`` is the plan's row whose experts are shown; the others as in ``judged``."""

    layer: int = 0
    batch: int = 256
    homes: str = "uniform"
    copy_bytes: CopyBytes = field(default_factory=CopyBytes)
    rates: PlacementRates = field(default_factory=PlacementRates)


def report_of(
    plan: Plan, name: str, routing: Routing, cluster: Cluster, options: PlotOptions
) -> PlacementReport:
    """Everything that the page shows of ``plan``."""
    pictures.require_layer(plan, options.layer)
    known = judge(plan, routing)
    parts = known.parts(routing)
    problem = Problem(cluster, plan.num_slots, plan.dataflow, plan.phase, batch=options.batch)
    made = baselines(problem, known.fitted or routing)
    beside = {n: p for n, p in made.items() if isinstance(p, Plan)}
    result = {
        "judged_on": known.kind,
        "plan": plan.outline(),
        **_judged(plan, parts, cluster, options),
        "baselines": {n: _judged(p, parts, cluster, options) for n, p in beside.items()},
    }
    rows = list(table_rows("plot", result))
    shown = parts[judged_first(rows)]
    notes = [f"{n} could not run: {why}" for n, why in made.items() if isinstance(why, str)]
    if known.fitted is None:
        notes.append("EPLB was made from the very routing that it is judged on here.")
    return PlacementReport(
        name,
        outline(plan.outline()),
        [_said(w.name, w.topk_TLK, w.lengths) for w in routing.workloads]
        if routing.has_tokens
        else [f"{w.name} (counts)" for w in routing.workloads],
        rows,
        pictures.load_maps({**beside, OURS: plan}, shown),
        pictures.layer_maps(plan, shown, options.layer) if shown.has_tokens else (),
        pictures.traffic_maps({**beside, OURS: plan}, shown) if shown.has_tokens else (),
        _frontier(plan.figures),
        notes + _bound_notes(plan.figures),
        result,
    )


def write(out: Path, report: PlacementReport) -> Path:
    """``out`` where it ends in .html, else ``report.html`` in that folder; the file written."""
    file = out if out.suffix == ".html" else out / "report.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise PlacementError(f"cannot write into {out}: {cause.strerror}") from cause
    write_whole(file, page(report))
    return file


def _judged(
    plan: Plan, parts: Mapping[str, Routing], cluster: Cluster, options: PlotOptions
) -> dict[str, Any]:
    return {
        key: judged(
            plan,
            part,
            cluster,
            batch=options.batch,
            homes=options.homes,
            copy_bytes=options.copy_bytes,
            rates=options.rates,
        )
        for key, part in parts.items()
    }


def _said(name: str, topk_TLK: Any, lengths: Any) -> str:
    return f"{name} ({len(topk_TLK):,} tokens in {len(lengths):,} sequences)"


def _bound_notes(said: Mapping[str, Any]) -> list[str]:
    """What ``solve`` wrote into the plan about its bound, if it is a number."""
    part = said.get("fitted") if isinstance(said.get("fitted"), dict) else said
    gap = part.get("gap") if isinstance(part, dict) else None
    by = part.get("bound_is") if isinstance(part, dict) else None
    if not _is_number(gap) or by not in ("columns", "heaviest copies"):
        return []
    return [
        f"When it was made: no plan within the same limits is better by more than {gap:.1%} on "
        "what it was fitted on (certified)."
    ]


def _frontier(said: Mapping[str, Any]) -> list[DrawnPoint]:
    """Those of the plan's file that are points; a file may say anything."""
    frontier: Any = said.get("frontier")
    listed = frontier.get("points") if isinstance(frontier, dict) else None
    points = []
    for point in listed[:MOST_POINTS] if isinstance(listed, list) else ():
        if not isinstance(point, dict):
            continue
        copies: Any = point.get("copies")
        imbalance: Any = point.get("imbalance")
        if _is_number(copies) and _is_number(imbalance):
            name = str(point.get("name", ""))[:MOST_NAME]
            chosen = point.get("name") == said.get("chosen")
            points.append(DrawnPoint(name, float(copies), float(imbalance), chosen))
    return points


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12 and math.isfinite(value)
