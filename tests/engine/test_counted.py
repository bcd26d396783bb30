"""Counts, and notes about plans, of other ranks: nothing is lost, and no answer harms."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import Counters, FinishReason
from moeserve.engine.loop import EngineLoad
from moeserve.engine.ranks.counted import (
    GATHER_S,
    GatheredCounts,
    RankCounts,
    ReceivedKv,
    read_counts,
    write_counts,
)
from moeserve.engine.ranks.plan_peers import RemotePlanPeers, answer_note, immediate, then
from moeserve.engine.ranks.rank_server import ANSWER_S
from moeserve.engine.replan.messages import PlanOrder, PlanReport
from moeserve.errors import InvalidRequestError, PlacementError, UnavailableError
from moeserve.pb import rank_pb2 as pb

WAIT_S = 20.0
counts = st.integers(0, 2**40)
seconds = st.floats(0, 1e9)


def of_kind(cls: type, **others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every field that is a number, by the kind of its default."""
    drawn = {
        f.name: seconds if isinstance(f.default, float) else counts
        for f in fields(cls)
        if f.name not in others
    }
    return st.builds(cls, **drawn, **others)


loads = of_kind(EngineLoad, block_size=st.just(16), accepting=st.just(True))
rank_counts = st.builds(
    RankCounts,
    work=of_kind(DispatchStats),
    counters=of_kind(
        Counters, finished=st.dictionaries(st.sampled_from(FinishReason), st.integers(1, 2**40))
    ),
    chosen=st.dictionaries(st.integers(1, 4), counts).map(Counter),
    load=loads,
    expert_choices=st.just(()) | st.tuples(counts, counts, counts),
    moe_layers=st.tuples(st.integers(0, 100)),
    received=st.lists(st.builds(ReceivedKv, st.text(max_size=9), counts, counts)).map(tuple),
)


def crossed(found: RankCounts) -> RankCounts:
    reply = write_counts(found).SerializeToString()
    return read_counts(pb.CountedReply.FromString(reply))


@given(rank_counts)
def test_counts_cross_whole(found: RankCounts) -> None:
    assert crossed(found) == found


class Links:
    """Ranks that answer ``Counted`` with what they have, or as the test says."""

    def __init__(self, ranks: list[RankCounts]) -> None:
        self.ranks = ranks
        self.broken: dict[int, bytes | Exception] = {}
        self.asked: list[tuple[str, float]] = []

    def link(self, rank: int) -> Any:
        links = self

        class Link:
            async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
                links.asked.append((method, timeout_s))
                await asyncio.sleep(0)
                broken = links.broken.get(rank, b"")
                if isinstance(broken, Exception):
                    raise broken
                return broken or write_counts(links.ranks[rank]).SerializeToString()

        return Link()


@settings(max_examples=30, deadline=None)
@given(st.lists(rank_counts, min_size=1, max_size=5), st.data())
def test_the_counts_of_all_ranks_add_up(ranks: list[RankCounts], data: st.DataObject) -> None:
    own = data.draw(st.integers(0, len(ranks) - 1))
    links = Links(ranks)
    gathered = GatheredCounts(len(ranks), own, lambda: ranks[own], links.link)
    asyncio.run(gathered.refresh())
    assert list(gathered.of_ranks) == ranks
    assert gathered.work == [one.work for one in ranks]
    assert gathered.chosen == ranks[own].chosen
    same = [r.expert_choices for r in ranks if len(r.expert_choices) == 3]
    if ranks[own].expert_choices:
        assert gathered.expert_choices is not None
        assert gathered.expert_choices.tolist() == [
            sum(column) for column in zip(*same, strict=True)
        ]
    else:
        assert gathered.expert_choices is None
    total = gathered.counters
    for f in fields(Counters):
        if f.name not in ("finished", "steps"):
            values = [getattr(one.counters, f.name) for one in ranks]
            assert getattr(total, f.name) == sum(values), f.name
    assert total.steps == ranks[own].counters.steps, "steps are common to all"
    ends: Counter[FinishReason] = Counter()
    for one in ranks:
        ends.update(one.counters.finished)
    assert total.finished == ends
    load = gathered.load()
    for f in fields(EngineLoad):
        values = [getattr(one.load, f.name) for one in ranks]
        expected = values[own] if f.name in ("block_size", "accepting") else sum(values)
        assert getattr(load, f.name) == expected, f.name
    assert links.asked == [("Counted", GATHER_S)] * (len(ranks) - 1), "all at once, each so long"


@pytest.mark.parametrize(
    "broken",
    [
        UnavailableError("rank 1, Counted: no answer in time"),
        b"\xff\xff",
        pb.CountedReply(finished={"because": 1}).SerializeToString(),
        pb.CountedReply(counters={"steps": float("nan")}).SerializeToString(),
        pb.CountedReply(counters={"generated_tokens": float("inf")}).SerializeToString(),
    ],
    ids=["late", "garbage", "unknown reason", "no number", "no count"],
)
async def test_a_rank_that_does_not_answer_keeps_its_last_counts(broken: Any) -> None:
    first, second = (RankCounts(counters=Counters(generated_tokens=n)) for n in (5, 7))
    links = Links([RankCounts(), first, second])
    gathered = GatheredCounts(3, 0, RankCounts, links.link)
    await gathered.refresh()
    links.ranks[1:] = [RankCounts(counters=Counters(generated_tokens=n)) for n in (50, 70)]
    links.broken[1] = broken
    await gathered.refresh()
    assert [one.counters.generated_tokens for one in gathered.of_ranks] == [0, 5, 70]
    links.broken.clear()
    await gathered.refresh()
    assert [one.counters.generated_tokens for one in gathered.of_ranks] == [0, 50, 70]


class Swapper:
    """Answers as an ``ExpertSwapper`` does, when the test says."""

    def __init__(self) -> None:
        self.prepared: dict[int, Future[PlanReport]] = {}
        self.abandoned: list[int] = []

    def prepare(self, order: PlanOrder) -> Future[PlanReport]:
        return self.prepared.setdefault(order.turn, Future())

    def abandon(self, turn: int) -> None:
        self.abandoned.append(turn)

    def switched(self, turn: int) -> Future[PlanReport]:
        return immediate(lambda: PlanReport(turn, pause_s=0.5))

    def counts(self) -> dict[str, Any]:
        return {"layers": [1, 2]}


class Notes:
    """A link whose rank answers notes by ``answer_note``."""

    def __init__(self, swapper: Any, reply: bytes | None = None) -> None:
        self.swapper = swapper
        self.reply = reply
        self.asked: list[tuple[str, float]] = []

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self.asked.append((method, timeout_s))
        if self.reply is not None:
            return self.reply
        answer = answer_note(self.swapper, pb.Note.FromString(request).content)
        return pb.Note(content=await asyncio.wrap_future(answer)).SerializeToString()


def peers(notes: Notes, own: Swapper) -> RemotePlanPeers:
    loop = asyncio.get_running_loop()
    return RemotePlanPeers(2, own, lambda rank: notes, loop)  # type: ignore[arg-type,return-value]


async def test_plan_notes_reach_the_ranks_and_their_answers_come_back() -> None:
    own, other = Swapper(), Swapper()
    notes = Notes(other)
    asking = peers(notes, own)
    order = PlanOrder(1, 0, (0, 1))
    waits = [asyncio.wrap_future(asking.prepare(rank, order)) for rank in (0, 1)]
    report = PlanReport(1, bytes_read=9)
    async with asyncio.timeout(WAIT_S):
        while not other.prepared:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        own.prepared[1].set_result(report)
        other.prepared[1].set_result(report)
        assert await asyncio.gather(*waits) == [report, report]
        for rank in (0, 1):
            switched = PlanReport(2, pause_s=0.5)
            assert await asyncio.wrap_future(asking.switched(rank, 2)) == switched
            assert await asyncio.wrap_future(asking.counts(rank)) == {"layers": [1, 2]}
        asking.abandon(3)
        while not other.abandoned:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert own.abandoned == other.abandoned == [3]
    assert set(notes.asked) == {("Replan", ANSWER_S)}


@pytest.mark.parametrize(
    "reply",
    [b"\xff\xff", b"", pb.Note(content=b"{}").SerializeToString(), pb.Note(content=b"[" * 10**6)],
    ids=["garbage", "nothing", "no report", "deep"],
)
async def test_an_answer_that_means_nothing_is_that_ranks_failure(reply: Any) -> None:
    content = reply if isinstance(reply, bytes) else reply.SerializeToString()
    asking = peers(Notes(Swapper(), content), Swapper())
    with pytest.raises(UnavailableError, match=r"rank 1, Replan"):
        await asyncio.wrap_future(asking.switched(1, 2))


noted = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from(["prepare", "abandon", "turn"]), inner),
    max_leaves=4,
)


@given(st.binary(max_size=50) | noted.map(lambda found: json.dumps(found).encode()))
def test_a_note_is_answered_or_refused(content: bytes) -> None:
    try:
        answer = answer_note(Swapper(), content)  # type: ignore[arg-type]
    except PlacementError:
        return
    assert isinstance(answer, Future)


def test_whoever_asked_may_be_gone_when_the_answer_comes() -> None:
    source: Future[PlanReport] = Future()
    answer = then(source, PlanReport.as_json)
    assert answer.cancel()
    source.set_result(PlanReport(1))
    assert answer.cancelled() and not source.cancelled()
    failed: Future[PlanReport] = Future()
    answer = then(failed, PlanReport.as_json)
    failed.set_exception(PlacementError("no such layer"))
    with pytest.raises(PlacementError, match="no such layer"):
        answer.result(WAIT_S)


def test_counts_that_are_none_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"counts that are none"):
        read_counts(pb.CountedReply(finished={"because": 1}))
