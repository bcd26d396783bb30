"""A step over several ranks: the same tokens as in one process, and one end for every failure.

Ranks are threads with null executors, joined by socket pairs; ``test_ranks`` uses real decoders.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import (
    BlockId,
    CacheScope,
    Chunk,
    Counters,
    Event,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.loop import Engine
from moeserve.engine.null import NullExecutor
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.follower import follow
from moeserve.engine.ranks.leader import DistributedExecutor
from moeserve.engine.ranks.messages import StepDecoder, StepEncoder
from moeserve.engine.ranks.microbatches import FixedMicrobatches
from moeserve.engine.scheduler import Drafter, Scheduler, SchedulerConfig
from moeserve.errors import InternalError, LateRankError, UnavailableError

Wires = Callable[[int], Any]
BLOCK, VOCAB, WAIT_S = 4, 50, 20.0
CONFIG = SchedulerConfig(64, max_num_seqs=3, max_num_batched_tokens=10)


class Ranked:
    """A null executor as a rank's; ``before`` may spoil a step."""

    def __init__(
        self, blocks: int, before: Callable[[StepPlan], StepResult | None] = lambda plan: None
    ) -> None:
        self.inner = NullExecutor(blocks, BLOCK, VOCAB)
        self.before = before
        self.microbatches: list[int] = []
        self.steps: list[int] = []

    def run(self, plan: StepPlan, microbatches: int) -> StepResult:
        self.microbatches.append(microbatches)
        self.steps.append(plan.num_tokens)
        return self.before(plan) or self.inner.run(plan)


@dataclass
class Band:
    """A running group."""

    wire: Any
    executor: DistributedExecutor
    ranks: list[Ranked]
    stats: list[DispatchStats]
    errors: dict[int, BaseException]


@contextlib.contextmanager
def band(
    wire: Any,
    blocks: int = 64,
    before: Mapping[int, Callable[[StepPlan], StepResult | None]] | None = None,
    microbatches: int = 1,
) -> Iterator[Band]:
    world, errors = wire.world, dict[int, BaseException]()
    ranks = [Ranked(blocks, (before or {}).get(r, lambda plan: None)) for r in range(world)]
    stats = [DispatchStats(world) for _ in range(world)]

    def work(rank: int) -> None:
        try:
            follow(wire.follower(rank), ranks[rank], rank, stats[rank])
        except Exception as error:  # noqa: BLE001 - looked at by the test
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(r,)) for r in range(1, world)]
    for thread in threads:
        thread.start()
    executor = DistributedExecutor(
        ranks[0], wire.leader(), world, stats=stats[0], microbatches=FixedMicrobatches(microbatches)
    )
    try:
        yield Band(wire, executor, ranks, stats, errors)
    finally:
        for mailbox in wire.down.values():
            mailbox.put(None)
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)


def fleet_of(
    world: int, blocks: int, config: SchedulerConfig = CONFIG, drafter: Drafter | None = None
) -> tuple[Fleet, list[BlockPool]]:
    counters = Counters()
    pools = [BlockPool(blocks, BLOCK, counters) for _ in range(world)]
    return Fleet(config, pools, counters, drafter=drafter), pools


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling)


def alone(r: Request) -> list[int]:
    counters = Counters()
    scheduler = Scheduler(SchedulerConfig(64), BlockPool(64, BLOCK, counters), counters)
    executor, tokens = NullExecutor(64, BLOCK, VOCAB), list[int]()
    scheduler.add(r)
    while scheduler.has_work:
        outs = scheduler.apply(executor.run(scheduler.plan(0.0)))
        tokens += [out.token_id for out in outs]
    return tokens


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Request, int | None]]:
    """Step of arrival, request, step of its abort."""
    found = []
    for i in range(draw(st.integers(1, 8))):
        beginning = [draw(st.integers(0, 1))] * draw(st.integers(0, 8))
        prompt = [*beginning, *draw(st.lists(st.integers(0, 49), min_size=1, max_size=10))]
        at = draw(st.integers(0, 8))
        abort = draw(st.none() | st.integers(at, at + 8))
        found.append((at, request(f"r{i}", prompt, draw(st.integers(1, 10)), seed=i), abort))
    return found


@settings(max_examples=40, deadline=None)
@given(
    workload=workloads(),
    world=st.integers(1, 4),
    blocks=st.integers(6, 12),
    drafts=st.sampled_from([0, 0, 1, 3]),
    errs=st.integers(0, 4),
)
def test_ranks_make_the_tokens_of_one_process(
    workload: list[tuple[int, Request, int | None]],
    world: int,
    blocks: int,
    drafts: int,
    errs: int,
    wires: Wires,
    guessers: Callable[..., Drafter],
) -> None:
    """With few blocks, so that requests are preempted and move; ranks run every step together."""
    config = replace(CONFIG, max_model_len=22)
    drafter = guessers(VOCAB, drafts, errs) if drafts else None
    fleet, pools = fleet_of(world, blocks, config, drafter)
    tokens: dict[RequestId, list[int]] = {r.id: [] for _, r, _ in workload}
    aborted = set()
    with band(wires(world), blocks) as group:
        for now in range(1000):
            for at, r, abort in workload:
                if at == now:
                    fleet.add(r)
                if abort == now and fleet.abort(r.id, FinishReason.ABORT):
                    aborted.add(r.id)
            if now > 20 and not fleet.has_work:
                break
            plan = fleet.plan(0.0)
            if plan.chunks:
                for out in fleet.apply(group.executor.run(plan)):
                    tokens[out.request_id].append(out.token_id)
    assert not group.errors
    assert len({len(rank.steps) for rank in group.ranks}) == 1
    for pool in pools:
        assert pool.num_free == blocks
    for _, r, _ in workload:
        expected = alone(r)[: 22 - len(r.prompt_ids)]
        got = tokens[r.id]
        assert got == (expected[: len(got)] if r.id in aborted else expected)


def test_a_request_travels_once_and_then_only_what_is_new(wires: Wires) -> None:
    fleet, _ = fleet_of(2, 64, SchedulerConfig(200, max_num_seqs=8, max_num_batched_tokens=128))
    with band(wires(2)) as group:
        for i in range(2):
            fleet.add(request(f"request-{i}", [VOCAB - 1] * 100, 50, ignore_eos=True))
        for _ in range(40):
            fleet.apply(group.executor.run(fleet.plan(0.0)))
    first, *others = group.wire.order_bytes
    assert first > 100
    assert max(others) <= 40
    assert group.ranks[1].steps == [100] + [1] * 39


def test_an_id_can_be_used_again_on_another_rank(wires: Wires) -> None:
    fleet, _ = fleet_of(2, 64)
    tokens: dict[str, list[int]] = {"x": [], "a": [], "b": []}
    with band(wires(2)) as group:
        for name, size in (("a", 8), ("b", 6)):
            fleet.add(request(name, range(size), ignore_eos=True))
        first = fleet.plan(0.0)
        assert [c.rank for c in first.chunks] == [0, 1]
        fleet.apply(group.executor.run(first))
        for name in "ab":
            fleet.abort(RequestId(name), FinishReason.ABORT)
        again = [request("x", [1] * 9), request("a", range(30, 38)), request("b", range(3))]
        for r in again:
            fleet.add(r)
        while fleet.has_work:
            for out in fleet.apply(group.executor.run(fleet.plan(0.0))):
                tokens[out.request_id].append(out.token_id)
    assert tokens == {r.id: alone(r) for r in again}


def test_ranks_without_requests_take_part(wires: Wires) -> None:
    fleet, _ = fleet_of(3, 16)
    with band(wires(3), 16, microbatches=2) as group:
        fleet.add(request("a", range(5), 4))
        while fleet.has_work:
            fleet.apply(group.executor.run(fleet.plan(0.0)))
    assert [rank.steps for rank in group.ranks] == [[5, 1, 1, 1], [0] * 4, [0] * 4]
    assert {m for rank in group.ranks for m in rank.microbatches} == {2}
    assert group.executor.chosen == {2: 4}


def test_what_ranks_counted_comes_with_their_reports(wires: Wires) -> None:
    fleet, _ = fleet_of(2, 16)
    with band(wires(2), 16) as group:
        stats = group.stats[1]
        stats.tokens, stats.waited_s, stats.copies_R[0], stats.inter_node = 7, 0.25, 5, 2
        stats.dispatch_bytes_R[0] = 1 << 40
        fleet.add(request("a", range(5), 1))
        fleet.apply(group.executor.run(fleet.plan(0.0)))
    assert group.executor.work[1] == stats


def test_a_part_that_fails_ends_its_requests_and_nobody_elses(wires: Wires) -> None:
    def spoil(plan: StepPlan) -> StepResult:
        return StepResult((), tuple((c.request.id, "spoiled") for c in plan.chunks))

    fleet, _ = fleet_of(2, 16)
    with band(wires(2), 16, {1: spoil}) as group:
        fleet.add(request("a", range(5), 2))
        fleet.add(request("b", range(6), 2))
        result = group.executor.run(fleet.plan(0.0))
    assert [s.request_id for s in result.sampled] == ["a"]
    assert result.failed == (("b", "spoiled"),)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_falls_out_of_step_ends_the_run_by_name(rank: int, wires: Wires) -> None:
    def spoil(plan: StepPlan) -> StepResult | None:
        if len(group.ranks[rank].steps) == 3:
            raise ZeroDivisionError("a layer broke")
        return None

    fleet, _ = fleet_of(3, 16)
    with band(wires(3), 16, {rank: spoil}) as group:
        fleet.add(request("a", range(5), 9, ignore_eos=True))
        for _ in range(2):
            fleet.apply(group.executor.run(fleet.plan(0.0)))
        with pytest.raises(UnavailableError, match=f"rank {rank}.*a layer broke"):
            group.executor.run(fleet.plan(0.0))
        with pytest.raises(UnavailableError, match="a layer broke"):
            group.executor.run(fleet.plan(0.0))
        with pytest.raises(UnavailableError, match="a layer broke"):
            group.executor.idle()
    assert set(group.errors) == {1, 2}


def test_an_engine_whose_ranks_are_lost_ends_every_stream_with_the_reason(wires: Wires) -> None:
    def spoil(plan: StepPlan) -> StepResult | None:
        if len(group.ranks[1].steps) == 3:
            raise ZeroDivisionError("a layer broke")
        return None

    ends: dict[str, Event] = {}
    ended = threading.Event()

    def sink(event: Event) -> None:
        if event.finish is not None:
            ends[event.request_id] = event
            if len(ends) == 5:
                ended.set()

    fleet, _ = fleet_of(2, 16)
    with band(wires(2), 16, {1: spoil}) as group, Engine(fleet, group.executor) as engine:
        for i in range(5):
            engine.submit(request(f"r{i}", range(5), 30, ignore_eos=True), sink)
        assert ended.wait(WAIT_S)
    assert {e.finish for e in ends.values()} == {FinishReason.UNAVAILABLE}
    assert all("rank 1" in e.error and "a layer broke" in e.error for e in ends.values())
    assert not engine.alive


def test_an_alarm_ends_an_engine_that_has_nothing_to_run(wires: Wires) -> None:
    fleet, _ = fleet_of(2, 16)
    with band(wires(2), 16) as group:
        engine = Engine(fleet, group.executor, idle=group.executor.idle)
        group.wire.trouble = LateRankError("rank 1 is gone", [1])
        with engine:
            engine._thread.join(WAIT_S)
            assert not engine.alive
            with pytest.raises(UnavailableError):
                engine.submit(request("a", [1]), lambda event: None)


class Notes:
    """Both ends of the notes."""

    def __init__(self) -> None:
        self.outbox: dict[int, bytes] = {}
        self.heard: list[bytes] = []
        self.arrived: list[tuple[int, bytes]] = []

    @property
    def pending(self) -> bool:
        return bool(self.outbox)

    def outgoing(self) -> dict[int, bytes]:
        notes, self.outbox = self.outbox, {}
        return notes

    def collect(self, rank: int, note: bytes) -> None:
        self.arrived.append((rank, note))

    def receive(self, note: bytes) -> None:
        self.heard.append(note)

    def reply(self) -> bytes:
        return b"heard" if self.heard else b""


def test_notes_travel_with_orders_and_reports_also_when_nothing_runs(wires: Wires) -> None:
    wire, notes = wires(2), Notes()
    rank = Ranked(4)
    thread = threading.Thread(target=follow, args=(wire.follower(1), rank, 1, None, notes))
    thread.start()
    executor = DistributedExecutor(Ranked(4), wire.leader(), 2, notes=notes)
    executor.idle()
    notes.outbox[1] = b"prepare"
    executor.idle()
    wire.down[1].put(None)
    thread.join(WAIT_S)
    assert (notes.heard, notes.arrived, rank.steps) == ([b"prepare"], [(1, b"heard")], [0])


EVERYTHING = SamplingParams(
    max_tokens=9,
    min_tokens=3,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=-0.3,
    logit_bias=((3, 0.1), (49, -100.0)),
    seed=2**63 - 1,
    stop_token_ids=(4, 5),
    ignore_eos=True,
    logprobs=2,
)


def chunk(r: Request, start: int, count: int, blocks: Sequence[int], outputs: list[int]) -> Chunk:
    history = (*r.prompt_ids, *outputs)
    stop = start + count
    ids = tuple(BlockId(b) for b in blocks)
    return Chunk(r, history[start:stop], start, ids, int(stop == len(history)), outputs, 1)


def test_all_that_sampling_needs_arrives() -> None:
    asked = Request(
        RequestId("é-1"), (1, 2, 300_000), EVERYTHING, scope=CacheScope("s", "a"), domain="law"
    )
    told, known = StepEncoder(), StepDecoder(1)
    sent = chunk(asked, 0, 3, [2, 0], [])
    order = told.order(1, 2, [sent])
    (got,) = known.plan(order).chunks
    assert got == replace(sent, request=replace(asked, params=replace(EVERYTHING, max_tokens=16)))
    scores = Logprobs(-0.1, ((7, -0.1), (8, -2.5)))
    made = StepResult((Sampled(asked.id, (7,), (scores,)),))
    report = known.report(order, known.plan(told.order(2, 2, [sent])), made)
    assert told.result([sent], report) == made


def test_a_negative_seed_draws_the_same_tokens() -> None:
    asked = request("a", [1], seed=-5)
    (got,) = StepDecoder(1).plan(StepEncoder().order(1, 1, [chunk(asked, 0, 1, [0], [])])).chunks
    assert got.request.params.seed & (2**64 - 1) == -5 & (2**64 - 1)


def test_a_preempted_request_comes_with_all_its_blocks_and_no_more() -> None:
    asked, told, known = request("a", range(6)), StepEncoder(), StepDecoder(1)
    known.plan(told.order(1, 1, [chunk(asked, 0, 6, [3, 1], [])]))
    order = told.order(2, 1, [chunk(asked, 4, 2, [3, 1, 2], [])], preempted=[asked.id])
    plan = known.plan(order)
    assert plan.preempted == ("a",)
    assert plan.chunks[0].blocks == (3, 1, 2)
    assert (len(order.new_requests), list(order.kept), list(order.added)) == (0, [0], [3])


def test_an_order_about_a_stranger_is_refused() -> None:
    order = StepEncoder().order(4, 1, [chunk(request("a", [1]), 0, 1, [0], [])])
    order.ClearField("new_requests")
    with pytest.raises(InternalError, match="step 4: request number 0 is not known"):
        StepDecoder(1).plan(order)


def test_a_rank_that_samples_too_much_is_found_out() -> None:
    told, known = StepEncoder(), StepDecoder(1)
    sent = [chunk(request("a", [1, 2]), 0, 2, [0], [])]
    order = told.order(1, 1, sent)
    report = known.report(order, known.plan(order), StepResult((Sampled(RequestId("a"), (7,)),)))
    report.tokens.append(8)
    with pytest.raises(InternalError, match="more than it was asked to"):
        told.result(sent, report)


def test_drafts_travel_and_what_was_accepted_comes_back() -> None:
    asked, encoder, decoder = request("a", range(3), logprobs=0), StepEncoder(), StepDecoder(1)
    outputs = [9]
    ids = tuple(BlockId(b) for b in (0, 1))
    drafted = Chunk(asked, (9, 10, 11), 3, ids, 3, outputs, 1, reached=3)
    order = encoder.order(1, 1, [drafted])
    plan = decoder.plan(order)
    assert plan.chunks[0] == replace(
        drafted, request=replace(asked, params=replace(asked.params, max_tokens=16))
    )
    scores = (Logprobs(-0.5), Logprobs(-0.25))
    made = StepResult((Sampled(asked.id, (10, 12), scores),))
    report = decoder.report(order, plan, made)
    assert encoder.result([drafted], report) == made
    outputs += [10, 12]
    following = Chunk(asked, (12,), 5, ids, 1, outputs, 1, reached=5)
    order = encoder.order(2, 1, [following])
    assert not order.new_requests
    assert decoder.plan(order).chunks[0].token_ids == (12,)
    assert decoder.plan(order).chunks[0].reached == 5


@pytest.mark.parametrize("count", [0, 4])
def test_a_rank_that_accepts_more_or_less_than_it_could_is_found_out(count: int) -> None:
    asked, encoder, decoder = request("a", range(3)), StepEncoder(), StepDecoder(1)
    sent = [Chunk(asked, (2, 10, 11), 2, (BlockId(0),), 3, (), 1)]
    order = encoder.order(1, 1, sent)
    made = StepResult((Sampled(asked.id, (10,)),))
    report = decoder.report(order, decoder.plan(order), made)
    report.accepted[0] = count
    with pytest.raises(InternalError, match="where 1 to 3 were asked for"):
        encoder.result(sent, report)
