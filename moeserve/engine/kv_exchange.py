"""The KV of one rank for those who bring some or take some away: ``pools.kv.house.KvHouse``.

Any thread may call. What concerns blocks and requests happens under the engine's lock, which is
free within moments: nothing waits for a step. Bytes are copied without it, while steps run, for
steps and callers write to different blocks:

* a step writes only behind what its requests have computed, and what it still works on is not lent,
  also where its request has left meanwhile (``Scheduler.blocks_in_use``);
* callers write only to blocks that they borrowed, and read only what is computed.

References that are out (borrowed, looked at, kept, detached) are counted by the block pool alone:
whoever has them gives them back, or hands them on with a request. ``close`` gives back what was
kept and never taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from moeserve.core import BlockId, CacheScope, FinishReason, Request, RequestId
from moeserve.engine.kv_tensors import KvTensors
from moeserve.engine.loop import Engine, EngineLock
from moeserve.engine.rates import StepRates
from moeserve.engine.request_state import EventSink
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import NEW, HeldKv, History, StepKv
from moeserve.kernels.ops import KvRuns

log = logging.getLogger("moeserve.engine")


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What a rank says of its load. ``waiting_tokens`` are still to be computed, for requests that
    run or wait; ``prefill_rate`` is in tokens per second, ``step_s`` of a step that only decodes,
    both 0 before they were measured. ``urgent`` of those that run have a priority below 0."""

    running: int
    waiting: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    prefill_rate: float
    step_s: float
    urgent: int


class KvExchange:
    """``engine`` runs ``scheduler`` under ``lock``, and has no other ``after_step``; ``tensors``
    are those its executor writes to."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        lock: EngineLock,
        tensors: KvTensors,
        rates: StepRates,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._lock = lock
        self._tensors = tensors
        self._rates = rates
        self._listeners: dict[int, Callable[[], None]] = {}
        self._between: dict[int, Callable[[], None]] = {}
        self._listened = 0
        self.layouts = tensors.layouts
        self.block_size = scheduler.pool.block_size
        engine.after_step, tensors.progress.begun = self._after_step, self._tell

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        scheduler = self._scheduler
        with self._lock:
            return scheduler.kv.borrow(
                token_ids,
                scope,
                spare=spare_blocks(scheduler),
                avoid=scheduler.blocks_in_use(),
            )

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        with self._lock:
            self._scheduler.kv.publish_held(held, token_ids, scope)

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        with self._lock:
            self._scheduler.pool.release(held.blocks, forget=forget)
            self._scheduler.look_again()
            waiting = self._scheduler.num_waiting
        if waiting:
            self._engine.wake()

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        """InternalError where ``out_NX`` is not uint8 [N, ``layouts[layer].nbytes``]."""
        self._tensors.export_kv(layer, blocks, out_NX)

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        """InternalError where ``data_NX`` is not uint8 [N, ``layouts[layer].nbytes``]."""
        self._tensors.import_kv(layer, blocks, data_NX)

    def export_runs(self, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
        """InternalError where a run names what is not there."""
        return self._tensors.export_runs(blocks, runs, out_X)

    def import_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
    ) -> Tensor:
        """InternalError where a run names what is not there."""
        return self._tensors.import_runs(blocks, runs, digests_RD, data_X)

    def submit(self, request: Request, sink: EventSink, history: History = NEW) -> None:
        self._engine.submit(request, sink, history)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self._engine.abort(request_id, reason)

    def look(self, request_id: RequestId) -> HeldKv | None:
        """Of one that waits (preempted, perhaps), what it has at hand: mostly nothing."""
        with self._lock:
            seq = self._scheduler.sequence(request_id)
            return None if seq is None else self._scheduler.kv.look(seq)

    def look_within(self, request_id: RequestId) -> StepKv | None:
        with self._lock:
            running = self._tensors.progress.running
            seq = self._scheduler.sequence(request_id)
            chunk = None if running is None else running.chunks.get(request_id)
            if seq is None or running is None or chunk is None:
                return None
            if seq.request is not chunk.request or seq.computed != chunk.start:
                return None  # the step is over, or was for one of this name that has left
            pool, stop = self._scheduler.pool, chunk.start + len(chunk.token_ids)
            blocks = chunk.blocks[: pool.blocks_for(stop)]
            pool.hold(blocks)
            return StepKv(HeldKv(blocks, chunk.start), stop, running.number)

    def layers_done(self, step: int) -> int:
        return self._tensors.progress.layers_done(step)

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        with self._lock:
            return self._scheduler.kv.take_kept(request_id)

    def made(self, request_id: RequestId) -> tuple[int, ...] | None:
        with self._lock:
            seq = self._scheduler.sequence(request_id)
            return None if seq is None else tuple(seq.output_ids)

    def detach(self, request_id: RequestId) -> tuple[HeldKv, tuple[int, ...]] | None:
        """What a step under way makes for it is lost: whoever calls this where ``between_steps``
        tells loses nothing."""
        with self._lock:
            seq = self._engine.detach(request_id)
            if seq is None:
                return None
            return HeldKv(seq.blocks, seq.computed), tuple(seq.output_ids)

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        """``tell`` comes when the step's events have been sent, and before the next step is
        planned, unless that runs already (``ahead``); and when a step with prompts has begun."""
        return self._listen(self._listeners, tell)

    def between_steps(self, tell: Callable[[], None]) -> Callable[[], None]:
        """As ``on_step``, but never within a step that was not planned ahead."""
        return self._listen(self._between, tell)

    def _listen(
        self, listeners: dict[int, Callable[[], None]], tell: Callable[[], None]
    ) -> Callable[[], None]:
        with self._lock:
            number, self._listened = self._listened, self._listened + 1
            listeners[number] = tell

        def end() -> None:
            with self._lock:
                listeners.pop(number, None)

        return end

    def load_figures(self) -> LoadFigures:
        scheduler = self._scheduler
        with self._lock:
            return LoadFigures(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                waiting_tokens=uncomputed_tokens(scheduler),
                free_blocks=scheduler.pool.num_free,
                total_blocks=scheduler.pool.num_blocks,
                prefill_rate=self._rates.prefill_rate,
                step_s=self._rates.step_s,
                urgent=running_urgent(scheduler),
            )

    def close(self) -> None:
        """Nobody comes any more for what was kept."""
        with self._lock:
            self._scheduler.kv.release_kept()

    def _after_step(self) -> None:
        self._call(self._between)
        self._call(self._listeners)

    def _tell(self) -> None:
        self._call(self._listeners)

    def _call(self, those: dict[int, Callable[[], None]]) -> None:
        with self._lock:
            listeners = tuple(those.values())
        for tell in listeners:
            try:
                tell()
            except Exception:  # a listener's fault ends neither the step nor the others
                log.exception("somebody who is told of steps failed")


def spare_blocks(scheduler: Scheduler) -> int:
    """Free blocks that are not lent: what the first one that waits needs to start, and one for each
    request that runs, or will as soon as it can because it has its KV."""
    waiting = tuple(islice(scheduler.sequences, scheduler.num_running, None))
    first = scheduler.kv.blocks_to_start(waiting[0]) if waiting else 0
    return first + scheduler.num_running + sum(bool(seq.blocks or seq.swapped) for seq in waiting)


def uncomputed_tokens(scheduler: Scheduler) -> int:
    """Of prompts, and of what is computed anew after a preemption."""
    seqs = (seq for seq in scheduler.sequences if not seq.generating)
    return sum(seq.uncomputed for seq in seqs)


def running_urgent(scheduler: Scheduler) -> int:
    """How many of the running requests have a priority below 0."""
    running = islice(scheduler.sequences, scheduler.num_running)
    return sum(seq.request.priority < 0 for seq in running)
