"""What a cluster counts and reports is on the page, and what its dashboard asks for is served."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from moeserve.observe.metrics import Metrics
from moeserve.pools.members import Member, MemberLoad, Report, Role
from moeserve.pools.metrics import PARTS, add_counts, member_families

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "launch/grafana/pools.json"


def classes_of_counts() -> dict[str, type[Any]]:
    """Every dataclass of the folder that counts, by its name."""
    found = {}
    for path in sorted((ROOT / "moeserve/pools").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and re.fullmatch(r"\w+Count(s|ers)", node.name):
                dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                kind = getattr(importlib.import_module(dotted), node.name)
                if dataclasses.is_dataclass(kind):
                    found[node.name] = kind
    return found


COUNTING = classes_of_counts()


def reports() -> list[Report]:
    load = MemberLoad(running=3, waiting=2, free_blocks=5, total_blocks=8, draining=True)
    return [
        Report(Member(f"{role}-{n}", "x", role, "h:1"), load)
        for role in (Role.PREFILL, Role.DECODE, Role.DECODE)
        for n in (0,)
    ]


def served() -> dict[str, dict[str, float]]:
    """Values by the one label that there may be, of all that a cluster's page has."""
    metrics = Metrics()
    for kind in COUNTING.values():
        add_counts(metrics.parts, kind())
    metrics.also(lambda: member_families(reports()))
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        # Of what is counted by kind there is no sample before the first.
        for name in (family.name, f"{family.name}_total"):
            found.setdefault(name, {})
        for sample in family.samples:
            key = sample.labels.get("role", sample.labels.get("kind", ""))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_every_field_that_is_counted_has_a_metric() -> None:
    for name, kind in COUNTING.items():
        assert name in PARTS, f"{name} is not in moeserve/pools/metrics.py"
        part, now = PARTS[name]
        families = {
            family.name.removeprefix(f"moeserve_{part}_")
            for family in text_string_to_metric_families(page_of(kind()).decode())
            if family.name.startswith(f"moeserve_{part}_")
        }
        wanted = {
            re.sub("_s$", "_seconds", field.name)
            for field in dataclasses.fields(kind)
            if isinstance(getattr(kind(), field.name), int | float | dict)
        }
        assert wanted == families, name
        assert now <= {field.name for field in dataclasses.fields(kind)}, name


def page_of(counts: object) -> bytes:
    metrics = Metrics()
    add_counts(metrics.parts, counts)
    return metrics.render()[0]


def test_members_are_summed_by_role() -> None:
    found = served()
    assert found["moeserve_members"] == {"prefill": 1, "decode": 2, "cache": 0, "unified": 0}
    assert found["moeserve_members_running"]["decode"] == 6
    assert found["moeserve_members_draining"]["prefill"] == 1
    assert found["moeserve_members_kv_blocks_free"]["decode"] == 10


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    return variables + [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]


def test_the_dashboard_of_pools_asks_for_what_is_served() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bmoeserve_\w+", query)}
    assert len(asked) > 25
    absent = tuple(f"moeserve_{PARTS[name][0]}_" for name in PARTS if name not in COUNTING)
    missing = asked - served().keys()
    assert {name for name in missing if not name.startswith(absent)} == set()


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
    assert all(p["type"] == "row" or p["description"] for p in panels)
