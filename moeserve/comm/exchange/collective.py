"""The exchange whose segments stay on accelerators: NCCL's or HCCL's ``all_to_all``.

Two things travel. The sizes of a round go over an exchange of the host, whose waits have deadlines
and name who is late. Once all sizes are there, all ranks have written their segments, and the bytes
go by one collective between devices, which no host waits for: what the device does with them is
ordered behind their arrival.

Collectives of one process, of whatever exchange and lane, begin in the order of their ``send``,
which is the same on all ranks (``BeginningOrder``): communicators that are used together cannot
wait for one another in a circle. They begin in ``receive`` and in ``fetch``: while the host waits
for a device anyway, what was sent before is on its way.

A collective in which a rank does not take part holds up the device, which is noticed by the next
``fetch``, within the deadline, while ranks that are further on miss the sizes of whoever is held
up. So every rank whose wait is over first asks the others whether they are there, over an exchange
of the host that serves for nothing else: who does not answer within one more deadline is late. Then
the communicator is aborted, so that the device goes on.

Knows nothing of NCCL: ``medium`` is what moves bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend, LaneAreas, padded
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.streams import GivenWork
from moeserve.comm.group import Group
from moeserve.errors import LateRankError, MoeserveError

# What says how long a segment is.
SIZE_BYTES = 8


class Transfer(Protocol):
    """A collective under way."""

    def done(self, wait_s: float) -> bool:
        """Whether all has come, after at most so long. RuntimeError where it failed."""
        ...

    def order_after(self) -> None:
        """What the device is given from here on comes after it."""
        ...


class Medium(GivenWork, Protocol):
    """Moves bytes between the devices of a group; all ranks begin the same transfers in turn.

    ``ordered`` where ``order_after`` is enough: the host need not wait for a transfer.
    """

    name: str
    device: torch.device
    ordered: bool

    def begin(
        self,
        mark: Any,
        incoming: Tensor,
        outgoing: Tensor,
        come_R: list[int],
        go_R: list[int],
    ) -> Transfer:
        """As soon as the mark has passed: pieces of so many bytes, one behind the other.
        RuntimeError where the communicator is broken."""
        ...

    def end(self, failed: bool) -> None:
        """Give the communicator back; what is under way is ended where it ``failed``."""
        ...


class BeginningOrder:
    """Rounds that were sent and have not begun, of all exchanges of a process that share it."""

    def __init__(self) -> None:
        self._sent: deque[tuple[CollectiveExchange, int]] = deque()

    def add(self, exchange: CollectiveExchange, lane: int) -> None:
        self._sent.append((exchange, lane))

    def begin(self, until: tuple[CollectiveExchange, int] | None = None) -> None:
        """Those before this one and itself, where it is among them; else all."""
        if until is not None and until not in self._sent:
            return
        while self._sent:
            exchange, lane = self._sent.popleft()
            exchange.begin_round(lane)
            if (exchange, lane) == until:
                return


@dataclass(slots=True)
class _LaneState:
    """The round of one lane: what is sent once ``mark`` has passed, and what is under way."""

    areas: LaneAreas
    outgoing: Tensor
    go_R: list[int]
    mark: Any = None
    transfer: Transfer | None = None


class CollectiveExchange(ExchangeBackend):
    """``sizes`` and ``presence`` are exchanges of the host among the same ranks, for ``size_lanes``
    and ``presence_lanes``, which this one owns; ``order`` is shared with other exchanges of this
    process that are in use with it."""

    def __init__(
        self,
        group: Group,
        lanes: Lanes,
        sizes: Exchange,
        presence: Exchange,
        medium: Medium,
        order: BeginningOrder | None = None,
    ) -> None:
        super().__init__(group, lanes)
        self.name = medium.name
        self.device = medium.device
        self._medium = medium
        self._sizes = sizes
        self._order = BeginningOrder() if order is None else order
        self._presence = presence
        none = torch.empty(0, dtype=torch.uint8, device=medium.device)
        self._lane_L = [_LaneState(LaneAreas(medium.device), none, []) for _ in lanes.bytes_L]
        self._under_way: deque[tuple[int, Transfer]] = deque()

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        return self._lane_L[lane].areas.reserve(sizes_R)

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        state = self._lane_L[lane]
        state.go_R, state.transfer = list(sizes_R), None
        state.outgoing = state.areas.outgoing(sizes_R)
        state.mark = self._medium.mark()
        areas = self._sizes.areas(lane, [SIZE_BYTES] * self.world)
        for area, size in zip(areas, sizes_R, strict=True):
            area[:SIZE_BYTES].view(torch.int64).fill_(size)
        self._sizes.send(lane, [SIZE_BYTES] * self.world)
        self._count_sent(sizes_R)
        self._order.add(self, lane)

    def receive(self, lane: int) -> list[Tensor]:
        self._order.begin((self, lane))
        state = self._lane_L[lane]
        transfer = state.transfer
        assert transfer is not None, lane
        if not self._medium.ordered:
            self._wait(lane, lambda _, wait_s, __: self._done(transfer, wait_s), self._held_up)
        transfer.order_after()
        return state.areas.segments()

    def fetch(self, numbers: Tensor) -> Tensor:
        self._require_open()
        if numbers.device != self.device:
            return numbers.cpu()
        there = self._medium.to_host(numbers)
        mark = self._medium.mark()
        self._order.begin()
        self._wait(
            self._oldest_lane(), lambda _, wait_s, __: self._passed(mark, wait_s), self._held_up
        )
        return there

    def begin_round(self, lane: int) -> None:
        """All sizes are waited for, then the transfer begins. For ``BeginningOrder``."""
        try:
            self._begin_transfer(lane)
        except MoeserveError as error:
            self._close(str(error))
            raise

    def _begin_transfer(self, lane: int) -> None:
        try:
            come_R = [int(s.view(torch.int64)) for s in self._sizes.receive(lane)]
        except LateRankError as late:
            raise self._late_error(lane, self._absent() or self._others) from late
        state = self._lane_L[lane]
        room = state.areas.room
        incoming = state.areas.incoming(come_R)
        if state.areas.room != room:  # whatever was in that memory before is done with it first
            state.mark = self._medium.mark()
        come, go = ([padded(n) for n in sizes_R] for sizes_R in (come_R, state.go_R))
        try:
            state.transfer = self._medium.begin(state.mark, incoming, state.outgoing, come, go)
        except RuntimeError as error:  # of the communicator: by whoever is gone, or this rank's own
            raise self._late_error(lane, self._absent() or [self.rank]) from error
        while self._under_way and settled(self._under_way[0][1]):
            self._under_way.popleft()
        self._under_way.append((lane, state.transfer))

    def _oldest_lane(self) -> int:
        return self._under_way[0][0] if self._under_way else 0

    def _done(self, transfer: Transfer, wait_s: float) -> bool:
        try:
            return transfer.done(wait_s)
        except RuntimeError as error:  # a connection is gone: who answers is not to blame
            raise self._late_error(self._oldest_lane(), self._held_up()) from error

    def _passed(self, mark: Any, wait_s: float) -> bool:
        try:
            return self._medium.passed(mark, wait_s)
        except RuntimeError as error:
            raise self._late_error(self._oldest_lane(), self._held_up()) from error

    def _held_up(self) -> list[int]:
        """Whom to blame for a device that does not go on: this rank, if nothing of others is
        awaited."""
        if all(settled(transfer) for _, transfer in self._under_way):
            return [self.rank]
        return self._absent() or self._others

    def _absent(self) -> list[int]:
        """Who does not answer when asked to."""
        try:
            self._presence.areas(0, [0] * self.world)
            self._presence.send(0, [0] * self.world)
            self._presence.receive(0)
        except LateRankError as error:
            return [r for r in self._others if self._group.of_run(r) in error.ranks]
        return []

    def _release(self) -> None:
        failed = not all(settled(transfer) for _, transfer in self._under_way)
        self._medium.end(failed)  # while what collectives write is still there
        self._lane_L = []
        self._under_way.clear()
        self._sizes.close()
        self._presence.close()


def settled(transfer: Transfer) -> bool:
    """Whether all of it has come; one that failed has not."""
    try:
        return transfer.done(0.0)
    except RuntimeError:
        return False


def size_lanes(lanes: Lanes) -> Lanes:
    """Of the exchange that carries sizes."""
    return Lanes((SIZE_BYTES,) * len(lanes.bytes_L), lanes.deadline_s, lanes.alarm)


def presence_lanes(lanes: Lanes) -> Lanes:
    """Of the exchange in which ranks answer that they are there."""
    return Lanes((SIZE_BYTES,), lanes.deadline_s, lanes.alarm)
