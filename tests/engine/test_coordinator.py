"""What rank 0 makes of the ranks' answers about a plan: they are given here by hand."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from moeserve.core import Counters
from moeserve.engine.replan.coordinator import PlanChange, PlanCoordinator, PlanDeadlines
from moeserve.engine.replan.messages import PlanOrder, PlanReport
from moeserve.errors import LateRankError, PlacementError, UnavailableError
from moeserve.placement.plan import Plan

WORLD, WAIT_S = 3, 20.0
LAYERS = (1, 4)


def plan(*rows: list[int]) -> Plan:
    return Plan(np.array(rows, np.int32), 6, WORLD, 1, LAYERS)


OLD = plan([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
NEW = plan([1, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
THIRD = plan([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])


@dataclass
class Ranks:
    """A ``PlanPeers`` and rank 0's own part; ``said`` are the calls, in order."""

    world: int = WORLD
    said: queue.Queue[tuple[str, int]] = field(default_factory=queue.Queue)
    orders: dict[int, PlanOrder] = field(default_factory=dict)
    preparing: dict[tuple[int, int], Future[PlanReport]] = field(default_factory=dict)
    settling: dict[int, Future[PlanReport]] = field(default_factory=dict)
    pausing: dict[tuple[int, int], Future[PlanReport]] = field(default_factory=dict)
    counting: dict[int, Future[Mapping[str, Any]]] = field(default_factory=dict)

    def prepare(self, rank: int, order: PlanOrder) -> Future[PlanReport]:
        future = self.preparing[rank, order.turn] = Future()
        self.orders[order.turn] = order
        if rank == WORLD - 1:
            self.said.put(("prepare", order.turn))
        return future

    def abandon(self, turn: int) -> None:
        self.said.put(("abandon", turn))

    def switched(self, rank: int, turn: int) -> Future[PlanReport]:
        future = self.pausing[rank, turn] = Future()
        if rank == WORLD - 1:
            self.said.put(("switched", turn))
        return future

    def counts(self, rank: int) -> Future[Mapping[str, Any]]:
        return self.counting.setdefault(rank, Future())

    def expect(self, what: str, turn: int) -> None:
        assert self.said.get(timeout=WAIT_S) == (what, turn)

    def prepared(self, turn: int) -> None:
        for rank in range(WORLD):
            done = PlanReport(turn, prepare_s=1.0 + rank, bytes_read=10)
            self.preparing[rank, turn].set_result(done)

    def settle(self, turn: int, error: str = "") -> None:
        """What a step decides."""
        until(lambda: turn in self.settling)
        self.settling[turn].set_result(PlanReport(turn, error))

    def paused(self, turn: int) -> None:
        for rank in range(WORLD):
            self.pausing[rank, turn].set_result(PlanReport(turn, pause_s=0.25 * (rank + turn)))


@dataclass
class OwnRank:
    ranks: Ranks
    abandoned: list[int] = field(default_factory=list)

    def abandon(self, turn: int) -> None:
        self.abandoned.append(turn)

    def switched(self, turn: int) -> Future[PlanReport]:
        return self.ranks.settling.setdefault(turn, Future())


def until(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.001)


@dataclass
class Led:
    ranks: Ranks
    own: OwnRank
    coordinator: PlanCoordinator
    counters: Counters

    def ended(self) -> PlanChange:
        until(lambda: not self.coordinator.changing)
        return self.coordinator.changes[-1]


@contextmanager
def led(**deadlines: float) -> Iterator[Led]:
    ranks, counters = Ranks(), Counters()
    own = OwnRank(ranks)
    coordinator = PlanCoordinator(OLD, ranks, own, counters, PlanDeadlines(**deadlines))
    coordinator.start()
    try:
        yield Led(ranks, own, coordinator, counters)
    finally:
        coordinator.close()


def test_layer_by_layer_a_plan_comes_into_use() -> None:
    with led() as it:
        it.coordinator.propose(NEW)
        for turn, row in ((1, NEW.expert_LS[0]), (2, NEW.expert_LS[1])):
            it.ranks.expect("prepare", turn)
            assert it.ranks.orders[turn] == PlanOrder(turn, LAYERS[turn - 1], tuple(row.tolist()))
            assert not it.coordinator.pending
            it.ranks.prepared(turn)
            until(lambda: it.coordinator.pending)
            it.ranks.settle(turn)
            it.ranks.expect("switched", turn)
            assert not it.coordinator.pending
            it.ranks.paused(turn)
        assert it.ended() == PlanChange(
            2, switched=2, bytes_read=60, prepare_s=6.0, pause_s=1.0, paused_s=0.75 + 1.0
        )
        assert it.coordinator.plan.expert_LS.tolist() == NEW.expert_LS.tolist()
        assert it.counters.plan_changes == 1
        assert it.counters.plan_layers_switched == 2
        assert it.counters.plan_bytes_read == 60
        assert it.counters.plan_paused_s == 1.75
        assert it.own.abandoned == []


def test_the_same_plan_asks_nobody() -> None:
    with led() as it:
        it.coordinator.propose(OLD)
        until(lambda: bool(it.coordinator.changes))
        assert it.ended() == PlanChange(0)
        assert it.ranks.said.empty()


@pytest.mark.parametrize("raised", [True, False])
def test_a_rank_that_cannot_prepare_ends_the_change_and_what_was_switched_stays(
    raised: bool,
) -> None:
    with led() as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.ranks.prepared(1)
        it.ranks.settle(1)
        it.ranks.expect("switched", 1)
        it.ranks.paused(1)
        it.ranks.expect("prepare", 2)
        broken = it.ranks.preparing[1, 2]
        if raised:
            broken.set_exception(LateRankError("rank 1 is gone", [1]))
        else:
            broken.set_result(PlanReport(2, error="no such file"))
        it.ranks.expect("abandon", 2)
        assert it.own.abandoned == [2]
        it.ranks.settle(2, error="abandoned")
        change = it.ended()
        why = "rank 1 is gone" if raised else "no such file"
        assert (change.switched, change.error) == (1, f"rank 1, layer 4: {why}")
        assert it.coordinator.plan.expert_LS.tolist() == [[1, 0, 2, 3, 4, 5], [*range(6)]]


def test_another_plan_replaces_the_one_under_way_and_the_last_wins() -> None:
    with led() as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.coordinator.propose(OLD)
        it.coordinator.propose(THIRD)
        it.ranks.expect("abandon", 1)
        it.ranks.settle(1, error="abandoned")
        it.ranks.expect("prepare", 2)
        assert it.ranks.orders[2] == PlanOrder(2, 4, (5, 4, 3, 2, 1, 0))
        it.ranks.prepared(2)
        it.ranks.settle(2)
        it.ranks.expect("switched", 2)
        it.ranks.paused(2)
        assert it.ended() == PlanChange(1, 1, 30, 3.0, 1.0, 1.0)
        first = it.coordinator.changes[0]
        assert (first.layers, first.switched, first.error) == (2, 0, "another plan came")
        assert it.coordinator.plan.expert_LS.tolist() == THIRD.expert_LS.tolist()


def test_what_was_promised_before_it_was_abandoned_may_still_be_switched() -> None:
    with led() as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.ranks.prepared(1)
        until(lambda: it.coordinator.pending)
        it.coordinator.propose(OLD)
        it.ranks.expect("abandon", 1)
        it.ranks.settle(1)  # the records of a step were made before
        it.ranks.expect("switched", 1)
        it.ranks.paused(1)
        it.ranks.expect("prepare", 2)  # back
        assert it.ranks.orders[2] == PlanOrder(2, 1, (0, 1, 2, 3, 4, 5))
        first = it.coordinator.changes[0]
        assert (first.switched, first.error) == (1, "another plan came")
        it.ranks.preparing[0, 2].set_result(PlanReport(2, error="enough"))
        it.ranks.settle(2, error="abandoned")


def test_ranks_that_do_not_answer_are_named() -> None:
    with led(prepare_s=0.05) as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.ranks.preparing[1, 1].set_result(PlanReport(1))
        it.ranks.expect("abandon", 1)
        it.ranks.settle(1, error="abandoned")
        assert it.ended().error == "ranks [0, 2] did not prepare layer 1 within 0.05 s"


def test_a_switch_is_a_switch_though_a_rank_does_not_say_how_long_it_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with led(answer_s=0.05) as it:
        it.coordinator.propose(THIRD)
        it.ranks.expect("prepare", 1)
        it.ranks.prepared(1)
        it.ranks.settle(1)
        it.ranks.expect("switched", 1)
        it.ranks.pausing[1, 1].set_result(PlanReport(1, pause_s=0.5))
        assert it.ended() == PlanChange(1, 1, 30, 3.0, 0.5, 0.5)
        assert "ranks [0, 2] did not switch layer 4 within 0.05 s" in caplog.text


def test_where_no_step_decides_plans_are_not_changed_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with led(settle_s=0.05) as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.ranks.prepared(1)
        it.ranks.expect("abandon", 1)
        assert it.ended().error == "ranks [0] did not switch layer 1 within 0.05 s"
        it.coordinator.propose(THIRD)
        assert "is refused: no step has decided about layer 1" in caplog.text
        with pytest.raises(UnavailableError, match="no step has decided about layer 1"):
            it.coordinator.ask(WAIT_S)
        assert it.ranks.said.empty()
        assert not it.coordinator.changing


def test_the_end_of_the_run_ends_a_change() -> None:
    with led() as it:
        it.coordinator.propose(NEW)
        it.ranks.expect("prepare", 1)
        it.coordinator.close()
        it.ranks.expect("abandon", 1)
        assert it.ended().error == "the run ends"


def test_a_bug_in_a_change_leaves_the_plan_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with led() as it, caplog.at_level(logging.CRITICAL, "moeserve.plan"):
        del it.ranks.preparing  # whatever it is
        it.coordinator.propose(NEW)
        until(lambda: "plans cannot be changed any more" in caplog.text)
        with pytest.raises(UnavailableError, match="an earlier change failed"):
            it.coordinator.ask(WAIT_S)


def test_counts_come_from_all_ranks() -> None:
    with led() as it:
        for rank in range(WORLD):
            it.ranks.counts(rank).set_result({"tokens": rank})
        assert it.coordinator.ask(WAIT_S) == {rank: {"tokens": rank} for rank in range(WORLD)}
        assert it.coordinator.counts[2] == {"tokens": 2}


def test_ranks_that_give_no_counts_are_named() -> None:
    with led() as it:
        it.ranks.counts(1).set_result({"tokens": 1})
        with pytest.raises(LateRankError, match=r"ranks \[0, 2\] gave no .* in 0.05 s") as late:
            it.coordinator.ask(0.05)
        assert late.value.ranks == (0, 2)
        it.ranks.counts(2).set_exception(PlacementError("it does not count"))
        with pytest.raises(LateRankError, match=r"rank 2 gave no .*: it does not count") as broken:
            it.coordinator.ask(WAIT_S)
        assert broken.value.ranks == (2,)


def test_a_question_that_is_withdrawn_is_an_answer() -> None:
    with led() as it:
        it.ranks.counts(0).cancel()
        with pytest.raises(LateRankError, match=r"rank 0 gave no .*: the question was withdrawn"):
            it.coordinator.ask(WAIT_S)
