"""Every rank but the first: receive an order, run it together with all others, report.

It decides nothing. Orders come whenever rank 0 has a step, also when this rank has no part in it.
"""

from __future__ import annotations

import logging
from typing import Protocol

from moeserve.comm.dispatcher import DispatchStats
from moeserve.engine.executor import RankExecutor
from moeserve.engine.ranks.homes import ExpertUseSource
from moeserve.engine.ranks.messages import StepDecoder, write_uses, write_work
from moeserve.errors import InternalError, MoeserveError
from moeserve.pb import step_pb2 as pb


class FollowerChannel(Protocol):
    """A follower's end of the control channel (``comm.control.channels.Follower``)."""

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next order; None when the run is over. LateRankError when it has broken."""
        ...

    def send(self, message: bytes) -> None: ...

    def fail(self, error: MoeserveError) -> None:
        """All other ranks are to end, with this reason."""
        ...


class FollowerNotes(Protocol):
    """This rank's end of notes that travel with orders and reports; rank 0's is a
    ``leader.LeaderNotes``."""

    def receive(self, note: bytes) -> None:
        """Before a step, on all ranks the same step."""
        ...

    def reply(self) -> bytes:
        """After a step; empty is nothing."""
        ...


def follow(
    channel: FollowerChannel,
    executor: RankExecutor,
    rank: int,
    stats: DispatchStats | None = None,
    notes: FollowerNotes | None = None,
    uses: ExpertUseSource | None = None,
) -> int:
    """Steps run until the run was over. Reports carry ``stats`` and ``uses``.

    An error is sent to the other ranks and raised: having left a step midway, this rank cannot
    run another one with them.
    """
    decoder = StepDecoder(rank)
    steps = 0
    try:
        while (message := channel.receive()) is not None:
            report = _step(message, decoder, executor, stats, notes)
            if uses is not None:
                write_uses(report, uses.take())
            channel.send(report.SerializeToString())
            steps += 1
    except MoeserveError as error:
        channel.fail(error)
        raise
    except Exception as error:
        logging.getLogger("moeserve.engine").critical("a step failed midway", exc_info=True)
        channel.fail(InternalError(f"a step failed midway ({type(error).__name__}: {error})"))
        raise
    return steps


def _step(
    message: bytes,
    decoder: StepDecoder,
    executor: RankExecutor,
    stats: DispatchStats | None,
    notes: FollowerNotes | None,
) -> pb.StepReport:
    order = pb.StepOrder.FromString(message)
    if notes is not None and order.note:
        notes.receive(order.note)
    plan = decoder.plan(order)
    report = decoder.report(order, plan, executor.run(plan, order.microbatches))
    if stats is not None:
        write_work(report.work, stats)
    if notes is not None:
        report.note = notes.reply()
    return report
