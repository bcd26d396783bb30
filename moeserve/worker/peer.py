"""``moeserve peer``: this process, or a rank of several, as a member of a cluster.

It loads, perhaps weights that other members have, opens its server, and takes a lease; SIGTERM
drains: gateways hear of it at once and send nothing new, what runs goes on or moves elsewhere, and
within the drain timeout the member leaves. What still runs then ends here with UNAVAILABLE and goes
on at another member. Should the engine die, the member leaves with status 1.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from moeserve.comm.control.on_loop import on_loop
from moeserve.comm.launch.environment import ALONE, Launch
from moeserve.config.cluster import PeerConfig
from moeserve.config.options import ServeConfig
from moeserve.engine.build import LoadedModel
from moeserve.gateway.routed import RoutedModel
from moeserve.gateway.server import OneProcess, ServedProcess, StopCallback, serve
from moeserve.observe.loading import ProgressCallback
from moeserve.observe.metrics import Metrics
from moeserve.pools.metrics import add_counts
from moeserve.pools.weights.counts import WeightCounts
from moeserve.worker.member import MemberServer
from moeserve.worker.weights import ArrivedWeights, weights_here

log = logging.getLogger("moeserve.worker")

# What opening and closing get, which wait for no request.
SOON_S = 30.0
# How often it is looked whether weights are still wanted, while they come.
LOOK_S = 0.2
# What is known once they have come.
CHOSEN = ("model", "served_model_name")


def run_peer(config: PeerConfig) -> int:
    """A member of one process, until a signal; the exit status."""
    return serve(config, PeerProcess(config, OneProcess(), ALONE))


class PeerProcess:
    """A ``ServedProcess`` around another, which loads; ``launch`` says which rank this is."""

    def __init__(self, config: PeerConfig, inner: ServedProcess, launch: Launch) -> None:
        self._config = config
        self._inner = inner
        self._launch = launch
        self._member: MemberServer | None = None

    def on_stop(self, stop: StopCallback) -> None:
        self._inner.on_stop(stop)

    def stopping(self) -> None:
        if self._member is not None:
            self._member.drain()
        self._inner.stopping()

    async def idle(self) -> None:
        await self._inner.idle()
        if self._member is not None:
            await self._member.idle()

    def load(
        self,
        config: ServeConfig,
        observer: Metrics,
        progress: ProgressCallback,
        loop: asyncio.AbstractEventLoop,
    ) -> LoadedModel | RoutedModel:
        counts = WeightCounts()
        arrived = self._weights(counts, progress, loop)
        try:
            chosen = {name: getattr(arrived.config, name) for name in CHOSEN}
            loaded = self._inner.load(config.model_copy(update=chosen), observer, progress, loop)
        except BaseException:
            arrived.close()
            raise
        return self._as_member(loaded, arrived, counts, observer, loop)

    def _weights(
        self, counts: WeightCounts, progress: ProgressCallback, loop: asyncio.AbstractEventLoop
    ) -> ArrivedWeights:
        """They are here; ``progress`` may raise to stop that."""
        arriving = asyncio.run_coroutine_threadsafe(weights_here(self._config, counts), loop)
        try:
            while True:
                try:
                    return arriving.result(LOOK_S)
                except TimeoutError:
                    if arriving.done():
                        raise
                    progress(0, 1)
        finally:
            arriving.cancel()

    def _as_member(
        self,
        loaded: LoadedModel | RoutedModel,
        arrived: ArrivedWeights,
        counts: WeightCounts,
        observer: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> LoadedModel:
        assert isinstance(loaded, LoadedModel), "a member runs its model"

        async def open_member() -> MemberServer:
            member = self._member = MemberServer(
                self._config, loaded, self._launch, counts, observer.spans
            )
            opened = await member.open()
            for part in member.counts:
                add_counts(observer.parts, part)
            print(f"ready: {opened.instance} {opened.role} at {opened.address}", flush=True)
            return member

        try:
            member = on_loop(loop, open_member, SOON_S)
        except BaseException:
            loaded.close()
            arrived.close()
            raise

        def close() -> None:
            on_loop(loop, member.close, SOON_S)
            loaded.on_close()
            arrived.close()

        def before_stop() -> None:
            on_loop(loop, member.end_arrivals, SOON_S)

        return replace(loaded, before_stop=before_stop, on_close=close)
