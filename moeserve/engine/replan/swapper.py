"""A rank's part in a new plan: prepare a layer's experts beside the steps, swap them in at once.

Experts are read from the checkpoint and packed on a thread of their own. The swap, between two
steps, is one assignment, and what it held the step up is measured. When that is, all ranks agree on
by the records of a step: see ``switch``, whose ``RankTurns`` decides here.

The thread that runs steps calls ``promise`` when it makes its record and ``settle`` when it has all
records, both cheap; ``close`` is of whoever ends the rank after its last step. The rest is for any
thread. One lock is held in every call, futures are completed outside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from moeserve.comm.build import shard_experts
from moeserve.comm.dispatcher import ShardedExperts
from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.engine.replan.messages import PlanOrder, PlanReport, describe
from moeserve.engine.replan.switch import RankTurns, check_row
from moeserve.errors import PlacementError
from moeserve.kernels.ops import Ops, Part, RouterWeights
from moeserve.models.expert_source import ExpertSource

Open = Callable[[], ExpertSource]


class Counts(Protocol):
    """What the rank has counted since it was last asked, as JSON has it; from any thread."""

    def take(self) -> Mapping[str, Any]: ...


class ExpertSwapper:
    """``open_source`` is called once, on the thread that reads."""

    def __init__(
        self,
        rank: int,
        ops: Ops,
        parallel: ParallelLayerRunner,
        routers: Mapping[int, Part[RouterWeights]],
        open_source: Open,
        counts: Counts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rank = rank
        self._ops = ops
        self._parallel = parallel
        self.routers = routers
        self._open = open_source
        self._counts = counts
        self._clock = clock
        self._changed = threading.Condition()  # of everything below
        self._turns = RankTurns()
        self._closed = False
        self._order: PlanOrder | None = None  # to be prepared when there is room
        self._ready: tuple[PlanOrder, ShardedExperts] | None = None
        self._unused: list[ShardedExperts] = []  # to be freed on the thread that reads
        self._last: PlanReport | None = None  # of the last switch
        self._preparing: dict[int, Future[PlanReport]] = {}  # by turn
        self._switching: list[tuple[int, Future[PlanReport]]] = []
        self._thread: threading.Thread | None = None
        self._log = logging.getLogger("moeserve.plan")

    def prepare(self, order: PlanOrder) -> Future[PlanReport]:
        """Begin to prepare a layer; done when it is prepared, or with the report's ``error``."""
        future: Future[PlanReport] = Future()
        with self._changed:
            begun = not self._closed and self._turns.begin(order.turn)
            if begun:
                self._drop_stale()
                self._preparing[order.turn], self._order = future, order
                self._start()
                self._changed.notify_all()
            answers = self._answers()
        _complete(answers)
        if not begun:
            _complete([(future, PlanReport(order.turn, error=self._why_not(order.turn)))])
        return future

    def abandon(self, turn: int) -> None:
        """Drop what is prepared, or is being prepared, for turns up to this one. Where the rank has
        named it in a record, what the records of all ranks say comes first."""
        with self._changed:
            self._turns.abandon(turn)
            self._drop_stale()
            answers = self._answers()
            self._changed.notify_all()
        _complete(answers)

    def switched(self, turn: int) -> Future[PlanReport]:
        """Done when the newest turn was switched, with its pause; or is dropped, with an error."""
        future: Future[PlanReport] = Future()
        with self._changed:
            self._switching.append((turn, future))
            answers = self._answers()
        _complete(answers)
        return future

    def counts(self) -> Mapping[str, Any]:
        """What was counted since the last call; PlacementError where nothing is counted."""
        if self._counts is None:
            raise PlacementError("this rank does not count routing: start it with --replan auto")
        return self._counts.take()

    @property
    def prepared(self) -> int:
        """The turn that waits to be switched, for which steps are wanted; 0 is none."""
        with self._changed:
            return self._turns.prepared

    def promise(self) -> int:
        """When the record of the next step is made: the turn that it is to name, or 0."""
        with self._changed:
            return self._turns.promise()

    def settle(self, agreed: int) -> None:
        """Between two steps, once for every record, with ``agreed_turn`` of all ranks' records:
        switch, or go back on the promise."""
        began = self._clock()
        with self._changed:
            if not self._turns.settle(agreed):
                self._drop_stale()
                return
            assert self._ready is not None, agreed
            (order, sharded), self._ready = self._ready, None
            assert order.turn == agreed, (order, agreed)
            old, self._parallel.sharded[order.layer] = self._parallel.sharded[order.layer], sharded
            assert old is not None, order.layer
            self._unused.append(old)
            del old
            self._last = PlanReport(agreed, pause_s=self._clock() - began)
            self._changed.notify_all()

    def close(self, timeout_s: float = 30.0) -> None:
        """What is being read is read to its end, and dropped."""
        with self._changed:
            self._closed = True
            self._turns = RankTurns()
            self._drop_stale()
            answers = self._answers()
            self._changed.notify_all()
        _complete(answers)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _drop_stale(self) -> None:
        """Under the lock, when turns may have been dropped."""
        if self._order is not None and self._order.turn != self._turns.wanted:
            self._order = None
        if self._ready is not None and self._ready[0].turn != self._turns.prepared:
            self._unused.append(self._ready[1])
            self._ready = None
            self._changed.notify_all()

    def _answers(self) -> list[tuple[Future[PlanReport], PlanReport]]:
        """Under the lock: futures that can be completed now, and with what."""
        found, open_ = [], []
        for turn in [t for t in self._preparing if t != self._turns.wanted]:
            why = PlanReport(turn, error=self._why_not(turn))
            found.append((self._preparing.pop(turn), why))
        for turn, future in self._switching:
            if self._last is not None and self._last.turn == turn:
                found.append((future, self._last))
            elif self._turns.is_open(turn):
                open_.append((turn, future))
            else:
                found.append((future, PlanReport(turn, error=self._why_not(turn))))
        self._switching = open_
        return found

    def _why_not(self, turn: int) -> str:
        return "the rank ends" if self._closed else f"turn {turn} is abandoned"

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="experts", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """The thread that reads: free what is out of use, answer who waits, prepare."""
        source: ExpertSource | None = None
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                unused, self._unused = self._unused, []
                answers = self._answers()
                order = self._order if self._turns.room else None
                self._order = None if order is not None else self._order
                closed = self._closed
            del unused  # outside the lock, which steps take
            _complete(answers)
            if closed:
                return
            if order is None:
                continue
            before = 0 if source is None else source.bytes_read
            began = self._clock()
            try:
                source = source or self._open()
                sharded = self._prepare(source, order)
            except Exception as error:  # noqa: BLE001 - rank 0 waits: it is told whatever it was
                self._log.exception("layer %d cannot be prepared", order.layer)
                self._fail(order.turn, describe(error))
                continue
            seconds, read = self._clock() - began, source.bytes_read - before
            self._finish(order, sharded, PlanReport(order.turn, prepare_s=seconds, bytes_read=read))
            del sharded  # or it would outlive its layer here

    def _has_work(self) -> bool:
        ready = self._order is not None and self._turns.room
        told = any(not self._turns.is_open(turn) for turn, _ in self._switching)
        return self._closed or ready or told or bool(self._unused)

    def _prepare(self, source: ExpertSource, order: PlanOrder) -> ShardedExperts:
        """Where the rank's own experts stay, nothing is read."""
        held = self._held(order.layer)
        check_row(order.layer, tuple(held.layout.expert_S.tolist()), order.expert_S)
        row_S = np.array(order.expert_S, np.int32)
        layout = LayerLayout(row_S, held.layout.num_experts, held.layout.world)
        part, own = held.part, layout.of_rank(self._rank)
        if own != held.layout.of_rank(self._rank):
            experts = source.read(order.layer, own)
            part = self._ops.prepare(replace(part.weights, experts=experts))
        router, wide = self.routers[order.layer], held.wire.wide
        return shard_experts(self._ops, router, part, layout, wide=wide)

    def _held(self, layer: int) -> ShardedExperts:
        held = self._parallel.sharded[layer] if layer < len(self._parallel.sharded) else None
        if held is None:
            raise PlacementError(f"layer {layer} has no experts to move: take the model's own plan")
        return held

    def _finish(self, order: PlanOrder, sharded: ShardedExperts, report: PlanReport) -> None:
        with self._changed:
            if not self._turns.finish(order.turn):
                return
            self._ready = order, sharded
            future = self._preparing.pop(order.turn)
        _complete([(future, report)])

    def _fail(self, turn: int, error: str) -> None:
        with self._changed:
            future = self._preparing.pop(turn, None)
            if future is not None:
                self._turns.abandon(turn)
            answers = self._answers()
        _complete(answers)
        if future is not None:
            _complete([(future, PlanReport(turn, error=error))])


def _complete(answers: list[tuple[Future[PlanReport], PlanReport]]) -> None:
    for future, report in answers:
        if future.set_running_or_notify_cancel():
            future.set_result(report)
