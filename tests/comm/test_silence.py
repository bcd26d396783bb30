"""Silence makes a rank late; our own sleep does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.control.silence import SilenceDetector


def test_a_rank_is_late_after_the_limit_and_not_before() -> None:
    watch = SilenceDetector.begin([1, 2], now=0.0, limit_s=4.0, period_s=0.5)
    for step in range(1, 9):
        watch.record(2, step * 0.5)
        assert watch.late(step * 0.5) == {}
    assert watch.late(4.5) == {1: 4.5}


def test_a_rank_that_slept_itself_gives_the_others_their_time_again() -> None:
    watch = SilenceDetector.begin([1], now=0.0, limit_s=4.0, period_s=0.5)
    assert watch.late(100.0) == {}
    assert watch.late(100.5) == {}
    late = [t for t in range(1001, 1100) if watch.late(t / 10)]
    assert late[0] == 1031, "99 s of sleep, less what a look may last, do not count"


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=100))
def test_whoever_is_heard_at_every_look_is_never_late(gaps: list[float]) -> None:
    watch, now = SilenceDetector.begin([1], now=0.0, limit_s=1.5, period_s=0.5), 0.0
    for gap in gaps:
        now += gap
        watch.record(1, now - gap / 2)
        assert watch.late(now) == {}


@given(st.lists(st.floats(0.01, 1.0), min_size=200, max_size=200))
def test_whoever_is_silent_is_late_in_the_end_and_stays_so(gaps: list[float]) -> None:
    watch, now, told = SilenceDetector.begin([1], now=0.0, limit_s=1.0, period_s=0.5), 0.0, []
    for gap in gaps:
        now += gap
        told.append(bool(watch.late(now)))
    assert told == sorted(told)
    assert told[-1] == (now > 1.0)
