"""Brings what registries tell into a view of the cluster.

Each of several registries is followed by itself (``Registry.parts``). One that is away is tried
again every ``RETRY_S``, and the view keeps what it knows from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from moeserve.errors import MoeserveError
from moeserve.pools.registry.base import EVERYTHING, Interest, Registry
from moeserve.pools.registry.heartbeat import log_failure
from moeserve.pools.registry.view import ClusterView

log = logging.getLogger(__name__)

RETRY_S = 0.5
TICK_S = 0.2


class Follower:
    """From ``start`` to ``close``. ``lost`` counts how often a registry was lost or not reached."""

    def __init__(self, registry: Registry, view: ClusterView, interest: Interest = EVERYTHING):
        self._parts = registry.parts()
        self._view = view
        self._interest = interest
        self._heard: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.lost = 0

    def start(self) -> None:
        assert not self._tasks, "it follows already"
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._follow(i)) for i in range(len(self._parts))]
        self._tasks.append(loop.create_task(self._tick()))
        for task in self._tasks:
            task.add_done_callback(log_failure)

    @property
    def connected(self) -> int:
        """Registries that tell us of changes now."""
        return len(self._heard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _follow(self, source: int) -> None:
        while True:
            try:
                async with contextlib.aclosing(self._parts[source].watch(self._interest)) as news:
                    async for changes in news:
                        self._heard.add(source)
                        self._view.apply(source, changes)
            except MoeserveError as error:
                if source in self._heard or not self.lost:
                    log.warning("members are not told of for now: %s", error.message)
                self.lost += 1
            finally:
                self._heard.discard(source)
            await asyncio.sleep(RETRY_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._view.tick()
