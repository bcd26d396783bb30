"""Whoever waits is not late; who left says whom it blames."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.exchange.stragglers import LEAVING, StragglerDetector


def test_who_does_not_wait_is_late() -> None:
    stragglers = StragglerDetector(0, 4, lanes=2)
    stragglers.record(1, stragglers.report(10))
    stragglers.record(3, stragglers.report(9))  # a round behind: the late one's bytes are missing
    assert stragglers.missing_ranks(10) == [2]


def test_an_old_report_does_not_count() -> None:
    stragglers = StragglerDetector(0, 3, lanes=2)
    stragglers.record(1, stragglers.report(5))
    stragglers.record(2, stragglers.report(9))
    assert stragglers.missing_ranks(10) == [1]


def test_a_broken_connection_tells_more_than_silence() -> None:
    stragglers = StragglerDetector(2, 4, lanes=1)
    stragglers.disconnected(1)
    assert stragglers.missing_ranks(3) == [1]


def test_who_left_is_not_gone_and_its_blame_counts() -> None:
    stragglers = StragglerDetector(1, 4, lanes=1)
    stragglers.record(0, StragglerDetector(0, 4, lanes=1).report(LEAVING, {3}))
    stragglers.disconnected(0)
    assert stragglers.missing_ranks(3) == [3]


@given(st.integers(2, 6), st.integers(1, 4), st.data())
def test_somebody_else_is_always_named(world: int, lanes: int, data: st.DataObject) -> None:
    stragglers = StragglerDetector(0, world, lanes)
    others = st.integers(1, world - 1)
    notes = st.lists(st.integers(-1, 1), min_size=world + 1, max_size=world + 1)
    for source, note in data.draw(st.lists(st.tuples(others, notes))):
        stragglers.record(source, note)
    for source in data.draw(st.lists(others)):
        stragglers.disconnected(source)
    missing_ranks = stragglers.missing_ranks(data.draw(st.integers(0, 9)))
    assert missing_ranks
    assert 0 not in missing_ranks
    assert missing_ranks == sorted(set(missing_ranks))
