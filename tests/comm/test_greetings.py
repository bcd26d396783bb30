"""Whoever waits is not late; who left says whom it blames."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.exchange.stragglers import LEAVING, Greetings


def test_who_does_not_wait_is_late() -> None:
    greetings = Greetings(0, 4, lanes=2)
    greetings.hear(1, greetings.greeting(10))
    greetings.hear(3, greetings.greeting(9))  # a round behind: the late one's bytes are missing
    assert greetings.absent(10) == [2]


def test_an_old_greeting_does_not_count() -> None:
    greetings = Greetings(0, 3, lanes=2)
    greetings.hear(1, greetings.greeting(5))
    greetings.hear(2, greetings.greeting(9))
    assert greetings.absent(10) == [1]


def test_a_broken_connection_tells_more_than_silence() -> None:
    greetings = Greetings(2, 4, lanes=1)
    greetings.lose(1)
    assert greetings.absent(3) == [1]


def test_who_left_is_not_gone_and_its_blame_counts() -> None:
    greetings = Greetings(1, 4, lanes=1)
    greetings.hear(0, Greetings(0, 4, lanes=1).greeting(LEAVING, {3}))
    greetings.lose(0)
    assert greetings.absent(3) == [3]


@given(st.integers(2, 6), st.integers(1, 4), st.data())
def test_somebody_else_is_always_named(world: int, lanes: int, data: st.DataObject) -> None:
    greetings = Greetings(0, world, lanes)
    others = st.integers(1, world - 1)
    notes = st.lists(st.integers(-1, 1), min_size=world + 1, max_size=world + 1)
    for source, note in data.draw(st.lists(st.tuples(others, notes))):
        greetings.hear(source, note)
    for source in data.draw(st.lists(others)):
        greetings.lose(source)
    absent = greetings.absent(data.draw(st.integers(0, 9)))
    assert absent
    assert 0 not in absent
    assert absent == sorted(set(absent))
