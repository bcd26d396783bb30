"""The exchange over torch.distributed: ``all_to_all`` with uneven splits, after one of the sizes.

Every lane has a process group of its own, so that lanes need no common order: the bytes of a round
are on their way as soon as its sizes are known, which any call of this exchange looks for.

gloo does not say who is late: see ``stragglers``, whose reports have a group of their own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllToAllOptions, PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

from moeserve.comm.exchange.backend import ExchangeBackend, LaneAreas, padded
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.stragglers import LEAVING, REPORT_AFTER, StragglerDetector
from moeserve.comm.group import Group

# Reports come when something is wrong, so never in most runs.
_NEVER = timedelta(hours=24)
# Our own deadlines end waits; this many of them bound what nobody waits for any more, and seconds
# the time in which connections are made.
_LEFT_ALONE = 4
_CONNECTING_S = 120.0
_NO_TAG = (1 << 31) - 1
# How long a report may take that has been sent already.
_GRACE_S = 0.2


class _LaneState:
    """One process group and the round in it."""

    def __init__(self, pg: Any, world: int) -> None:
        self.pg = pg
        self.areas = LaneAreas(torch.device("cpu"))
        self.outgoing = torch.empty(0, dtype=torch.uint8)
        self.sizes_R = torch.zeros(world, dtype=torch.int64)
        self.lengths_R = torch.zeros(world, dtype=torch.int64)
        self.work: Work | None = None
        self.sending = False

    def start(self, sizes_R: Sequence[int]) -> None:
        """Send the sizes."""
        self.outgoing = self.areas.outgoing(sizes_R)
        self.sizes_R.copy_(torch.tensor(sizes_R))
        self.sending = False
        self.work = self.pg.alltoall_base(self.lengths_R, self.sizes_R, [], [], AllToAllOptions())

    def advance(self, wait_s: float) -> bool:
        """Send the bytes once the sizes have come; whether all is there. RuntimeError if a
        connection broke."""
        if not self._done(wait_s):
            return False
        if self.sending:
            return True
        mine, theirs = self.sizes_R.tolist(), self.lengths_R.tolist()
        out, come = [padded(n) for n in mine], [padded(n) for n in theirs]
        self.work = self.pg.alltoall_base(
            self.areas.incoming(theirs), self.outgoing, come, out, AllToAllOptions()
        )
        self.sending = True
        return self._done(wait_s)

    def _done(self, wait_s: float) -> bool:
        assert self.work is not None
        return gloo_done(self.work, wait_s)


class TorchExchange(ExchangeBackend):
    """Collective: all ranks of the group build theirs at the same time.

    ``address`` is of the interface that peers reach; by default what the host's name means, or
    ``GLOO_SOCKET_IFNAME``.
    """

    name = "torch"

    def __init__(
        self, group: Group, lanes: Lanes, key: str = "torch", address: str | None = None
    ) -> None:
        super().__init__(group, lanes)
        group.all_gather(f"{key}/ready", b"")

        def pg(name: str, timeout: timedelta) -> Any:
            return connect(PrefixStore(f"{key}/{name}", group.store), group, address, timeout)

        bound = timedelta(seconds=max(_LEFT_ALONE * lanes.deadline_s, _CONNECTING_S))
        self._lane_L = [
            _LaneState(pg(str(lane), bound), group.world) for lane in range(len(lanes.bytes_L))
        ]
        self._reports = ReportChannel(
            pg("reports", _NEVER), StragglerDetector(group.rank, group.world, len(lanes.bytes_L))
        )
        self._receives = self._reported = 0

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        self._advance(lane)
        return self._lane_L[lane].areas.reserve(sizes_R)

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._lane_L[lane].start(sizes_R)
        self._count_sent(sizes_R)
        self._advance(lane)

    def receive(self, lane: int) -> list[Tensor]:
        self._advance(lane)
        state = self._lane_L[lane]
        self._receives += 1
        self._wait(lane, self._advance_or_wait, lambda: self._reports.missing_ranks(self._receives))
        return state.areas.segments()

    def _advance_or_wait(self, lane: int, slice_s: float, waited_s: float) -> bool:
        state = self._lane_L[lane]
        report_s = self.lanes.deadline_s * REPORT_AFTER - waited_s
        if report_s <= 0 and self._reported < self._receives:
            self._reported = self._receives
            self._reports.send(self._receives)
        try:
            return state.advance(slice_s if report_s <= 0 else min(slice_s, report_s))
        except RuntimeError as error:
            time.sleep(_GRACE_S)  # until the channel of reports has noticed, too
            raise self._late_error(lane, self._reports.missing_ranks(self._receives)) from error

    def _advance(self, lane: int) -> None:
        """What other lanes can do meanwhile; their errors are met where they are waited for."""
        for other, state in enumerate(self._lane_L):
            if other != lane and state.work is not None and not state.sending:
                with contextlib.suppress(RuntimeError):
                    state.advance(0.0)

    def _release(self) -> None:
        for state in self._lane_L:
            if state.work is not None and not state.work.is_completed():
                break_connections(state.pg, self._others)
                held = [state.pg, state.work]
                state.pg = state.work = None
                release_aside(held)
        self._lane_L = []
        self._reports.leave(self.blamed)


class ReportChannel:
    """Owns the process group of reports; a thread for each other rank receives what it sends.

    ``send``, ``missing_ranks`` and ``leave`` belong to the thread that uses the exchange.
    """

    def __init__(self, pg: Any, stragglers: StragglerDetector) -> None:
        self._pg = pg
        self._stragglers = stragglers
        self._lock = threading.Lock()  # guards the detector
        self._sends: list[tuple[Work, Tensor]] = []
        self._others = [r for r in range(pg.size()) if r != pg.rank()]
        self._listeners = [
            threading.Thread(target=self._listen, args=(r,), name=f"rank {r}", daemon=True)
            for r in self._others
        ]
        for listener in self._listeners:
            listener.start()

    def send(self, receives: int, blamed: Sequence[int] = ()) -> None:
        with self._lock:
            note = torch.tensor(self._stragglers.report(receives, blamed))
        self._sends = self._sends[-len(self._others) :]
        for r in self._others:
            with contextlib.suppress(RuntimeError):  # the listener meets the same error
                self._sends.append((self._pg.send([note], r, 0), note))

    def missing_ranks(self, receives: int) -> list[int]:
        with self._lock:
            return self._stragglers.missing_ranks(receives)

    def leave(self, blamed: Sequence[int]) -> None:
        self.send(LEAVING, blamed)
        until = time.monotonic() + _GRACE_S
        for work, _ in self._sends[-len(self._others) :]:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
        break_connections(self._pg, self._others)
        for listener in self._listeners:
            listener.join(_GRACE_S)
        self._sends = []
        del self._pg

    def _listen(self, source: int) -> None:
        note = torch.zeros(1 + self._pg.size(), dtype=torch.int64)
        try:
            while True:
                self._pg.recv([note], source, 0).wait()
                with self._lock:
                    self._stragglers.record(source, note.tolist())
        except RuntimeError:
            with self._lock:
                self._stragglers.disconnected(source)


def connect(store: Store, group: Group, address: str | None, timeout: timedelta) -> Any:
    if address is None:
        return ProcessGroupGloo(store, group.rank, group.world, timeout)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 1
    return ProcessGroupGloo(store, group.rank, group.world, options)


def gloo_done(work: Work, wait_s: float) -> bool:
    """Whether it is over, after at most so long. RuntimeError where it failed."""
    if not work.is_completed():
        if wait_s <= 0:
            return False
        with contextlib.suppress(RuntimeError):  # the time is over, or it failed: see below
            # Less than a millisecond would mean for ever.
            work.wait(timedelta(seconds=max(wait_s, 0.001)))
        if not work.is_completed():
            return False
    work.wait()  # raises what went wrong
    return True


def break_connections(pg: Any, others: Sequence[int]) -> None:
    """Break all connections, as gloo does when a wait for any open one times out: then nothing is
    left waiting."""
    for other in others:
        with contextlib.suppress(RuntimeError):
            word = torch.zeros(1, dtype=torch.uint8)
            pg.recv([word], other, _NO_TAG).wait(timedelta(milliseconds=1))


def release_aside(held: list[Any]) -> None:
    """Let go of a process group, which only the list still holds, on a thread of its own: its
    destructor waits for the group's threads, and one of them may wait for a send until the group's
    timeout, since gloo loses the end of a send whose connection breaks at the wrong moment."""
    threading.Thread(target=held.clear, name="ends a group of gloo", daemon=True).start()
