"""How rank 0 reaches all ranks about a change of plan: its own by calls, others over gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from moeserve.engine.ranks.messages import parse
from moeserve.engine.ranks.rank_links import RemoteLink
from moeserve.engine.ranks.rank_server import ANSWER_S
from moeserve.engine.replan.messages import PlanOrder, PlanReport
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.errors import InvalidRequestError, PlacementError, UnavailableError
from moeserve.pb import rank_pb2 as pb

T = TypeVar("T")


class RemotePlanPeers:
    """A ``replan.peers.PlanPeers``. ``link(r)`` reaches another rank, on the loop's thread."""

    def __init__(
        self,
        world: int,
        own: ExpertSwapper,
        link: Callable[[int], RemoteLink],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.world = world
        self._own = own
        self._link = link
        self._loop = loop

    def prepare(self, rank: int, order: PlanOrder) -> Future[PlanReport]:
        if rank == 0:
            return self._own.prepare(order)
        return self._ask(rank, {"prepare": order.as_json()}, PlanReport.of_json)

    def abandon(self, turn: int) -> None:
        self._own.abandon(turn)
        for rank in range(1, self.world):
            self._ask(rank, {"abandon": turn}, lambda answer: None)

    def switched(self, rank: int, turn: int) -> Future[PlanReport]:
        if rank == 0:
            return self._own.switched(turn)
        return self._ask(rank, {"switched": turn}, PlanReport.of_json)

    def counts(self, rank: int) -> Future[Mapping[str, Any]]:
        if rank == 0:
            return immediate(self._own.counts)
        return self._ask(rank, {"counts": True}, lambda answer: answer)

    def _ask(
        self, rank: int, question: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]
    ) -> Future[T]:
        note = pb.Note(content=json.dumps(question).encode()).SerializeToString()

        async def ask() -> T:
            reply = await self._link(rank).call("Replan", note, ANSWER_S)
            try:
                return read(_read_json(parse(pb.Note, reply).content))
            except (InvalidRequestError, PlacementError) as error:
                raise UnavailableError(f"rank {rank}, Replan: {error.message}") from error

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)


def answer_note(swapper: ExpertSwapper, content: bytes) -> Future[bytes]:
    """On the rank that is asked: what goes back, when it is known. PlacementError where nothing
    known is asked."""
    question = _read_json(content)
    match question:
        case {"prepare": order}:
            return then(swapper.prepare(PlanOrder.of_json(order)), PlanReport.as_json)
        case {"abandon": int(turn)}:
            swapper.abandon(turn)
            return immediate(lambda: b"{}")
        case {"switched": int(turn)}:
            return then(swapper.switched(turn), PlanReport.as_json)
        case {"counts": True}:
            return immediate(lambda: json.dumps(dict(swapper.counts())).encode())
    raise PlacementError(f"a note about a plan that says nothing known: {str(question)[:100]}")


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"a note about a plan is no JSON: {str(error)[:100]}") from error


def then(future: Future[T], show: Callable[[T], Mapping[str, Any]]) -> Future[bytes]:
    """What the future will give, as JSON; whoever asked may be gone by then."""
    out: Future[bytes] = Future()

    def pass_on(done: Future[T]) -> None:
        if not out.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is not None:
            out.set_exception(error)
        else:
            out.set_result(json.dumps(show(done.result())).encode())

    future.add_done_callback(pass_on)
    return out


def immediate(make: Callable[[], T]) -> Future[T]:
    """A future that is done, with a result or an error."""
    future: Future[T] = Future()
    try:
        future.set_result(make())
    except PlacementError as error:
        future.set_exception(error)
    return future
