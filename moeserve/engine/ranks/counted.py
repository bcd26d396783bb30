"""What ranks have counted, gathered off the step's path: whoever shows figures asks for them.

A rank's counts are of one size whatever the number of ranks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import Counters, FinishReason
from moeserve.engine.loop import EngineLoad
from moeserve.engine.ranks.messages import parse
from moeserve.engine.ranks.rank_links import RemoteLink
from moeserve.errors import InvalidRequestError, UnavailableError
from moeserve.observe.expert_counts import ExpertCounts
from moeserve.pb import rank_pb2 as pb

log = logging.getLogger(__name__)

GATHER_S = 2.0
_LOAD = ("running", "waiting", "total_blocks", "free_blocks", "cached_blocks", "block_size")
_COUNTS = tuple(f.name for f in fields(Counters) if f.name != "finished")
_WORK = tuple(f.name for f in fields(DispatchStats))


def _no_load() -> EngineLoad:
    return EngineLoad(0, 0, 0, 0, 0, 1, True)


@dataclass(frozen=True, slots=True)
class ReceivedKv:
    """From the rank at the address ``source``: bytes, and runs of positions of one layer."""

    source: str
    bytes: int
    runs: int


@dataclass(slots=True)
class RankCounts:
    """One rank's: what moved, what its requests were, how steps were cut, its load; how often each
    expert was chosen, of each of its ``moe_layers`` in turn, where it counts that; and what KV it
    had from ranks of other instances."""

    work: DispatchStats = field(default_factory=DispatchStats)
    counters: Counters = field(default_factory=Counters)
    chosen: Counter[int] = field(default_factory=Counter)
    load: EngineLoad = field(default_factory=_no_load)
    expert_choices: tuple[int, ...] = ()
    moe_layers: tuple[int, ...] = ()
    received: tuple[ReceivedKv, ...] = ()


def with_experts(found: RankCounts, experts: ExpertCounts | None) -> RankCounts:
    """The counts of a rank with those of its experts, if it counts them."""
    if experts is None:
        return found
    choices = tuple(experts.loads().ravel().tolist())
    return replace(found, expert_choices=choices, moe_layers=experts.layers)


def write_counts(found: RankCounts) -> pb.CountedReply:
    reply = pb.CountedReply(microbatches=found.chosen)
    for name in _WORK:
        setattr(reply.work, name, getattr(found.work, name))
    for name in _COUNTS:
        reply.counters[name] = getattr(found.counters, name)
    for reason, count in found.counters.finished.items():
        reply.finished[reason.value] = count
    for name in _LOAD:
        setattr(reply.load, name, getattr(found.load, name))
    reply.expert_choices.extend(found.expert_choices)
    reply.moe_layers.extend(found.moe_layers)
    for one in found.received:
        reply.received.add(source=one.source, bytes=one.bytes, runs=one.runs)
    return reply


def read_counts(reply: pb.CountedReply) -> RankCounts:
    """InvalidRequestError where something in it is no count."""
    counters = Counters()
    try:
        for name in _COUNTS:
            kind = type(getattr(counters, name))
            setattr(counters, name, kind(reply.counters[name]))
        counters.finished = {FinishReason(name): n for name, n in reply.finished.items()}
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"counts that are none: {error}") from error
    load = {name: getattr(reply.load, name) for name in _LOAD}
    return RankCounts(
        DispatchStats(**{name: getattr(reply.work, name) for name in _WORK}),
        counters,
        Counter(dict(reply.microbatches)),
        EngineLoad(**load, accepting=True),
        tuple(reply.expert_choices),
        tuple(reply.moe_layers),
        tuple(ReceivedKv(one.source, one.bytes, one.runs) for one in reply.received),
    )


async def ask_counts(link: RemoteLink, timeout_s: float) -> RankCounts:
    """What the rank at the other end has counted. UnavailableError if it does not answer in time,
    InvalidRequestError if it answers with no counts."""
    return read_counts(parse(pb.CountedReply, await link.call("Counted", b"", timeout_s)))


class GatheredCounts:
    """The counts of all ranks as of the last ``refresh``; of a rank that did not answer, those of
    the time before."""

    def __init__(
        self,
        world: int,
        own: int,
        count: Callable[[], RankCounts],
        link: Callable[[int], RemoteLink],
    ) -> None:
        self._own = own
        self._count = count
        self._link = link
        self._of_ranks = [RankCounts() for _ in range(world)]

    async def refresh(self) -> None:
        """Ask all ranks at once; at most ``GATHER_S``. On the event loop."""
        others = [rank for rank in range(len(self._of_ranks)) if rank != self._own]
        answers = await asyncio.gather(*map(self._ask, others))
        for rank, answer in zip(others, answers, strict=True):
            if answer is not None:
                self._of_ranks[rank] = answer

    @property
    def of_ranks(self) -> Sequence[RankCounts]:
        self._of_ranks[self._own] = self._count()
        return self._of_ranks

    @property
    def work(self) -> list[DispatchStats]:
        return [counts.work for counts in self.of_ranks]

    @property
    def chosen(self) -> Mapping[int, int]:
        """All ranks run the same steps, so any of them knows."""
        return self._count().chosen

    @property
    def counters(self) -> Counters:
        """Of all ranks together; steps are common to them."""
        total = Counters()
        for counts in self.of_ranks:
            for name in _COUNTS:
                setattr(total, name, getattr(total, name) + getattr(counts.counters, name))
            for reason, count in counts.counters.finished.items():
                total.finished[reason] = total.finished.get(reason, 0) + count
        total.steps = self._count().counters.steps
        return total

    def load(self) -> EngineLoad:
        """Of all ranks together."""
        loads = [counts.load for counts in self.of_ranks]
        sums = {name: sum(getattr(load, name) for load in loads) for name in _LOAD[:-1]}
        own = self._count().load
        return EngineLoad(**sums, block_size=own.block_size, accepting=own.accepting)

    @property
    def expert_choices(self) -> NDArray[np.int64] | None:
        """Of all ranks together; None where nobody counts. A rank that counts other experts than
        this one is left out."""
        found = [counts.expert_choices for counts in self.of_ranks]
        size = len(found[self._own])
        same = [choices for choices in found if len(choices) == size]
        return np.sum(np.array(same, np.int64), axis=0) if size else None

    async def _ask(self, rank: int) -> RankCounts | None:
        try:
            return await ask_counts(self._link(rank), GATHER_S)
        except (UnavailableError, InvalidRequestError) as error:
            log.info("rank %d is shown as it was: %s", rank, error.message)
            return None
