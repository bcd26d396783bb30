"""Who is crowded gives to who is free, at a bounded rate, and it does not swing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms
from moeserve.pools.rebalancing import Rebalancing
from moeserve.pools.routing.crowding import Crowding, CrowdMarks
from moeserve.pools.routing.freeness import Move, freeness
from moeserve.pools.routing.loads import LATE_S, LoadRow, LoadTable

BLOCK = 16


def report(name: str, steps: int, running: int = 1, **load: bool) -> Report:
    """Of a member that can decode so many steps of each request."""
    member = Member(
        name, name, Role.DECODE, "127.0.0.1:80", terms=ServedTerms("m", "m", block_size=BLOCK)
    )
    free = max(1, running) * steps // BLOCK
    return Report(
        member, MemberLoad(running=running, free_blocks=free, total_blocks=10_000, **load)
    )


def rows(*reports: Report) -> list[LoadRow]:
    table = LoadTable()
    table.update(reports, 0.0)
    return list(table.rows.values())


def test_a_member_is_crowded_from_the_low_mark_until_it_is_calm() -> None:
    crowding = Crowding(per_s=100.0)
    free = report("free", 1024)
    said = []
    for now, steps in enumerate((48, 32, 16, 48, 64, 48)):
        pairs = crowding.decide(rows(report("full", steps), free), float(now))
        said.append(bool(pairs))
        assert set(pairs) <= {Move("full", "free")}
        assert crowding.crowded == ({"full"} if pairs else set())
    assert said == [False, False, True, True, False, False]


def test_nobody_takes_who_is_not_free_and_nothing_is_taken_of_who_has_nothing() -> None:
    crowding = Crowding(per_s=100.0)
    for now in (0.0, 1.0):
        assert not crowding.decide(rows(report("full", 0), report("half", 128)), now)
        assert not crowding.decide(rows(report("full", 0, running=0), report("free", 1024)), now)
    assert crowding.decide(rows(report("leaves", 512, draining=True), report("free", 1024)), 2.0)


def test_pairs_come_at_a_bounded_rate() -> None:
    crowding = Crowding(per_s=2.0)
    many = rows(
        *(report(f"full-{i}", 0) for i in range(8)), *(report(f"free-{i}", 1024) for i in range(8))
    )
    assert not crowding.decide(many, 0.0)
    assert [len(crowding.decide(many, 0.5 * i)) for i in range(1, 5)] == [1, 1, 1, 1]
    assert len(crowding.decide(many, 100.0)) == 2, "what was not used is no reserve"
    none = Crowding(per_s=0.0)
    assert not [pair for now in range(100) for pair in none.decide(many, float(now))]


@given(
    st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=6), max_size=20),
    st.floats(0.1, 10),
)
def test_no_member_gives_and_takes_at_once_and_no_more_than_the_rate_moves(
    looks: list[list[int]], per_s: float
) -> None:
    crowding, moved = Crowding(per_s), 0
    for now, steps in enumerate(looks):
        found = rows(*(report(str(i), s) for i, s in enumerate(steps)))
        pairs = crowding.decide(found, float(now))
        moved += len(pairs)
        free = {row.member.id: freeness(row) for row in found}
        assert not {p.source for p in pairs} & {p.target for p in pairs}
        assert all(free[p.source] < 64 and free[p.target] > 128 for p in pairs)
    assert moved <= per_s * max(0, len(looks) - 1) + 1e-6


def test_marks_that_would_swing_are_refused() -> None:
    with pytest.raises(ConfigError, match="low < calm <= high"):
        CrowdMarks(low=64.0, calm=64.0)


def test_what_is_due_is_asked_for_and_counted_and_silent_members_are_left_alone() -> None:
    asked: list[tuple[str, str]] = []

    class Engine:
        def move_from(self, source: str, target: str) -> bool:
            asked.append((source, target))
            return source == "full"

    table, now = LoadTable(), 0.0
    rebalancing = Rebalancing(table, Engine(), Crowding(per_s=10.0), clock=lambda: now)
    table.update([report("silent", 2048)], now)
    for now in (0.1, LATE_S, 2 * LATE_S):
        table.update([report("full", 0), report("free", 1024)], now)
        rebalancing.look()
    assert asked == [("full", "silent"), ("full", "free")]
    assert (rebalancing.counts.pairs, rebalancing.counts.asked) == (2, 2)
    assert rebalancing.counts.crowded == 1
    table.update([report("full", 500)], now)
    rebalancing.look()
    assert rebalancing.counts.crowded == 0
