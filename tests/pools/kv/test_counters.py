"""What came from whom, however many come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.engine.ranks.counted import ReceivedKv
from moeserve.pools.kv.counters import MOST_ADDRESSES, KvCounters

arrivals = st.lists(
    st.tuples(st.integers(0, 2 * MOST_ADDRESSES), st.integers(0, 2**40), st.integers(0, 99)),
    max_size=600,
)


@given(arrivals)
def test_nothing_is_lost_and_addresses_are_bounded(taken: list[tuple[int, int, int]]) -> None:
    counters = KvCounters()
    for port, nbytes, runs in taken:
        counters.add_from(f"h:{port}", nbytes, runs)
    received = counters.received()
    assert sum(one.bytes for one in received) == sum(nbytes for _, nbytes, _ in taken)
    assert sum(one.runs for one in received) == sum(runs for _, _, runs in taken)
    assert len(received) <= MOST_ADDRESSES + 1


def test_each_address_has_its_own() -> None:
    counters = KvCounters()
    counters.add_from("a:1", 10, 2)
    counters.add_from("b:1", 5, 1)
    counters.add_from("a:1", 10, 2)
    assert counters.received() == (ReceivedKv("a:1", 20, 4), ReceivedKv("b:1", 5, 1))
