"""The exchange over torch.distributed: ``all_to_all`` with uneven splits, after one of the sizes.

Every lane has a process group of its own, so that lanes need no common order: the bytes of a round
are on their way as soon as its sizes are known, which any call of this exchange looks for.

Who is late gloo does not say. So whoever has waited for a tenth of the deadline greets all others,
and after the deadline, or when a connection breaks, those who did not greet are named.
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

from moeserve.comm.group import Group
from moeserve.comm.rounds import Lanes, Rounds, cut, padded, places

# Our own deadlines end waits; this only bounds what nobody waits for.
_NEVER = timedelta(hours=24)
_NO_TAG = (1 << 31) - 1
# How long greetings may take that have been sent already.
_GRACE_S = 0.2


class _Lane:
    """One process group and the round in it. Segments lie padded, one behind the other."""

    def __init__(self, pg: Any, world: int) -> None:
        self.pg = pg
        self.out = torch.empty(0, dtype=torch.uint8)
        self.come = torch.empty(0, dtype=torch.uint8)
        self.starts_R: list[int] = []
        self.sizes_R = torch.zeros(world, dtype=torch.int64)
        self.lengths_R = torch.zeros(world, dtype=torch.int64)
        self.work: Work | None = None
        self.moving = False
        self.greeting: Greeting | None = None

    def room(self, sizes_R: Sequence[int]) -> list[Tensor]:
        self.starts_R, end = places(sizes_R)
        if self.out.shape[0] < end:
            self.out = torch.empty(end, dtype=torch.uint8)
        return cut(self.out, sizes_R)

    def start(self, sizes_R: Sequence[int]) -> None:
        """Close the gaps that unused room left; send the sizes."""
        at = 0
        for r, size in enumerate(sizes_R):
            if at != self.starts_R[r] and size:
                here = self.starts_R[r]
                self.out[at : at + size] = self.out[here : here + size].clone()
            at += padded(size)
        self.sizes_R.copy_(torch.tensor(sizes_R))
        self.moving, self.greeting = False, None
        self.work = self.pg.alltoall_base(self.lengths_R, self.sizes_R, [], [], AllToAllOptions())

    def advance(self, wait_s: float) -> bool:
        """Send the bytes once the sizes have come; whether all is there. RuntimeError if a
        connection broke."""
        if not self._done(wait_s):
            return False
        if self.moving:
            return True
        mine, theirs = self.sizes_R.tolist(), self.lengths_R.tolist()
        out, come = [padded(n) for n in mine], [padded(n) for n in theirs]
        if len(self.come) < sum(come):
            self.come = torch.empty(sum(come), dtype=torch.uint8)
        self.work = self.pg.alltoall_base(
            self.come[: sum(come)], self.out[: sum(out)], come, out, AllToAllOptions()
        )
        self.moving = True
        return self._done(wait_s)

    def _done(self, wait_s: float) -> bool:
        assert self.work is not None
        try:
            if wait_s > 0 or self.work.is_completed():
                # Less than a millisecond would mean for ever.
                self.work.wait(timedelta(seconds=max(wait_s, 0.001)))
        except RuntimeError:
            if self.work.is_completed():
                raise
        return self.work.is_completed()

    def segments(self) -> list[Tensor]:
        return cut(self.come, self.lengths_R.tolist())


class TorchExchange(Rounds):
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
        self._lane_L = []
        for lane in range(len(lanes.bytes_L)):
            store = PrefixStore(f"{key}/{lane}", group.store)
            self._lane_L.append(_Lane(connect(store, group, address), group.world))

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
        self._wait(lane, self._look, lambda: self._absent(lane))
        return state.segments()

    def _look(self, lane: int, slice_s: float, waited_s: float) -> bool:
        state = self._lane_L[lane]
        greet_s = self.lanes.deadline_s / 10
        if waited_s >= greet_s and state.greeting is None:
            state.greeting = Greeting(state.pg, self._others, self.round_L[lane])
        try:
            return state.advance(slice_s if state.greeting else min(slice_s, greet_s - waited_s))
        except RuntimeError as error:
            raise self._late(lane, self._absent(lane)) from error

    def _advance(self, lane: int) -> None:
        """What other lanes can do meanwhile; their errors are met where they are waited for."""
        for other, state in enumerate(self._lane_L):
            if other != lane and state.work is not None and not state.moving:
                with contextlib.suppress(RuntimeError):
                    state.advance(0.0)

    def _absent(self, lane: int) -> list[int]:
        state = self._lane_L[lane]
        greeting = state.greeting or Greeting(state.pg, self._others, self.round_L[lane])
        return greeting.unanswered()

    def _release(self) -> None:
        for state in self._lane_L:
            if state.work is not None and not state.work.is_completed():
                hang_up(state.pg, self._others[0])
        self._lane_L = []


class Greeting:
    """Said to all others, and awaited from them, beside a round that takes long."""

    def __init__(self, pg: Any, others: Sequence[int], tag: int) -> None:
        self._word = torch.zeros(1, dtype=torch.uint8)
        self._words = {r: torch.zeros(1, dtype=torch.uint8) for r in others}
        self._said: list[Work] = []
        self._heard: dict[int, Work | None] = {}
        for r in others:
            try:
                self._said.append(pg.send([self._word], r, tag))
                self._heard[r] = pg.recv([self._words[r]], r, tag)
            except RuntimeError:  # the connection is gone
                self._heard[r] = None

    def unanswered(self) -> list[int]:
        """Those whose connection is gone; or if there are none, those who have not greeted."""
        here: set[int] = set()
        gone = {r for r, work in self._heard.items() if work is None}

        def hear(rank: int, work: Work) -> None:
            try:
                work.wait()
                here.add(rank)
            except RuntimeError:
                gone.add(rank)

        # gloo cannot be asked without waiting, and a wait that ends early breaks all connections.
        waiting = [
            threading.Thread(target=hear, args=(r, work), daemon=True)
            for r, work in self._heard.items()
            if work is not None
        ]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + _GRACE_S
        for thread in waiting:
            thread.join(max(0.0, until - time.monotonic()))
        return sorted(gone) or sorted(self._heard.keys() - here)


def connect(store: Store, group: Group, address: str | None) -> Any:
    if address is None:
        return ProcessGroupGloo(store, group.rank, group.world, _NEVER)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _NEVER
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 1
    return ProcessGroupGloo(store, group.rank, group.world, options)


def hang_up(pg: Any, other: int) -> None:
    """Break all connections, as gloo does when a wait times out: nothing is left waiting."""
    with contextlib.suppress(RuntimeError):
        pg.recv([torch.zeros(1, dtype=torch.uint8)], other, _NO_TAG).wait(timedelta(milliseconds=1))
