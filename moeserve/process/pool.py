"""A few worker processes for jobs that may take any time and memory.

Bounded in workers, in jobs and bytes that wait, and in the time of a job; the memory of one is
bounded on the worker's side. A worker that is late, or fails otherwise than with an error of the
job's own, is killed and a new one started when it is needed. One that has grown is replaced, so
that memory is given back. Whoever gives up on a job leaves it to end by itself, so that giving up
costs the server no worker. All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from moeserve.errors import DeadlineError, ExhaustedError, InternalError, UnavailableError
from moeserve.process.frames import Head
from moeserve.process.job_worker import JobWorker, WorkerProgram, raise_failed, too_long

log = logging.getLogger(__name__)

Reply = tuple[dict[str, Any], bytes]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """``jobs`` and ``job_bytes`` count what waits and runs. Seconds: ``start_s`` until a worker is
    ready, ``wait_s`` for a free one, ``job_s`` for a job on it. A worker that holds ``grown_bytes``
    more than at its start is replaced, and one without a job for ``idle_s`` ended."""

    workers: int
    jobs: int
    job_bytes: int
    job_s: float
    start_s: float = 60.0
    wait_s: float = 60.0
    grown_bytes: int = 64 << 20
    idle_s: float = 60.0


@dataclass(slots=True)
class PoolCounts:
    """Since the start; ``killed`` counts workers that failed or were late."""

    started: int = 0
    done: int = 0
    failed: int = 0
    refused: int = 0
    killed: int = 0
    replaced: int = 0


class WorkerPool:
    """Owns the workers of one program."""

    def __init__(self, program: WorkerProgram, limits: PoolLimits) -> None:
        self.counts = PoolCounts()
        self._program = program
        self._limits = limits
        self._free = asyncio.Semaphore(limits.workers)
        self._idle: list[JobWorker] = []
        self._timers: dict[JobWorker, asyncio.TimerHandle] = {}
        self._workers: set[JobWorker] = set()
        self._running: set[asyncio.Task[Reply]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._jobs = 0
        self._bytes = 0
        self._closed = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers there are."""
        return tuple(sorted(worker.pid for worker in self._workers))

    @property
    def jobs(self) -> int:
        """That wait or run."""
        return self._jobs

    async def ask(self, head: Head, payload: bytes = b"") -> Reply:
        """One job: what its handler raised, ExhaustedError where there is no room for it,
        DeadlineError where it takes too long."""
        limits = self._limits
        if self._closed:
            raise UnavailableError("the server stops: send the request elsewhere")
        if self._jobs >= limits.jobs or self._bytes + len(payload) > limits.job_bytes:
            self.counts.refused += 1
            raise ExhaustedError(
                f"{self._program.name}: {self._jobs} texts of {self._bytes} bytes wait already: "
                "try again shortly"
            )
        self._jobs += 1
        self._bytes += len(payload)
        task = asyncio.create_task(self._job(head, payload))
        self._running.add(task)
        task.add_done_callback(self._job_ended)
        return await asyncio.shield(task)

    async def warm(self) -> None:
        """One worker is ready before it is needed; a failure is left to the first job."""
        async with self._free:
            if not self._idle and not self._closed:
                with contextlib.suppress(Exception):
                    self._keep(await self._start())

    async def close(self) -> None:
        """Ends all workers, and jobs with UnavailableError; may be called again."""
        self._closed = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._idle.clear()
        for worker in tuple(self._workers):
            self._drop(worker)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _job(self, head: Head, payload: bytes) -> Reply:
        try:
            return await self._on_a_worker(head, payload)
        except asyncio.CancelledError:
            raise UnavailableError("the server stops: send the request elsewhere") from None
        finally:
            self._jobs -= 1
            self._bytes -= len(payload)

    async def _on_a_worker(self, head: Head, payload: bytes) -> Reply:
        limits, name = self._limits, self._program.name
        try:
            async with asyncio.timeout(limits.wait_s):
                await self._free.acquire()
        except TimeoutError as late:
            self.counts.refused += 1
            raise DeadlineError(f"{name}: no process was free within {limits.wait_s:g} s") from late
        worker, sound = None, False
        try:
            worker = self._pick() or await self._start()
            try:
                async with asyncio.timeout(limits.job_s):
                    reply, content = await worker.ask(head, payload)
            except TimeoutError as late:
                raise too_long(name) from late
            sound = not reply.get("out_of_memory")
            self._check(reply)
            return reply, content
        finally:
            if worker is not None and sound:
                self._keep(worker)
            elif worker is not None:
                self.counts.killed += 1
                self._drop(worker)
            self._free.release()

    def _check(self, reply: dict[str, Any]) -> None:
        try:
            raise_failed(self._program.name, reply)
        except InternalError as bug:
            log.error("%s", bug.message)
            raise
        self.counts.done += 1

    def _pick(self) -> JobWorker | None:
        """An idle worker that still lives, the last used first."""
        while self._idle:
            worker = self._idle.pop()
            self._timers.pop(worker).cancel()
            if worker.process.alive:
                return worker
            self._drop(worker)
        return None

    async def _start(self) -> JobWorker:
        """A new worker that is ready; what its ``prepare`` raised where it is not."""
        name = self._program.name
        worker = await self._launch()
        self._workers.add(worker)
        self.counts.started += 1
        try:
            async with asyncio.timeout(self._limits.start_s):
                said, _ = await worker.receive()
            raise_failed(name, said)
        except TimeoutError as late:
            self._drop(worker)
            raise too_long(f"{name}: starting") from late
        except BaseException:
            self._drop(worker)
            raise
        return worker

    async def _launch(self) -> JobWorker:
        """Its process, which is there also where whoever waits for it gives up: then it ends."""
        launching = asyncio.ensure_future(asyncio.to_thread(self._program.start))
        try:
            return JobWorker(*await asyncio.shield(launching))
        except asyncio.CancelledError:
            self._drop(JobWorker(*await launching))
            raise

    def _keep(self, worker: JobWorker) -> None:
        if worker.rss > worker.ready_rss + self._limits.grown_bytes or self._closed:
            self.counts.replaced += 1
            self._drop(worker)
            return
        self._idle.append(worker)
        loop = asyncio.get_running_loop()
        self._timers[worker] = loop.call_later(self._limits.idle_s, self._rest, worker)

    def _rest(self, worker: JobWorker) -> None:
        del self._timers[worker]
        self._idle.remove(worker)
        self._drop(worker)

    def _drop(self, worker: JobWorker) -> None:
        """Kills it; a thread waits until the kernel has taken it away."""
        task = asyncio.get_running_loop().create_task(self._end(worker))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, worker: JobWorker) -> None:
        await asyncio.to_thread(worker.end)
        self._workers.discard(worker)

    def _job_ended(self, task: asyncio.Task[Reply]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.counts.failed += 1
