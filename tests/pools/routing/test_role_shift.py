"""Unified members turn one by one, as load has it, and do not turn to and fro."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms
from moeserve.pools.registry.base import Changes
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.routing.freeness import MostFree
from moeserve.pools.routing.kv_local import KvLocal
from moeserve.pools.routing.leaning import Leaning
from moeserve.pools.routing.locality_free import LocalityFree
from moeserve.pools.routing.named import DEFAULT_POLICY, POLICIES, WANT_KEYS, policy_named
from moeserve.pools.routing.role_shift import RoleShift, ShiftMarks, pressure

MARKS = ShiftMarks()
QUIET = MemberLoad(free_blocks=1000, total_blocks=1000, prefill_rate=1000.0, step_s=0.02)
LONG_QUEUE = replace(QUIET, waiting_tokens=5000)
FULL = replace(QUIET, free_blocks=50, running=20)


class Members:
    """Unified members that see each other's reports, and decide twice a second."""

    def __init__(self, count: int) -> None:
        self.shifts = {f"m{i}": RoleShift(f"m{i}", MARKS) for i in range(count)}
        self.leans = dict.fromkeys(self.shifts, Role.UNIFIED)
        self.now = 0.0

    def reports(self, load: MemberLoad) -> list[Report]:
        return [
            Report(Member(name, name, Role.UNIFIED, "127.0.0.1:80"), replace(load, leans=leans))
            for name, leans in self.leans.items()
        ]

    def step(self, load: MemberLoad) -> int:
        """How many turned."""
        before, seen = self.leans, self.reports(load)
        self.leans = {n: shift.decide(seen, self.now) for n, shift in self.shifts.items()}
        self.now += 0.5
        return sum(before[n] is not self.leans[n] for n in before)

    def run(self, load: MemberLoad, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            assert self.step(load) <= 1

    def count(self, role: Role) -> int:
        return list(self.leans.values()).count(role)


def test_a_long_queue_turns_members_to_prefill_one_by_one_and_never_all() -> None:
    members = Members(4)
    members.run(LONG_QUEUE, MARKS.hold_s - 1)
    assert members.count(Role.PREFILL) == 1
    members.run(LONG_QUEUE, 1 + MARKS.hold_s)
    assert members.count(Role.PREFILL) == 2
    members.run(LONG_QUEUE, 10 * MARKS.hold_s)
    assert members.count(Role.PREFILL) == 3
    assert members.count(Role.UNIFIED) == 1


def test_full_memory_turns_members_to_decode_and_never_all() -> None:
    members = Members(3)
    members.run(FULL, 10 * MARKS.hold_s)
    assert members.count(Role.DECODE) == 2


def test_they_turn_back_when_it_is_quiet() -> None:
    members = Members(3)
    members.run(LONG_QUEUE, 4 * MARKS.hold_s)
    assert members.count(Role.PREFILL) == 2
    between = replace(QUIET, waiting_tokens=300)  # above the low mark, below the high one
    members.run(between, 4 * MARKS.hold_s)
    assert members.count(Role.PREFILL) == 2
    for _ in range(int(8 * MARKS.hold_s)):
        members.step(QUIET)
    assert members.count(Role.UNIFIED) == 3


def test_members_that_disagree_about_nothing_turn_seldom() -> None:
    """Load that swings from one side to the other every second."""
    members = Members(2)
    turns = 0
    for second in range(60):
        for _ in range(2):
            turns += members.step(LONG_QUEUE if second % 2 else FULL)
    assert turns <= 60 / MARKS.hold_s + 1


some_loads = st.builds(
    MemberLoad,
    running=st.integers(0, 9),
    waiting_tokens=st.sampled_from([0, 100, 1000, 100_000]),
    free_blocks=st.integers(0, 100),
    total_blocks=st.just(100),
    prefill_rate=st.sampled_from([0.0, 1000.0]),
    draining=st.booleans(),
)
some_members = st.tuples(st.sampled_from(Role), some_loads)


@given(st.lists(st.lists(some_members, min_size=1, max_size=5), min_size=1, max_size=20))
def test_somebody_always_prefills_and_decodes(
    times: list[list[tuple[Role, MemberLoad]]],
) -> None:
    """A member turns away from a side only while another one does that side."""
    shift = RoleShift("m0", MARKS)
    for step, cluster in enumerate(times):
        own = replace(cluster[0][1], leans=shift.leans, draining=False)
        reports = [Report(Member("m0", "m0", Role.UNIFIED, "a:1"), own)]
        reports += [
            Report(Member(f"m{i}", "x", role, "a:1"), load)
            for i, (role, load) in enumerate(cluster[1:], start=1)
        ]
        before = shift.leans
        leans = shift.decide(reports, 10.0 * step)
        others = pressure(reports[1:])
        assert leans is before or Role.UNIFIED in (leans, before)
        if leans is not before:
            assert leans is not Role.PREFILL or others.decoding
            assert leans is not Role.DECODE or others.prefilling


def test_marks_that_would_turn_members_to_and_fro_are_refused() -> None:
    with pytest.raises(ConfigError, match="backlog"):
        ShiftMarks(backlog_low_s=2.0, backlog_high_s=2.0)
    with pytest.raises(ConfigError, match="fullness"):
        ShiftMarks(full_low=0.9, full_high=0.8)


def test_a_queue_that_nobody_works_on_is_without_end() -> None:
    report = Report(Member("a", "a", Role.PREFILL, "a:1"), MemberLoad(waiting_tokens=5))
    assert pressure([report]).backlog_s == float("inf")
    assert pressure([]).backlog_s == 0.0


def test_a_member_leans_by_what_it_sees() -> None:
    own = Member("m0", "x", Role.UNIFIED, "a:1", terms=ServedTerms(compute_id="one"))
    other = replace(own, id="m1")
    foreign = replace(own, id="m2", terms=ServedTerms(compute_id="another"))
    view = ClusterView()
    leaning = Leaning(view, own, MARKS, clock=lambda: 10.0)
    assert leaning.role() is Role.UNIFIED
    # Members that compute something else have queues of their own.
    view.apply(0, Changes((Report(foreign, LONG_QUEUE), Report(own, QUIET), Report(other, QUIET))))
    assert leaning.role() is Role.UNIFIED
    busy = replace(LONG_QUEUE, sequence=1)
    view.apply(0, Changes((Report(own, busy), Report(other, busy))))
    assert leaning.role() is Role.PREFILL
    assert leaning.turns == 1
    decode = replace(own, role=Role.DECODE)
    assert Leaning(view, decode, MARKS).role() is Role.DECODE


def test_policies_have_names() -> None:
    assert {type(policy_named(name)) for name in POLICIES} == {LocalityFree, KvLocal, MostFree}
    assert type(policy_named(DEFAULT_POLICY, start=3)) is LocalityFree
    assert POLICIES.keys() > WANT_KEYS
    with pytest.raises(ConfigError, match="expected one of"):
        policy_named("random")
