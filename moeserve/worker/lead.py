"""Rank 0 of several: opens the doors at once, and serves when all ranks have loaded."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Self

from moeserve.comm.control import channels as control
from moeserve.comm.control.channels import Leader
from moeserve.config.options import ServeConfig
from moeserve.engine.build import LoadedModel
from moeserve.errors import MoeserveError
from moeserve.gateway.server import ProgressCallback, StopCallback, load_model, serve
from moeserve.observe.metrics import Metrics
from moeserve.worker.failure import FailurePolicy
from moeserve.worker.load_progress import LoadProgress
from moeserve.worker.start import (
    RankStart,
    ep_context,
    giving_up,
    meet,
    progress_of,
    threads_of,
    trust_of,
)


def lead(config: ServeConfig, start: RankStart) -> int:
    """Serves until a signal, or until a rank is lost; the exit status."""
    with LeadingRank(config, start) as rank, rank.progress:
        status = serve(config, rank.load, rank.on_stop)
    return 1 if rank.failure.error is not None else status


class LeadingRank:
    """Owns the channel to the other ranks, from when they meet until the run is over.

    Left with an error of ours, it tells the others, who end as well.
    """

    def __init__(self, config: ServeConfig, start: RankStart) -> None:
        self.progress = progress_of(config, 0)
        self.failure = FailurePolicy(config.ep_deadline)
        self._start = start
        self._leader: Leader | None = None
        self._stop: StopCallback | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._leader is None:
            return
        if isinstance(error, MoeserveError):
            self._leader.fail(error)
        self._leader.close(error is None)

    def on_stop(self, stop: StopCallback) -> None:
        """``stop`` ends the run as a signal does; another rank that gets one asks for it."""
        self._stop = stop

    def load(
        self, config: ServeConfig, observer: Metrics, listener: ProgressCallback
    ) -> LoadedModel:
        """A ``gateway.server.LoadModel``: what is served over all ranks, when all have loaded."""
        loading = LoadProgress(listener)
        # 1. Meet the others, while whoever waits may be interrupted by the doors.
        start = self._start
        alarm = start.alarm
        met = meet(config, replace(start, alarm=lambda: loading.checked(alarm)))
        # 2. Connect to each of them: from here on the heartbeats tell who is there.
        with giving_up(met.group):
            leader = control.lead(met.group, met.address, trust_of(config), config.ep_deadline)
        self._leader = leader
        leader.heartbeat.subscribe(self.failure.decide, self._asked_to_stop)
        leader.heartbeat.activity = "loading the model".__str__
        loading.alarm = leader.alarm
        # 3. Load this rank's share, as they load theirs.
        context = ep_context(config, met, lambda: loading.checked(leader.alarm), self.progress)
        options = config.model_copy(update={"threads": threads_of(config, met)})
        loaded = load_model(options, observer, loading, context, leader)
        # 4. All have loaded.
        context.group.all_gather("ready", b"")
        loading.over = True
        leader.heartbeat.activity = self.progress.__str__
        return loaded

    def _asked_to_stop(self) -> None:
        assert self._stop is not None, "serve gives the callback before it loads"
        self._stop()
