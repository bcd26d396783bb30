"""Re-planning by itself, on rank 0: every so often ask all ranks what they counted, have a plan
solved for it (``placement.aside``, in a process of low priority), and propose it where it pays
(``candidates``, ``benefit``).
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

from moeserve.engine.replan.benefit import (
    Conditions,
    MoveCost,
    ReplanDecision,
    ReplanPolicy,
    StepSample,
    fit,
)
from moeserve.engine.replan.candidates import Prices, Solve, consider
from moeserve.engine.replan.coordinator import PlanCoordinator
from moeserve.engine.replan.routing_counts import read_routing
from moeserve.errors import MoeserveError

LEAST_TOKENS = 256
KEPT_STEPS = 1024


class StepHistory:
    """The measured steps of the recent past: ``record`` is for the thread that runs them,
    ``steps`` for any."""

    def __init__(self, kept: int = KEPT_STEPS) -> None:
        self._lock = threading.Lock()
        self._steps: deque[StepSample] = deque(maxlen=kept)

    def record(self, step: StepSample) -> None:
        with self._lock:
            self._steps.append(step)

    @property
    def steps(self) -> list[StepSample]:
        with self._lock:
            return list(self._steps)


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
    """``start`` it; ``consider`` is one round. ``history`` is to get every step of all ranks;
    ``decisions`` are kept for the log and tests."""

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
        self.history = history
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
            except (MoeserveError, OSError, ValueError) as error:
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
        steps = self.history.steps
        per_step = sum(s.tokens for s in steps) / max(1, len(steps))
        found, candidate = consider(
            self._policy,
            Conditions(self._clock(), self._changed_s, tokens / max(1e-9, elapsed_s), per_step),
            Prices(fit(steps), settings.expert_bytes, self._moving(steps)),
            plan,
            topk_TLK,
            self._solve,
        )
        if found.apply:
            coordinator.propose(candidate)
            self._changed_s = self._clock()
        return found

    def _ask(self) -> tuple[NDArray[np.int32], int, float]:
        """The ranks' samples, how many tokens they computed, and in how many seconds."""
        plan, top_k = self._coordinator.plan, self._settings.top_k
        counts = self._coordinator.ask(self._settings.answer_s)
        now_s = self._clock()
        elapsed_s, self._asked_s = now_s - self._asked_s, now_s
        found = [
            read_routing(counts[rank], plan.num_layers, plan.num_experts, top_k)
            for rank in sorted(counts)
        ]
        return np.concatenate([r.topk_TLK for r in found]), sum(r.tokens for r in found), elapsed_s

    def _moving(self, steps: Sequence[StepSample]) -> MoveCost:
        """As the last change measured it; before the first, reading as at the start, and a pause as
        long as a step."""
        for change in reversed(self._coordinator.changes):
            if change.switched and change.prepare_s > 0:
                rate = change.bytes_read / change.prepare_s or self._settings.read_bytes_per_s
                return MoveCost(rate, change.paused_s / change.switched)
        mean_s = sum(s.seconds for s in steps) / max(1, len(steps))
        return MoveCost(self._settings.read_bytes_per_s, mean_s)
