"""A rank's part in a new plan: prepare a layer's experts beside the steps, swap them in at once.

Experts are read from the checkpoint and packed on a thread of their own; the swap, between two
steps, is one assignment, and what it held the step up is measured. Its notes travel with orders
and reports, as JSON.

``receive``, ``reply`` and ``apply`` belong to the thread that runs steps, ``close`` to whoever ends
the rank after the last step; what they share with the thread that reads is under a lock.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from moeserve.comm.build import shard_experts
from moeserve.comm.dispatcher import ShardedExperts
from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.engine.replan.switch import PlanOrder, PlanReport
from moeserve.errors import MoeserveError
from moeserve.kernels.ops import Ops, Part, RouterWeights
from moeserve.models.expert_source import ExpertSource

Open = Callable[[], ExpertSource]


class Counts(Protocol):
    """What the rank has counted since it was last asked, as JSON has it."""

    def take(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Task:
    turn: int
    layer: int
    expert_S: tuple[int, ...]


class ExpertSwapper:
    """A ``follower.FollowerNotes``; ``open_source`` is called once, on the thread that reads."""

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
        self._asked = False
        self._wanted = 0  # the turn that is being prepared; 0 is none
        self._ready: tuple[_Task, ShardedExperts] | None = None
        self._reports: deque[PlanReport] = deque()
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[_Task | ShardedExperts | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._log = logging.getLogger("moeserve.plan")

    def receive(self, note: bytes) -> None:
        """Before a step, a note of ``coordinator.PlanCoordinator``."""
        content = json.loads(note)
        self._asked |= bool(content.get("count"))
        if "order" in content:
            order = content["order"]
            self.apply(PlanOrder(**{**order, "expert_S": tuple(order["expert_S"])}))

    def reply(self) -> bytes:
        """After a step: reports since the last call, and what was counted if that was asked for."""
        answer: dict[str, Any] = {}
        with self._lock:
            if self._reports:
                answer["reports"] = [asdict(report) for report in self._reports]
                self._reports.clear()
        if self._asked and self._counts is not None:
            answer["counts"] = self._counts.take()
        self._asked = False
        return json.dumps(answer).encode() if answer else b""

    def apply(self, order: PlanOrder) -> None:
        """Before a step: drop, switch and begin to prepare, as the order says."""
        if order.abandon:
            with self._lock:
                self._wanted, self._ready = 0, None
        if order.switch is not None:
            self._switch(order.switch)
        if order.prepare is not None:
            with self._lock:
                self._wanted = order.turn
            self._start()
            self._tasks.put(_Task(order.turn, order.prepare, order.expert_S))

    def close(self, timeout_s: float = 30.0) -> None:
        """What is being read is read to its end, and dropped."""
        with self._lock:
            self._wanted, self._ready = 0, None
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(timeout_s)

    def _switch(self, layer: int) -> None:
        began = self._clock()
        with self._lock:
            ready, self._ready = self._ready, None
        assert ready is not None, f"layer {layer} was not prepared"
        assert ready[0].layer == layer, (ready[0], layer)
        old, self._parallel.sharded[layer] = self._parallel.sharded[layer], ready[1]
        assert old is not None, layer
        self._tasks.put(old)  # to be freed there, before the next is prepared
        del old
        pause_s = self._clock() - began
        with self._lock:
            self._reports.append(PlanReport(ready[0].turn, pause_s=pause_s))

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="experts", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        source: ExpertSource | None = None
        while (task := self._tasks.get()) is not None:
            if isinstance(task, ShardedExperts):
                del task
                continue
            with self._lock:
                wanted = self._wanted
            if task.turn != wanted:
                continue
            began = self._clock()
            before = 0 if source is None else source.bytes_read
            try:
                source = source or self._open()
                sharded = self._prepare(source, task)
            except (MoeserveError, OSError, MemoryError, RuntimeError) as error:
                self._log.exception("layer %d cannot be prepared", task.layer)
                self._answer(task, None, PlanReport(task.turn, error=_shown(error)))
                continue
            seconds, read = self._clock() - began, source.bytes_read - before
            done = PlanReport(task.turn, prepare_s=seconds, bytes_read=read)
            self._answer(task, sharded, done)
            del sharded  # or it would outlive its layer here

    def _prepare(self, source: ExpertSource, task: _Task) -> ShardedExperts:
        """Where the rank's own experts stay, nothing is read."""
        held = self._parallel.sharded[task.layer]
        assert held is not None, task.layer
        row_S = np.array(task.expert_S, np.int32)
        layout = LayerLayout(row_S, held.layout.num_experts, held.layout.world)
        part, own = held.part, layout.of_rank(self._rank)
        if own != held.layout.of_rank(self._rank):
            experts = source.read(task.layer, own)
            part = self._ops.prepare(replace(part.weights, experts=experts))
        return shard_experts(self._ops, self.routers[task.layer], part, layout)

    def _answer(self, task: _Task, sharded: ShardedExperts | None, report: PlanReport) -> None:
        with self._lock:
            if task.turn != self._wanted:
                return
            self._ready = None if sharded is None else (task, sharded)
            self._reports.append(report)


def _shown(error: Exception) -> str:
    return error.message if isinstance(error, MoeserveError) else f"{type(error).__name__}: {error}"
