"""Whatever a part counts is on the page."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeserve.observe.metrics import Metrics


@dataclass(slots=True)
class MadeCounts:
    """What was ``made``, and by whom;
    ``open`` is of now."""

    made: int = 0
    waited_s: float = 0.0
    open: int = 0
    by_colour: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def page(metrics: Metrics) -> dict[str, tuple[str, str, dict[str, float]]]:
    """Type, help and values by label of every family of ours that is no engine's."""
    return {
        family.name: (
            family.type,
            family.documentation,
            {s.labels.get("kind", ""): s.value for s in family.samples},
        )
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        if family.name.startswith("moeserve_made_up")
    }


def test_each_field_is_a_metric_and_read_when_asked() -> None:
    metrics, counts = Metrics(), MadeCounts()
    metrics.parts.add("made_up", lambda: counts, {"open"})
    assert page(metrics)["moeserve_made_up_made"][2] == {"": 0}
    counts.made, counts.waited_s, counts.open = 7, 0.25, 3
    counts.by_colour = {"red": 2, "blue": 5}
    found = page(metrics)
    text = "What was ``made``, and by whom; ``open`` is of now."
    assert found == {
        "moeserve_made_up_made": ("counter", f"made: {text}", {"": 7}),
        "moeserve_made_up_waited_seconds": ("counter", f"waited_s: {text}", {"": 0.25}),
        "moeserve_made_up_open": ("gauge", f"open: {text}", {"": 3}),
        "moeserve_made_up_by_colour": ("counter", f"by_colour: {text}", {"red": 2, "blue": 5}),
    }
    assert metrics.parts.totals() == {
        "made_up_made": 7,
        "made_up_waited_s": 0.25,
        "made_up_open": 3,
        "made_up_by_colour": 7,
    }


def test_two_parts_of_one_name_are_a_mistake() -> None:
    metrics = Metrics()
    metrics.parts.add("made_up", MadeCounts)
    with pytest.raises(AssertionError, match="made_up"):
        metrics.parts.add("made_up", MadeCounts)
