"""Leases end when the registry has listened for so long, and by nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ExhaustedError, InvalidRequestError, NotFoundError
from moeserve.pools.members import Member, MemberLoad, Report, Role
from moeserve.pools.registry.leases import MOST_STEP_S, LeaseTable

LEASE_S = 2.0
MOST = 4


def report(name: str, sequence: int = 1, address: str = "127.0.0.1:80") -> Report:
    return Report(Member(name, name, Role.DECODE, address), MemberLoad(sequence))


class ObviousLeases:
    """The same in the plainest words: every member has the seconds that it has left."""

    def __init__(self) -> None:
        self.rest: dict[str, float] = {}
        self.sequences: dict[str, int] = {}
        self.now: float | None = None

    def pass_time(self, now: float) -> None:
        passed = 0.0 if self.now is None else min(max(0.0, now - self.now), MOST_STEP_S)
        self.now = now
        for name in self.rest:
            self.rest[name] -= passed


names = st.sampled_from("abcdef")
steps = st.tuples(
    st.sampled_from(["join", "renew", "renew", "leave", "expire", "expire"]),
    names,
    st.integers(0, 9),
    st.sampled_from([0.0, 0.25, 0.25, 0.5, 60.0, -30.0]),
)


@given(st.lists(steps, max_size=60))
def test_the_table_is_the_obvious_one(taken: list[tuple[str, str, int, float]]) -> None:
    table, plain, now = LeaseTable(LEASE_S, MOST), ObviousLeases(), 100.0
    for step, name, sequence, seconds in taken:
        now += seconds
        refused = None
        try:
            if step == "join":
                table.join(report(name, sequence), now)
                plain.pass_time(now)
                plain.rest[name], plain.sequences[name] = LEASE_S, sequence
            elif step == "renew":
                known = table.renew(name, MemberLoad(sequence), now)
                plain.pass_time(now)
                plain.rest[name] = LEASE_S
                plain.sequences[name] = max(sequence, plain.sequences[name])
                assert known.load.sequence == plain.sequences[name]
            elif step == "leave":
                assert table.leave(name) == (plain.rest.pop(name, None) is not None)
            else:
                gone = table.expire(now)
                plain.pass_time(now)
                assert set(gone) == {n for n, rest in plain.rest.items() if rest <= 0}
                for member_id in gone:
                    del plain.rest[member_id]
        except NotFoundError:
            refused = name not in plain.rest
        except ExhaustedError:
            refused = name not in plain.rest and len(plain.rest) == MOST
        assert refused in (None, True)
        assert table.reports.keys() == plain.rest.keys()


def test_a_registry_that_was_stopped_drops_nobody() -> None:
    table = LeaseTable(LEASE_S, MOST)
    table.join(report("a"), 0.0)
    assert table.expire(1000.0) == ()
    assert table.expire(1000.4) == ()
    table.renew("a", MemberLoad(2), 1000.5)
    for step in range(1, 8):
        assert table.expire(1000.5 + step / 4) == ()
    assert table.expire(1000.5 + LEASE_S) == ("a",)


def test_an_id_is_one_members() -> None:
    table = LeaseTable(LEASE_S, MOST)
    table.join(report("a"), 0.0)
    table.join(report("a", 5), 0.1)
    with pytest.raises(InvalidRequestError, match="an id of its own"):
        table.join(report("a", address="127.0.0.1:81"), 0.2)
    assert table.reports["a"].load.sequence == 5
