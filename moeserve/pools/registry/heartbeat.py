"""Keeps a member in a registry, with its newest load, for as long as the member lives.

Each of several registries is beaten into by itself (``Registry.parts``), less often where it says
so. One that is away is tried again with every beat, and one that has forgotten the member is joined
anew, at once. Time is the event loop's, which is monotonic.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from moeserve.errors import MoeserveError, NotFoundError
from moeserve.pools.members import Member, MemberLoad, Report, check_member
from moeserve.pools.registry.base import CALL_S, HEARTBEAT_S, Registry

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeartbeatCounts:
    """Over all registries: beats that were taken, that failed, and how often one was joined."""

    taken: int = 0
    failed: int = 0
    joined: int = 0


class Heartbeat:
    """``load`` is asked on the event loop, before each beat; its ``sequence`` is filled in here.
    InvalidRequestError where ``member`` is none (``members.check_member``)."""

    def __init__(
        self,
        registry: Registry,
        member: Member,
        load: Callable[[], MemberLoad],
        period_s: float = HEARTBEAT_S,
    ) -> None:
        check_member(member)
        self._beats = [_Beat(part) for part in registry.parts()]
        self._member = member
        self._load = load
        self._period_s = period_s
        self._sequence = 0
        self._joined = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.counts = HeartbeatCounts()

    def start(self) -> None:
        assert not self._tasks, "it beats already"
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(beat)) for beat in self._beats]
        for task in self._tasks:
            task.add_done_callback(log_failure)

    @property
    def error(self) -> MoeserveError | None:
        """Why the last beat into some registry failed; None where none did."""
        return next((beat.error for beat in self._beats if beat.error is not None), None)

    async def wait_joined(self, timeout_s: float) -> bool:
        """Until it has been in one registry."""
        try:
            await asyncio.wait_for(self._joined.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def beat_now(self) -> None:
        """The load has changed in a way that others should know at once."""
        for beat in self._beats:
            beat.due.set()

    async def close(self) -> None:
        """Stops beating and leaves; a registry that does not answer lets the lease run out."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(self._leave(beat.registry) for beat in self._beats))

    async def _run(self, beat: _Beat) -> None:
        loop = asyncio.get_running_loop()
        while True:
            beat.due.clear()
            began = loop.time()
            await self._beat(beat)
            period_s = max(self._period_s, beat.registry.beat_s)
            rest_s = began + period_s - loop.time()
            try:
                await asyncio.wait_for(beat.due.wait(), max(0.0, rest_s))
            except TimeoutError:
                continue

    async def _beat(self, beat: _Beat) -> None:
        try:
            if beat.joined:
                try:
                    await beat.registry.renew(self._report())
                except NotFoundError:
                    beat.joined = False
            if not beat.joined:
                await beat.registry.join(self._report())
                self.counts.joined += 1
        except MoeserveError as error:
            if beat.error is None:
                log.warning("member %s: %s", self._member.id, error.message)
            beat.error = error
            self.counts.failed += 1
            return
        if beat.error is not None:
            log.info("member %s: in the registry again", self._member.id)
        beat.joined, beat.error = True, None
        self.counts.taken += 1
        self._joined.set()

    async def _leave(self, registry: Registry) -> None:
        try:
            await asyncio.wait_for(registry.leave(self._member.id), 2 * CALL_S)
        except (MoeserveError, TimeoutError) as error:
            log.info("member %s leaves without saying so: %s", self._member.id, error)

    def _report(self) -> Report:
        self._sequence += 1
        return Report(self._member, replace(self._load(), sequence=self._sequence))


def log_failure(task: asyncio.Task[None]) -> None:
    """A task that should have gone on was ended by a bug: nobody waits for it, so say so."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("members are not told of any more", exc_info=error)


class _Beat:
    """One registry, and whether the member is in it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.joined = False
        self.error: MoeserveError | None = None
        self.due = asyncio.Event()
