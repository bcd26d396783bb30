"""A change of plan goes layer by layer, on all ranks before the same step, or not at all."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.engine.replan.switch import PlanOrder, PlanReport, PlanSwitch
from moeserve.errors import PlacementError

OLD = {1: (0, 1, 2, 3), 3: (3, 2, 1, 0), 4: (0, 1, 2, 3)}
NEW = {1: (1, 0, 2, 3), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}


class Rank:
    """Does what it is told; holds at most one layer beside those in use."""

    def __init__(self, rows: dict[int, tuple[int, ...]]) -> None:
        self.rows = dict(rows)
        self.task: PlanOrder | None = None
        self.prepared: PlanOrder | None = None
        self.said: deque[PlanReport] = deque()

    def apply(self, order: PlanOrder) -> None:
        if order.abandon:
            self.task = self.prepared = None
        if order.switch is not None:
            assert self.prepared is not None
            assert self.prepared.prepare == order.switch
            self.rows[order.switch] = self.prepared.expert_S
            self.said.append(PlanReport(self.prepared.turn, pause_s=0.5))
            self.prepared = None
        if order.prepare is not None:
            assert self.task is None
            assert self.prepared is None
            self.task = order

    def work(self, error: str = "") -> None:
        if self.task is not None:
            self.said.append(PlanReport(self.task.turn, error, prepare_s=1.0, bytes_read=10))
            self.prepared, self.task = None if error else self.task, None


def step(switch: PlanSwitch, ranks: list[Rank]) -> PlanOrder | None:
    order = switch.order()
    for number, rank in enumerate(ranks):
        if order is not None:
            rank.apply(order)
        while rank.said:
            switch.report(number, rank.said.popleft())
    return order


def test_each_layer_that_differs_is_prepared_then_switched() -> None:
    switch, ranks = PlanSwitch(OLD, 2), [Rank(OLD), Rank(OLD)]
    assert step(switch, ranks) is None

    assert switch.propose(NEW) == 2
    first = step(switch, ranks)
    assert first is not None
    assert (first.prepare, first.expert_S, first.switch) == (1, NEW[1], None)
    ranks[0].work()
    assert step(switch, ranks) is None
    assert switch.waiting_for == {1}
    assert switch.rows == OLD
    ranks[1].work()
    step(switch, ranks)
    second = step(switch, ranks)
    assert second is not None
    assert (second.switch, second.prepare) == (1, 4)
    assert switch.rows == {**OLD, 1: NEW[1]}
    for rank in ranks:
        rank.work()
    step(switch, ranks)
    third = step(switch, ranks)
    assert third is not None
    assert (third.switch, third.prepare) == (4, None)

    change = switch.change
    assert change is not None
    assert switch.rows == ranks[0].rows == ranks[1].rows == NEW
    assert (change.finished, change.error, change.switched) == (True, "", 2)
    assert (change.bytes_read, change.prepare_s) == (40, 2.0)
    assert (change.pause_s, change.paused_s) == (0.5, 1.0)


def test_the_same_plan_changes_nothing() -> None:
    switch = PlanSwitch(OLD, 2)
    assert switch.propose(dict(OLD)) == 0
    assert switch.order() is None
    assert switch.change is not None
    assert switch.change.finished


def test_a_rank_that_cannot_prepare_ends_the_change_and_keeps_what_was_switched() -> None:
    switch, ranks = PlanSwitch(OLD, 2), [Rank(OLD), Rank(OLD)]
    switch.propose(NEW)
    step(switch, ranks)
    for rank in ranks:
        rank.work()
    step(switch, ranks)
    step(switch, ranks)
    ranks[0].work()
    ranks[1].work("no such file")
    step(switch, ranks)
    order = step(switch, ranks)

    assert order is not None
    assert (order.abandon, order.prepare, order.switch) == (True, None, None)
    assert switch.rows == ranks[0].rows == ranks[1].rows == {**OLD, 1: NEW[1]}
    assert ranks[0].prepared is None
    assert switch.change is not None
    assert switch.change.error == "rank 1, layer 4: no such file"
    assert step(switch, ranks) is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({1: (0, 1, 2, 3)}, r"layers \[1\], the model's are \[1, 3, 4\]"),
        ({**NEW, 1: (0, 1, 2, 3, 0, 1)}, "--slots 4"),
        ({**NEW, 4: (0, 1, 2, 2)}, r"experts \[3\] are in one plan only"),
    ],
)
def test_a_plan_that_ranks_cannot_change_to_is_refused_and_nothing_moves(
    rows: dict[int, tuple[int, ...]], said: str
) -> None:
    switch = PlanSwitch(OLD, 2)
    with pytest.raises(PlacementError, match=said):
        switch.propose(rows)
    assert switch.order() is None


@settings(deadline=None)
@given(st.data())
def test_whatever_happens_ranks_agree_and_the_last_plan_wins(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3))
    switch, ranks = PlanSwitch(OLD, world), [Rank(OLD) for _ in range(world)]
    plans = st.fixed_dictionaries({l: st.permutations(range(4)).map(tuple) for l in OLD})
    last = dict(OLD)
    for _ in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["step", "step", "work", "work", "fail", "propose"]))
        if what == "step":
            step(switch, ranks)
            assert all(rank.rows == switch.rows for rank in ranks)
        elif what == "propose":
            last = data.draw(plans)
            switch.propose(last)
        else:
            rank = data.draw(st.sampled_from(ranks))
            rank.work("broken" if what == "fail" else "")
    switch.propose(last)
    for _ in range(20):
        for rank in ranks:
            rank.work()
        step(switch, ranks)
    assert switch.rows == last
    assert all(rank.rows == last for rank in ranks)
    assert switch.change is not None
    assert switch.change.finished
    assert not switch.change.error
    assert not switch.ready
