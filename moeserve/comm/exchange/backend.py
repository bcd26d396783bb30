"""What all backends of an exchange keep: who takes part, what was sent, how long a wait may last.

A backend that met an error is closed: the ranks no longer agree on what has moved.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeserve.comm.exchange.base import ExchangeStats, Lanes
from moeserve.comm.group import Group, named
from moeserve.errors import ConfigError, LateRankError, MoeserveError, UnavailableError

ALIGNMENT = 64
# How long a wait may go without a look at the alarm.
SLICE_S = 0.05


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def offsets_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where pieces of these sizes begin, each at the next multiple of ``ALIGNMENT``; the end."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += padded(size)
    return starts, at


def split_segments(area: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The pieces at the offsets of ``offsets_of``, by one call of torch."""
    cuts: list[int] = []
    at = 0
    for size in sizes:
        span = padded(size)
        cuts += (size, span - size)
        at += span
    pieces = area.split_with_sizes((*cuts, area.shape[0] - at))
    return list(pieces[0:-1:2])


class LaneAreas:
    """Memory of one lane, on ``device``: segments to be sent, and those that came, each padded to
    ``ALIGNMENT``, one behind the other. It grows to the largest round, and stays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outgoing = self._incoming = torch.empty(0, dtype=torch.uint8, device=device)
        self._starts_R: list[int] = []
        self._come_R: list[int] = []

    def reserve(self, sizes_R: Sequence[int]) -> list[Tensor]:
        """Where the segments of the next round are to be written."""
        self._starts_R, end = offsets_of(sizes_R)
        if len(self._outgoing) < end:
            self._outgoing = torch.empty(end, dtype=torch.uint8, device=self._device)
        return split_segments(self._outgoing, sizes_R)

    def outgoing(self, sizes_R: Sequence[int]) -> Tensor:
        """The segments as they were written, without the gaps that unused room left."""
        at = 0
        for r, size in enumerate(sizes_R):
            here = self._starts_R[r]
            if at != here and size:
                self._outgoing[at : at + size] = self._outgoing[here : here + size].clone()
            at += padded(size)
        return self._outgoing[:at]

    def incoming(self, sizes_R: Sequence[int]) -> Tensor:
        """Room for segments of these sizes."""
        self._come_R, end = list(sizes_R), sum(map(padded, sizes_R))
        if len(self._incoming) < end:
            self._incoming = torch.empty(end, dtype=torch.uint8, device=self._device)
        return self._incoming[:end]

    @property
    def room(self) -> int:
        """For segments that come."""
        return len(self._incoming)

    def segments(self) -> list[Tensor]:
        """What came."""
        return split_segments(self._incoming, self._come_R)


class WaitDeadline:
    """One wait: it ends after the deadline, and at once where there is an alarm."""

    def __init__(self, lanes: Lanes) -> None:
        self._alarm = lanes.alarm
        self.begun = time.monotonic()
        self.until = self.begun + lanes.deadline_s

    def slice_s(self) -> float:
        """How long to wait until the next look; 0 after the deadline. Raises what the alarm has."""
        error = None if self._alarm is None else self._alarm()
        if error is not None:
            raise error
        return min(SLICE_S, max(0.0, self.until - time.monotonic()))


class ExchangeBackend(ABC):
    """What every ``Exchange`` inherits. It belongs to one thread."""

    name: str
    device = torch.device("cpu")

    def __init__(self, group: Group, lanes: Lanes) -> None:
        self.rank = group.rank
        self.world = group.world
        self.traffic = ExchangeStats(0, [0] * group.world)
        self.lanes = lanes
        self.round_L = [0] * len(lanes.bytes_L)
        self._group = group
        self._others = [r for r in range(group.world) if r != group.rank]
        self.blamed: list[int] = []
        self._closed_because = ""

    def close(self) -> None:
        self._close("it was closed")

    def fetch(self, numbers: Tensor) -> Tensor:
        return numbers.cpu()

    def _require_open(self) -> None:
        if self._closed_because:
            raise UnavailableError(f"the {self.name} exchange is closed: {self._closed_because}")

    def _begin_round(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._require_open()
        if max(sizes_R) > self.lanes.bytes_L[lane]:
            raise ConfigError(
                f"a segment of {max(sizes_R)} bytes in lane {lane}: the {self.name} exchange was "
                f"built for {self.lanes.bytes_L[lane]}; let a step have fewer tokens"
            )
        self.round_L[lane] += 1

    def _count_sent(self, sizes_R: Sequence[int]) -> None:
        traffic = self.traffic
        traffic.rounds += 1
        for r in self._others:
            traffic.sent_R[r] += sizes_R[r]

    def _wait(
        self,
        lane: int,
        arrived: Callable[[int, float, float], bool],
        missing: Callable[[], list[int]],
    ) -> None:
        """Returns once ``arrived`` is true; it gets the lane, how long it may wait before it is
        asked again, and how long the wait has lasted. After the deadline LateRankError names the
        ranks that ``missing`` gives. On any error the exchange is closed."""
        deadline = WaitDeadline(self.lanes)
        try:
            while True:
                slice_s = deadline.slice_s()
                if arrived(lane, slice_s, time.monotonic() - deadline.begun):
                    return
                if slice_s == 0.0:
                    raise self._late_error(lane, missing())
        except MoeserveError as error:
            if isinstance(error, LateRankError):
                of_run = self._group.of_run
                self.blamed = [r for r in self._others if of_run(r) in error.ranks]
            self._close(str(error))
            raise

    def _late_error(self, lane: int, ranks: Sequence[int]) -> LateRankError:
        late = [self._group.of_run(r) for r in ranks]
        return LateRankError(
            f"{named(late)} did not send round {self.round_L[lane]} of lane {lane} within "
            f"{self.lanes.deadline_s:g} s",
            late,
        )

    def _close(self, reason: str) -> None:
        if not self._closed_because:
            self._closed_because = reason
            self._release()

    @abstractmethod
    def _release(self) -> None:
        """Give back what the backend holds; called once."""
