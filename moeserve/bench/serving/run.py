"""Sends each request when it is due.

An open loop: a request that is due is sent whatever is outstanding, so that a slow server meets the
load it was to meet. With ``most_outstanding`` requests wait for one to end first; the wait is then
no lateness of ours. Each request has ``timeout_s``, so that a run ends at the latest that long
after the last one was sent. How late each was sent is in its outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from moeserve.bench.serving.outcomes import AnswerRecord, Outcome, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.targets import Prepared, ServingTarget


@dataclass(frozen=True, slots=True)
class RunOptions:
    """``most_outstanding`` None is an open loop."""

    timeout_s: float
    most_outstanding: int | None = None


class LoadRun(Generic[Prepared]):
    """One run against ``target``; ``sent``, ``ended``, ``failed`` and ``tokens`` say how far it is,
    ``told`` is called with every outcome."""

    def __init__(
        self,
        target: ServingTarget[Prepared],
        options: RunOptions,
        told: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self.sent = self.ended = self.failed = self.tokens = 0
        self._target = target
        self._options = options
        self._told = told
        self._outcomes: list[Outcome] = []

    async def drive(self, requests: Sequence[PlannedRequest]) -> tuple[Outcome, ...]:
        """Ends when the last answer has; outcomes are in the order of ``requests``, which is that
        of their times."""
        loop = asyncio.get_running_loop()
        most = self._options.most_outstanding
        places = asyncio.Semaphore(len(requests) or 1 if most is None else most)
        self._start = free = loop.time()
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                prepared = self._target.prepare(request)
                due = self._start + request.at_s
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                if places.locked():
                    await places.acquire()
                    free = loop.time()
                else:
                    await places.acquire()
                ready = max(due, free)
                group.create_task(self._one(index, request, prepared, ready, places))
                await asyncio.sleep(0)  # so that it is sent before the next is prepared
        return tuple(sorted(self._outcomes, key=lambda outcome: outcome.index))

    async def _one(
        self,
        index: int,
        request: PlannedRequest,
        prepared: Prepared,
        ready: float,
        places: asyncio.Semaphore,
    ) -> None:
        loop = asyncio.get_running_loop()
        record = AnswerRecord()
        failed: RequestFailed | None = None
        sent = loop.time()
        self.sent += 1
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._target.send(prepared, record)
            record.complete()
        except TimeoutError:
            failed = RequestFailed("timeout", f"no whole answer in {self._options.timeout_s:g} s")
        except RequestFailed as error:
            failed = error
        finally:
            places.release()
        times = (ready, sent, loop.time())
        outcome = record.outcome(index, request, times, start=self._start, failed=failed)
        self.ended += 1
        self.failed += not outcome.ok
        self.tokens += outcome.output_tokens
        self._outcomes.append(outcome)
        self._told(outcome)
