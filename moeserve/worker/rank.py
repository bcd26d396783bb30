"""One rank of several, from meeting the others until the run is over.

All ranks are alike: each loads its share, schedules the requests that doors give it, and takes part
in every step. Rank 0, or with ``doors`` "all" each of them, also opens doors to clients; a rank
without them runs the same server with none open. A signal to stop, at whichever rank, is passed on:
all drain, and the run ends when the last has.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from moeserve.comm.control.mesh import open_mesh
from moeserve.comm.control.rpc import require_trust
from moeserve.comm.control.step_mesh import StepMesh
from moeserve.comm.launch.environment import Launch
from moeserve.config.cluster import PeerConfig
from moeserve.config.options import LogOptions, ServeConfig
from moeserve.engine.build import LoadedModel
from moeserve.engine.ranks.build import build_rank
from moeserve.engine.ranks.meeting import RankMeeting
from moeserve.engine.ranks.records import RECORD_BYTES
from moeserve.errors import MoeserveError
from moeserve.gateway.server import ServedProcess, StopCallback, serve
from moeserve.observe.loading import ProgressCallback
from moeserve.observe.logs import configure_log
from moeserve.observe.metrics import Metrics
from moeserve.worker.failure import FailurePolicy
from moeserve.worker.load_progress import LoadProgress
from moeserve.worker.peer import PeerProcess
from moeserve.worker.start import (
    RankStart,
    ep_context,
    giving_up,
    meet,
    progress_of,
    threads_of,
    trust_of,
)

log = logging.getLogger("moeserve.worker")

# How often what this rank is doing is told to its neighbours.
ACTIVITY_S = 0.2


def run_rank(config: ServeConfig, start: RankStart) -> int:
    """Serves until a signal, or until a rank is lost; the exit status."""
    with RankProcess(config, start) as rank, rank.progress:
        process: ServedProcess = rank
        if isinstance(config, PeerConfig):
            process = PeerProcess(config, rank, start.launch)
        status = serve(doors_of(config, start.launch), process)
    return 1 if rank.failure.error is not None else status


def doors_of(config: ServeConfig, launch: Launch) -> ServeConfig:
    """What this rank opens: on one host, ports follow one another as its ranks do."""
    if launch.rank != 0 and config.doors != "all":
        return config.model_copy(update={"grpc_port": None, "http_port": None})
    ports = {"grpc_port": config.grpc_port, "http_port": config.http_port}
    moved = {name: port + launch.local_rank for name, port in ports.items() if port}
    return config.model_copy(update=moved)


def configure_rank_log(options: LogOptions, launch: Launch) -> None:
    """Lines name the rank, unless they are text and who started it does so."""
    named = launch.launcher == "moeserve" and options.log_format == "text"
    configure_log(options.log_level, options.log_format, None if named else launch.rank)


class RankProcess:
    """A ``gateway.server.ServedProcess``. Owns the mesh from when ranks meet until the run is over.

    Left with an error of ours, it tells the others, who end as well.
    """

    def __init__(self, config: ServeConfig, start: RankStart) -> None:
        if start.launch.rank:
            configure_rank_log(config, start.launch)
        self.progress = progress_of(config, start.launch.rank)
        self.failure = FailurePolicy(config.ep_deadline)
        self._start = start
        self._mesh: StepMesh | None = None
        self._stop: StopCallback | None = None
        self._left = threading.Event()
        self._steps: Callable[[], int] = lambda: 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mesh is None:
            return
        self._left.set()
        if isinstance(error, MoeserveError):
            ranks = getattr(error, "ranks", (self._mesh.rank,))
            self._mesh.fail(f"rank {self._mesh.rank} failed: {error.message}", ranks)
        elif error is None:
            log.info("the run ended after %d steps", self._steps())
            self._mesh.end()
        self._mesh.close()

    def on_stop(self, stop: StopCallback) -> None:
        """``stop`` ends this rank's serving as a signal does."""
        self._stop = stop

    def stopping(self) -> None:
        """This rank was told to stop: so are the others."""
        if self._mesh is not None:
            self._mesh.ask_to_stop()

    async def idle(self) -> None: ...

    def load(
        self,
        config: ServeConfig,
        observer: Metrics,
        listener: ProgressCallback,
        loop: asyncio.AbstractEventLoop,
    ) -> LoadedModel:
        """This rank of all, when all have loaded."""
        loading = LoadProgress(listener)
        # 1. Meet the others, while whoever waits may be interrupted by the doors.
        start, trust = self._start, trust_of(config)
        met = meet(config, replace(start, alarm=lambda: loading.checked(start.alarm)))
        # 2. Connect: from here on the heartbeats tell who is there.
        with giving_up(met.group):
            require_trust(met.address, trust)
            mesh = open_mesh(
                met.group, RECORD_BYTES, config.ep_deadline,
                address=met.address, secret=trust.secret,
            )  # fmt: skip
        self._mesh = mesh
        mesh.subscribe(self.failure.decide, self._asked_to_stop)
        loading.alarm = mesh.alarm
        # 3. Load this rank's share, as the others load theirs.
        context = ep_context(config, met, lambda: loading.checked(mesh.alarm), self.progress)
        options = config.model_copy(update={"threads": threads_of(config, met)})
        mesh.set_activity("loading the model")
        loaded = build_rank(
            options,
            context=context,
            mesh=mesh,
            meeting=RankMeeting(loop, context.group, met.address, trust, mesh.alarm),
            observer=observer,
            spans=observer.spans,
            progress=loading,
            doors=tuple(range(met.group.world)) if config.doors == "all" else (0,),
        )
        # 4. All have loaded.
        context.group.all_gather("ready", b"")
        loading.over = True
        self._steps = lambda: loaded.engine.counters.steps
        threading.Thread(target=self._tell_activity, name="moeserve-activity", daemon=True).start()
        return loaded

    def _tell_activity(self) -> None:
        """To the neighbours, what the step loop is doing, until the mesh is closed."""
        assert self._mesh is not None
        while not self._left.wait(ACTIVITY_S):
            self._mesh.set_activity(str(self.progress))

    def _asked_to_stop(self) -> None:
        assert self._stop is not None, "serve gives the callback before it loads"
        self._stop()
