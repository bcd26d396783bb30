"""Experts change ranks while tokens are made: the same tokens, nothing left behind, counted reads.

Ranks are threads with tiny real decoders and schedulers of their own; segments go through queues,
records of steps through ``Records``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from moeserve.comm.build import parallel_over
from moeserve.comm.dispatcher import FlatDispatcher
from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import layouts, own_experts
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.replan.coordinator import PlanCoordinator, PlanDeadlines
from moeserve.engine.replan.messages import PlanOrder, PlanReport
from moeserve.engine.replan.peers import LocalPlanPeers
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.engine.replan.switch import agreed_turn
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import CheckpointError, PlacementError
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import load_decoder
from moeserve.models.expert_source import ExpertSource, open_experts
from moeserve.observe.progress import Progress
from moeserve.placement.plan import Plan

WORLD, BLOCK, WAIT_S = 2, 8, 60.0
LAYERS, EXPERTS = (0, 2, 3), 8
OLD = Plan(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 3, np.int32), EXPERTS, WORLD, 1, LAYERS)
NEW_ROWS = [
    [7, 6, 5, 4, 3, 2, 1, 0, 3, 3],
    [0, 1, 2, 3, 4, 5, 6, 7, 0, 1],
    [0, 1, 2, 3, 4, 1, 0, 7, 6, 5],
]
NEW = Plan(np.array(NEW_ROWS, np.int32), EXPERTS, WORLD, 1, LAYERS)
# The exchange of (name, rank, world) in one group of threads.
Post = Callable[[str, int, int], Exchange]


@dataclass
class Member:
    runner: ModelRunner[object]
    parallel: ParallelLayerRunner
    swapper: ExpertSwapper


def member(path: Path, ops: Ops, rank: int, exchange: Exchange, hold: Hold) -> Member:
    where = layouts(OLD, LAYERS, EXPERTS, WORLD)
    decoder = load_decoder(path, ops=ops, experts=own_experts(where, rank))
    moves = FlatDispatcher(ops, exchange, Topology((0,) * WORLD), Progress())
    parallel = parallel_over(ops, decoder.stack.layers, where, moves, Progress())
    routers = {
        layer: mlp[0]
        for layer in LAYERS
        if isinstance(mlp := decoder.stack.layers[layer].mlp, tuple)
    }

    def opened() -> ExpertSource:
        hold.before_reading(rank)
        return open_experts(path, ops=ops)

    swapper = ExpertSwapper(rank, ops, parallel, routers, opened)
    return Member(ModelRunner(decoder.over(parallel), 64, BLOCK), parallel, swapper)


@dataclass
class Hold:
    """When ranks may read, and whether one fails to."""

    go: threading.Event = field(default_factory=threading.Event)
    fails: int | None = None

    def before_reading(self, rank: int) -> None:
        assert self.go.wait(WAIT_S)
        if rank == self.fails:
            raise CheckpointError("the folder is gone")


class Records:
    """The records of all ranks for one step after the other."""

    def __init__(self) -> None:
        self._all_here = threading.Barrier(WORLD)
        self._said: list[tuple[int, bool]] = [(0, False)] * WORLD

    def gather(self, rank: int, turn: int, works: bool) -> tuple[int, bool]:
        """The turn that all agree on, and whether any rank has work."""
        self._said[rank] = turn, works
        self._all_here.wait(WAIT_S)
        turns = [turn for turn, _ in self._said]
        found = agreed_turn(min(turns), max(turns)), any(works for _, works in self._said)
        self._all_here.wait(WAIT_S)  # nobody says more before all have read
        return found


class OverJson(LocalPlanPeers):
    """As over a wire: nothing gets through that JSON does not hold."""

    def prepare(self, rank: int, order: PlanOrder) -> Future[PlanReport]:
        return super().prepare(rank, PlanOrder.of_json(through_json(order.as_json())))


def through_json(found: Any) -> Any:
    return json.loads(json.dumps(found))


@dataclass
class Group:
    coordinator: PlanCoordinator
    members: list[Member]
    hold: Hold
    counters: Counters

    def serve(
        self, names: Sequence[str], each_step: Callable[[int], None] = lambda step: None
    ) -> dict[str, list[int]]:
        """Tokens of one request per name, whose letters are its prompt; homes are taken in turn.
        ``each_step`` is called by rank 0."""
        homes = [scheduler() for _ in range(WORLD)]
        for i, name in enumerate(names):
            homes[i % WORLD].add(request(name))
        return self.run(homes, lambda: False, each_step)

    def until(self, done: Callable[[], bool]) -> None:
        """Empty steps, as idle ranks make them."""
        ends = time.monotonic() + WAIT_S

        def wait(step: int) -> None:
            assert time.monotonic() < ends
            time.sleep(0.002)

        self.run([scheduler() for _ in range(WORLD)], lambda: not done(), wait)

    def run(
        self,
        homes: Sequence[Scheduler],
        wanted: Callable[[], bool],
        each_step: Callable[[int], None],
    ) -> dict[str, list[int]]:
        """Steps of all ranks for as long as any has work or rank 0 wants one."""
        records, tokens = Records(), dict[str, list[int]]()

        def steps(rank: int) -> None:
            member, home, step = self.members[rank], homes[rank], 0
            while True:
                if rank == 0:
                    each_step(step)
                works = home.has_work or (rank == 0 and wanted())
                agreed, go_on = records.gather(rank, member.swapper.promise(), works)
                member.swapper.settle(agreed)
                if not go_on:
                    return
                for out in home.apply(member.runner.run(home.plan(0.0))):
                    tokens.setdefault(out.request_id, []).append(out.token_id)
                step += 1

        with ThreadPoolExecutor(WORLD) as threads:
            for one in [threads.submit(steps, rank) for rank in range(WORLD)]:
                one.result(WAIT_S)
        return tokens


def scheduler() -> Scheduler:
    config = SchedulerConfig(128, max_num_seqs=8, max_num_batched_tokens=16)
    return Scheduler(config, BlockPool(64, BLOCK, Counters()), Counters())


def request(name: str) -> Request:
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    return Request(RequestId(name), tuple(name.encode()), params)


def alone(path: Path, ops: Ops, names: Sequence[str]) -> dict[str, list[int]]:
    """What one process answers."""
    runner, home = ModelRunner(load_decoder(path, ops=ops), 64, BLOCK), scheduler()
    tokens = dict[str, list[int]]()
    for name in names:
        home.add(request(name))
    while home.has_work:
        for out in home.apply(runner.run(home.plan(0.0))):
            tokens.setdefault(out.request_id, []).append(out.token_id)
    return tokens


@contextlib.contextmanager
def group(
    path: Path, ops: Ops, post: Post, deadlines: PlanDeadlines | None = None
) -> Iterator[Group]:
    hold, counters = Hold(), Counters()
    ranks = [member(path, ops, r, post("all", r, WORLD), hold) for r in range(WORLD)]
    swappers = [rank.swapper for rank in ranks]
    coordinator = PlanCoordinator(OLD, OverJson(swappers), swappers[0], counters, deadlines)
    coordinator.start()
    try:
        yield Group(coordinator, ranks, hold, counters)
    finally:
        hold.go.set()
        coordinator.close()
        for swapper in swappers:
            swapper.close()
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"plans", "experts"}


@pytest.fixture
def path(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen2_moe")


NAMES = ["first prompt", "another", "x"]


def memory_of(group: Group) -> list[weakref.ref[Tensor]]:
    """Of the packed experts that the new plan replaces."""
    found = []
    for rank in group.members:
        for layer in (0, 3):
            sharded = rank.parallel.sharded[layer]
            assert sharded is not None
            found.append(weakref.ref(sharded.part.weights.experts.data.gate_up.memory[0]))
    return found


def test_answers_are_those_of_one_process_before_during_and_after(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    with group(path, ops, new_post()) as ranks:
        before = ranks.serve(NAMES)
        if ops.name == "cpu":
            old = memory_of(ranks)
        seen: list[int] = []

        def each_step(step: int) -> None:
            if step == 2:
                ranks.coordinator.propose(NEW)
            if step == 6:
                ranks.hold.go.set()
            rows = ranks.coordinator.plan.expert_LS
            seen.append(int((rows == NEW.expert_LS).all(axis=1).sum()))

        during = ranks.serve(NAMES, each_step)
        ranks.until(lambda: not ranks.coordinator.changing)
        after = ranks.serve(NAMES)

        assert before == during == after == alone(path, ops, NAMES)
        assert seen[:7] == [1] * 7  # only layer 2, which does not change
        assert ranks.coordinator.plan.expert_LS.tolist() == NEW_ROWS
        assert held_by(ranks) == [
            own_experts(layouts(NEW, LAYERS, EXPERTS, WORLD), rank) for rank in range(WORLD)
        ]
        if ops.name == "cpu":
            ranks.until(lambda: gc.collect() >= 0 and old[0]() is old[2]() is old[3]() is None)
            assert [ref() is None for ref in old] == [True, False, True, True]
        (change,) = ranks.coordinator.changes
        assert (change.layers, change.switched, change.error) == (2, 2, "")
        # Layer 0 on both ranks; of layer 3 rank 0's experts stay as they were.
        expert = 3 * 32 * 64 * 4
        assert change.bytes_read == (5 + 4 + 5) * expert
        assert 0 < change.pause_s <= change.paused_s
        counters = ranks.counters
        assert (counters.plan_changes, counters.plan_layers_switched) == (1, 2)
        assert counters.plan_bytes_read == change.bytes_read
        assert counters.plan_paused_s == change.paused_s


def held_by(group: Group) -> list[dict[int, tuple[int, ...]]]:
    """By rank, the experts of its slots in every layer."""
    found = []
    for rank, member in enumerate(group.members):
        parts = [(layer, member.parallel.sharded[layer]) for layer in LAYERS]
        found.append({layer: part.layout.of_rank(rank) for layer, part in parts if part})
    return found


def test_a_rank_that_cannot_read_keeps_the_old_plan_and_serves_on(
    path: Path, ops: Ops, new_post: Callable[[], Post], caplog: pytest.LogCaptureFixture
) -> None:
    with group(path, ops, new_post()) as ranks:
        before = ranks.serve(NAMES)
        ranks.hold.fails = 1
        ranks.hold.go.set()
        with caplog.at_level(logging.CRITICAL, "moeserve.plan"):
            ranks.coordinator.propose(NEW)
            during = ranks.serve(NAMES)
            ranks.until(lambda: not ranks.coordinator.changing)
        assert before == during == ranks.serve(NAMES)
        assert not ranks.coordinator.pending
        assert ranks.coordinator.plan.expert_LS.tolist() == OLD.expert_LS.tolist()
        (change,) = ranks.coordinator.changes
        assert change.error == "rank 1, layer 0: the folder is gone"

        ranks.hold.fails = None
        ranks.coordinator.propose(NEW)
        ranks.until(lambda: ranks.coordinator.changes[-1].switched == 2)
        assert ranks.serve(NAMES) == before


def test_a_rank_that_does_not_answer_in_time_is_named(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    with group(path, ops, new_post(), PlanDeadlines(prepare_s=0.2)) as ranks:
        ranks.coordinator.propose(NEW)  # and nobody may read
        ranks.until(lambda: not ranks.coordinator.changing)
        (change,) = ranks.coordinator.changes
        assert change.error == "ranks [0, 1] did not prepare layer 0 within 0.2 s"
        assert held_by(ranks) == [
            own_experts(layouts(OLD, LAYERS, EXPERTS, WORLD), rank) for rank in range(WORLD)
        ]


def test_a_plan_that_comes_meanwhile_replaces_the_one_under_way(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    other = Plan(np.array(NEW_ROWS[::-1], np.int32), EXPERTS, WORLD, 1, LAYERS)
    with group(path, ops, new_post()) as ranks:
        before = ranks.serve(NAMES)

        def each_step(step: int) -> None:
            if step in (1, 3):
                ranks.coordinator.propose(NEW if step == 1 else other)
            if step == 5:
                ranks.hold.go.set()

        assert ranks.serve(NAMES, each_step) == before
        ranks.until(lambda: not ranks.coordinator.changing)
        first, second = ranks.coordinator.changes
        assert (first.switched, first.error) == (0, "another plan came")
        assert (second.switched, second.error) == (2, "")
        assert ranks.coordinator.plan.expert_LS.tolist() == NEW_ROWS[::-1]
        assert ranks.serve(NAMES) == before


def test_plans_that_come_all_the_time_change_no_answer(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    """Two steps apart, so that changes are abandoned at every stage."""
    random = np.random.default_rng(5)
    plans = [
        Plan(random.permuted(OLD.expert_LS, axis=1), EXPERTS, WORLD, 1, LAYERS) for _ in range(40)
    ]
    with group(path, ops, new_post()) as ranks:
        ranks.hold.go.set()
        expected, left = ranks.serve(NAMES), list(plans)

        def each_step(step: int) -> None:
            if step % 2 and left:
                ranks.coordinator.propose(left.pop(0))

        while left:
            assert ranks.serve(NAMES, each_step) == expected
        ranks.until(lambda: not ranks.coordinator.changing)
        assert ranks.coordinator.plan.expert_LS.tolist() == plans[-1].expert_LS.tolist()
        assert held_by(ranks) == [
            own_experts(layouts(plans[-1], LAYERS, EXPERTS, WORLD), rank) for rank in range(WORLD)
        ]
        assert ranks.serve(NAMES) == expected
        changes = ranks.coordinator.changes
        assert changes[-1].error == ""
        assert {change.error for change in changes} <= {"", "another plan came"}
        assert ranks.counters.plan_layers_switched == sum(change.switched for change in changes)


def test_a_rank_keeps_what_its_record_names_until_the_records_are_there(
    path: Path, ops: Ops, new_post: Callable[[], Post]
) -> None:
    with group(path, ops, new_post()) as ranks:
        ranks.hold.go.set()
        swapper, held = ranks.members[1].swapper, ranks.members[1].parallel.sharded
        first, second = (PlanOrder(turn, 0, tuple(NEW_ROWS[2 * turn - 2])) for turn in (1, 2))
        assert swapper.prepare(first).result(WAIT_S).error == ""
        assert swapper.promise() == 1
        swapper.abandon(1)
        switched, prepared = swapper.switched(1), swapper.prepare(second)
        withdrawn = swapper.switched(1)
        assert withdrawn.cancel()
        time.sleep(0.01)
        assert swapper.prepared == 1
        assert not switched.done()
        assert not prepared.done()  # there is no room yet
        swapper.settle(1)
        done = switched.result(WAIT_S)
        assert done.pause_s is not None
        assert swapper.switched(1).result(WAIT_S) == done
        assert prepared.result(WAIT_S).error == ""
        assert held[0] is not None
        assert held[0].layout.expert_S.tolist() == NEW_ROWS[0]

        assert swapper.promise() == 2
        swapper.abandon(2)
        dropped = swapper.switched(2)
        swapper.settle(0)
        assert dropped.result(WAIT_S) == PlanReport(2, "turn 2 is abandoned")
        assert swapper.prepared == swapper.promise() == 0
        swapper.settle(0)
        assert held[0].layout.expert_S.tolist() == NEW_ROWS[0]


def test_an_order_that_no_layer_can_follow_is_an_error_of_that_rank(
    path: Path, ops: Ops, new_post: Callable[[], Post], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL, "moeserve.plan"), group(path, ops, new_post()) as ranks:
        ranks.hold.go.set()
        swapper = ranks.members[1].swapper
        said = [
            swapper.prepare(PlanOrder(turn, layer, row)).result(WAIT_S).error
            for turn, (layer, row) in enumerate(
                [(1, (0,) * 10), (99, (0,) * 10), (0, (0,) * 10), (0, tuple(range(8)))], start=1
            )
        ]
        assert "layer 1 has no experts" in said[0]
        assert "layer 99 has no experts" in said[1]
        assert "experts [1, 2, 3, 4, 5, 6, 7] are in one plan only" in said[2]
        assert "--slots 10" in said[3]
        assert swapper.prepared == 0
        assert swapper.prepare(PlanOrder(2, 0, (0,))).result(WAIT_S).error == "turn 2 is abandoned"
        assert swapper.switched(4).result(WAIT_S).error == "turn 4 is abandoned"
        with pytest.raises(PlacementError, match="--replan auto"):
            swapper.counts()
        swapper.close()
        assert swapper.prepare(PlanOrder(9, 0, (0,))).result(WAIT_S).error == "the rank ends"


def test_a_plan_of_other_slots_is_refused_in_the_log(
    path: Path, ops: Ops, new_post: Callable[[], Post], caplog: pytest.LogCaptureFixture
) -> None:
    wider = Plan(np.array([[*range(8), *range(4)]] * 3, np.int32), EXPERTS, WORLD, 1, LAYERS)
    with group(path, ops, new_post()) as ranks:
        ranks.coordinator.propose(wider)
        ranks.until(lambda: not ranks.coordinator.changing)
        assert "start again" in caplog.text
        assert ranks.coordinator.changes == []
