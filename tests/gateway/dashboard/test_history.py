"""What is kept for the dashboard, against what a list of everything says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.gateway.dashboard.history import (
    KEPT_S,
    SAMPLE_S,
    WINDOW_S,
    Attainment,
    SloTargets,
    SloWindow,
    TrafficHistory,
    TrafficTotals,
)
from moeserve.observe.requests import OK, RequestRecord

TARGETS = SloTargets(ttft_s=1.0, tpot_s=0.1)


def record(
    ttft_s: float | None, tpot_s: float | None, status: str = OK, refused: bool = False
) -> RequestRecord:
    return RequestRecord("x", "m", status, 2.0, refused, ttft_s=ttft_s, tpot_s=tpot_s)


seconds = st.sampled_from([None, 0.01, 0.1, 0.5, 1.0, 1.5])
records = st.builds(record, seconds, seconds, st.sampled_from([OK, "INTERNAL", "CANCELLED"]))
arrivals = st.lists(st.tuples(st.integers(0, 90), records), max_size=40)


@given(arrivals)
def test_the_window_is_what_ended_within_it(steps: list[tuple[int, RequestRecord]]) -> None:
    window, now, all_of_them = SloWindow(TARGETS), 0, []
    for wait, ended in steps:
        now += wait
        window.add(now, ended)
        all_of_them.append((now, ended))
    counted = [r for at, r in all_of_them if at > now - WINDOW_S and r.status != "CANCELLED"]
    ttft = [r.status == OK and r.ttft_s is not None and r.ttft_s <= 1.0 for r in counted]
    tpot = [r.status == OK and (r.tpot_s is None or r.tpot_s <= 0.1) for r in counted]
    assert window.attainment(now) == Attainment(
        WINDOW_S,
        1.0,
        0.1,
        requests=len(counted),
        ttft=sum(ttft),
        tpot=sum(tpot),
        good=sum(a and b for a, b in zip(ttft, tpot, strict=True)),
        failed=sum(r.status != OK for r in counted),
    )


def test_refused_requests_are_no_answers() -> None:
    window = SloWindow(TARGETS)
    window.add(0.0, record(None, None, "RESOURCE_EXHAUSTED", refused=True))
    assert window.attainment(0.0).requests == 0


def test_memory_does_not_grow_with_requests() -> None:
    window = SloWindow(TARGETS)
    for n in range(20_000):
        window.add(n / 100, record(0.5, 0.05))
    assert len(window._seconds) == WINDOW_S
    assert window.attainment(199.99).requests == WINDOW_S * 100


def test_points_are_rates_between_totals() -> None:
    history = TrafficHistory()
    history.add(0.0, TrafficTotals(0, 0))
    history.add(5.0, TrafficTotals(100, 10))
    history.add(10.0, TrafficTotals(100, 60))
    first, second = history.points(11.0)
    assert (first.age_s, first.prompt_per_s, first.generated_per_s) == (6.0, 20.0, 2.0)
    assert (second.age_s, second.prompt_per_s, second.generated_per_s) == (1.0, 0.0, 10.0)


@pytest.mark.parametrize("samples", [1, 50, 1000])
def test_so_many_minutes_are_kept(samples: int) -> None:
    history = TrafficHistory()
    for n in range(samples):
        history.add(n * SAMPLE_S, TrafficTotals(n, n))
    points = history.points(samples * SAMPLE_S)
    assert len(points) == min(samples - 1, KEPT_S / SAMPLE_S)
    assert all(point.age_s <= KEPT_S for point in points)
