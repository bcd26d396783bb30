"""How rank 0 reaches the ranks, itself included, about a change of plan: beside the steps.

``PlanPeers`` is the seam; ``LocalPlanPeers`` is it where all ranks are threads of one process.
``Answers`` gathers what ranks answer to one question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Condition
from typing import Any, Generic, Protocol, TypeVar

from moeserve.engine.replan.messages import PlanOrder, PlanReport, describe
from moeserve.engine.replan.swapper import ExpertSwapper
from moeserve.errors import MoeserveError

T = TypeVar("T")


class PlanPeers(Protocol):
    """From any thread; no call waits or raises. What cannot be asked is the future's error."""

    @property
    def world(self) -> int: ...

    def prepare(self, rank: int, order: PlanOrder) -> Future[PlanReport]:
        """Done when the rank has prepared the layer, or cannot."""
        ...

    def abandon(self, turn: int) -> None:
        """All ranks drop what they prepare for turns up to this one. It may come late: rank 0's
        own part decides (see ``switch``)."""
        ...

    def switched(self, rank: int, turn: int) -> Future[PlanReport]:
        """Done when the rank has switched the turn, with its pause; or will not."""
        ...

    def counts(self, rank: int) -> Future[Mapping[str, Any]]:
        """What the rank has counted since it was last asked (``routing_counts``)."""
        ...


class LocalPlanPeers:
    """By calls. ``swappers[r]`` is rank r's."""

    def __init__(self, swappers: Sequence[ExpertSwapper]) -> None:
        self._swappers = swappers

    @property
    def world(self) -> int:
        return len(self._swappers)

    def prepare(self, rank: int, order: PlanOrder) -> Future[PlanReport]:
        return self._swappers[rank].prepare(order)

    def abandon(self, turn: int) -> None:
        for swapper in self._swappers:
            swapper.abandon(turn)

    def switched(self, rank: int, turn: int) -> Future[PlanReport]:
        return self._swappers[rank].switched(turn)

    def counts(self, rank: int) -> Future[Mapping[str, Any]]:
        future: Future[Mapping[str, Any]] = Future()
        try:
            future.set_result(self._swappers[rank].counts())
        except MoeserveError as error:
            future.set_exception(error)
        return future


class Answers(Generic[T]):
    """What ranks answer to one question, as it comes. ``problem`` says what is wrong with an
    answer, if anything. ``changed`` is notified when the last has answered or one has a problem.
    """

    def __init__(
        self,
        changed: Condition,
        asked: Mapping[int, Future[T]],
        problem: Callable[[T], str] = lambda answer: "",
    ) -> None:
        self._changed = changed
        self._came: dict[int, T] = {}
        self._failed: dict[int, str] = {}
        self._problem = problem
        self._late = set(asked)
        for rank, future in asked.items():
            future.add_done_callback(partial(self._take, rank))

    @property
    def came(self) -> dict[int, T]:
        """By rank, the answers so far."""
        with self._changed:
            return dict(self._came)

    @property
    def failed(self) -> dict[int, str]:
        """By rank, in the order they came, what is wrong with answers or why there is none."""
        with self._changed:
            return dict(self._failed)

    @property
    def late(self) -> list[int]:
        """Ranks that have not answered."""
        with self._changed:
            return sorted(self._late)

    def wait(self, ends_s: float, interrupted: Callable[[], str]) -> str:
        """Until all have answered, one has a problem, ``interrupted`` says so, or the monotonic
        clock says ``ends_s``: empty if all answered, else why not, without the ranks' names."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._late or self._failed or interrupted(),
                timeout=max(0.0, ends_s - time.monotonic()),
            )
            if self._failed:
                return next(iter(self._failed.values()))
            return (interrupted() or "no answer") if self._late else ""

    def _take(self, rank: int, future: Future[T]) -> None:
        """On the thread that had the answer."""
        with self._changed:
            self._late.discard(rank)
            error = "the question was withdrawn" if future.cancelled() else ""
            if not error and (raised := future.exception()) is not None:
                error = describe(raised)
            if not error:
                self._came[rank] = future.result()
                error = self._problem(self._came[rank])
            if error:
                self._failed[rank] = error
            if error or not self._late:
                self._changed.notify_all()
