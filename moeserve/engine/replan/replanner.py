"""Re-planning by itself, on rank 0: every so often ask all ranks what they counted, have a plan
solved for it (``placement.aside``, in a process of low priority), and propose it where ``benefit``
says that it pays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.comm.dispatcher import DispatchStats
from moeserve.core import FinishReason, StepPlan, Timing
from moeserve.engine.loop import EngineObserver
from moeserve.engine.replan.benefit import (
    Conditions,
    MoveCost,
    ReplanDecision,
    ReplanPolicy,
    StepSample,
    bytes_to_read,
    decide,
    fit,
    layers_that_differ,
    plan_load,
)
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.routing_counts import sample_of
from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan

LEAST_TOKENS = 256
KEPT_STEPS = 1024

Solve = Callable[[Plan, NDArray[np.int32]], Plan]


class StepHistory:
    """An engine observer that keeps the measured steps and passes everything on. ``work`` is
    ``DistributedExecutor.work``, counted up by every step."""

    def __init__(self, inner: EngineObserver, work: Sequence[DispatchStats]) -> None:
        self.steps: deque[StepSample] = deque(maxlen=KEPT_STEPS)
        self._inner = inner
        self._work = work
        self._before_D = came_D(work)

    def on_step(self, plan: StepPlan, seconds: float) -> None:
        now_D = came_D(self._work)
        new_D, self._before_D = now_D - self._before_D, now_D
        self.steps.append(
            StepSample(seconds, plan.num_tokens, int(new_D.sum()), int(new_D.max(initial=0)))
        )
        self._inner.on_step(plan, seconds)

    def on_first_token(self, timing: Timing) -> None:
        self._inner.on_first_token(timing)

    def on_token(self, seconds: float) -> None:
        self._inner.on_token(seconds)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None:
        self._inner.on_finish(reason, timing)


def came_D(work: Sequence[DispatchStats]) -> NDArray[np.int64]:
    """Copies that came to each rank from the others."""
    came: NDArray[np.int64] = np.array([stats.copies_R for stats in work], np.int64).sum(axis=0)
    return came


@dataclass(frozen=True, slots=True)
class ReplanSettings:
    """How often it looks, how long it waits for ranks to answer, and how large experts are.

    ``read_bytes_per_s`` is what reading was measured at when ranks started, all together;
    ``horizon_tokens`` tells the solver for how many tokens a move should pay.
    """

    expert_bytes: int
    read_bytes_per_s: float
    top_k: int
    every_s: float = 60.0
    answer_s: float = 30.0
    horizon_tokens: int = 1_000_000


class Replanner:
    """``start`` it; ``consider`` is one round. ``decisions`` are kept for the log and tests."""

    def __init__(
        self,
        coordinator: PlanCoordinator,
        history: StepHistory,
        settings: ReplanSettings,
        solve: Solve,
        policy: ReplanPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decisions: deque[ReplanDecision] = deque(maxlen=64)
        self._coordinator = coordinator
        self._history = history
        self._settings = settings
        self._solve = solve
        self._policy = policy or ReplanPolicy()
        self._clock = clock
        self._asked_s = clock()
        self._changed_s: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replan", daemon=True)
        self._log = logging.getLogger("moeserve.plan")

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def consider(self) -> ReplanDecision:
        """Look once, and propose if it pays."""
        found = self._consider()
        self.decisions.append(found)
        self._log.info("re-planning: %s", found.why)
        return found

    def _run(self) -> None:
        while not self._stop.wait(self._settings.every_s):
            try:
                self.consider()
            except (PlacementError, OSError, ValueError) as error:
                self._log.warning("re-planning: %s", error)

    def _consider(self) -> ReplanDecision:
        coordinator, settings = self._coordinator, self._settings
        if coordinator.changing:
            return ReplanDecision(False, "a change is under way")
        topk_TLK, tokens, elapsed_s = self._ask()
        if len(topk_TLK) < LEAST_TOKENS:
            return ReplanDecision(
                False, f"{len(topk_TLK)} tokens were sampled, {LEAST_TOKENS} are few"
            )
        plan = coordinator.plan
        candidate = self._solve(plan, topk_TLK[::2])
        steps = list(self._history.steps)
        per_step = sum(s.tokens for s in steps) / max(1, len(steps))
        batch = max(1, round(per_step / plan.num_devices))
        judged = topk_TLK[1::2]
        read = bytes_to_read(plan, candidate, settings.expert_bytes)
        moves = read, layers_that_differ(plan, candidate)
        found = decide(
            self._policy,
            Conditions(self._clock(), self._changed_s, tokens / max(1e-9, elapsed_s), per_step),
            fit(steps),
            (plan_load(plan, judged, batch), plan_load(candidate, judged, batch)),
            moves,
            self._moving(steps),
        )
        if found.apply:
            coordinator.propose(candidate)
            self._changed_s = self._clock()
        return found

    def _ask(self) -> tuple[NDArray[np.int32], int, float]:
        """The ranks' samples, how many tokens they computed, and in how many seconds."""
        plan = self._coordinator.plan
        self._coordinator.ask()
        ends = time.monotonic() + self._settings.answer_s
        while len(counts := self._coordinator.counts) < plan.num_devices:
            if self._stop.is_set() or time.monotonic() > ends:
                break
            time.sleep(0.02)
        now_s = self._clock()
        elapsed_s, self._asked_s = now_s - self._asked_s, now_s
        layers, top_k = plan.num_layers, self._settings.top_k
        samples = [sample_of(counts[rank], layers, top_k) for rank in sorted(counts)]
        topk_TLK = np.concatenate([np.empty((0, layers, top_k), np.int32), *samples])
        return topk_TLK, sum(int(c["tokens"]) for c in counts.values()), elapsed_s

    def _moving(self, steps: Sequence[StepSample]) -> MoveCost:
        """As the last change measured it; before the first, reading as at the start, and a pause as
        long as a step."""
        for change in reversed(self._coordinator.changes):
            if change.switched and change.prepare_s > 0:
                rate = change.bytes_read / change.prepare_s or self._settings.read_bytes_per_s
                return MoveCost(rate, change.paused_s / change.switched)
        mean_s = sum(s.seconds for s in steps) / max(1, len(steps))
        return MoveCost(self._settings.read_bytes_per_s, mean_s)
