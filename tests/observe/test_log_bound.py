"""So many lines in each period, whatever comes, and none is lost from the count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.observe.log_bound import LogBound


@given(
    most=st.integers(1, 4),
    pauses=st.lists(st.sampled_from([0.0, 0.3, 1.0, 7.0]), min_size=1, max_size=40),
)
def test_no_period_has_more_lines_than_it_may_and_all_are_counted(
    most: int, pauses: list[float]
) -> None:
    now = [0.0]
    bound = LogBound(most, 1.0, lambda: now[0])
    admitted: list[float] = []
    told = 0
    for pause in pauses:
        now[0] += pause
        if bound.admits():
            admitted.append(now[0])
            told += bound.take_left_out()
    assert admitted
    for first, later in zip(admitted, admitted[most:], strict=False):
        assert later > first
    assert len(admitted) + told + bound.take_left_out() == len(pauses)
    assert bound.take_left_out() == 0


def test_the_first_of_a_period_is_admitted() -> None:
    now = [5.0]
    bound = LogBound(1, 60.0, lambda: now[0])
    assert [bound.admits() for _ in range(3)] == [True, False, False]
    now[0] += 59.9
    assert not bound.admits()
    now[0] += 0.1
    assert bound.admits()
    assert bound.take_left_out() == 3


def test_as_many_are_admitted_as_were_asked_for() -> None:
    bound = LogBound(3, 60.0, lambda: 0.0)
    assert [bound.admits() for _ in range(5)] == [True, True, True, False, False]
