"""How bytes travel between ranks: one interface, which knows nothing of tokens. Its backends are
``local`` (one process), ``shm`` (shared memory of a host), ``tcp`` (sockets between hosts),
``torch`` (torch.distributed's gloo) and ``mpi``, whose bytes lie in host memory, and those whose
bytes stay on accelerators: ``collective`` (NCCL, HCCL) and ``mapped`` (memory of the other cards of
a host). ``open`` chooses one.

A round carries one segment of bytes from every rank to every rank, itself included; only the sender
knows how long its segments are, and no segment is padded to the longest. Rounds follow one another
in lanes: a lane is one direction of one microbatch, so that rounds of different lanes overlap. All
ranks take part in every round of a lane, in the same order, with empty segments where they have
nothing to say; calls for different lanes interleave in the same order on all ranks.

Every wait has a deadline, and its error names the ranks that did not come (law 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moeserve.errors import MoeserveError

DEADLINE_S = 5.0

# Asked while a round waits: an error that ends the wait at once, such as a rank known to be dead.
Alarm = Callable[[], MoeserveError | None]


@dataclass(frozen=True, slots=True)
class Lanes:
    """What an exchange is built for: ``bytes_L[l]`` is the most that a segment of lane l may have;
    a wait ends after ``deadline_s``, or at once where ``alarm`` returns an error."""

    bytes_L: tuple[int, ...]
    deadline_s: float = DEADLINE_S
    alarm: Alarm | None = None


@dataclass(slots=True)
class ExchangeStats:
    """Counted where it happens (law 8): bytes handed to each rank, itself left out, and rounds."""

    rounds: int = 0
    sent_R: list[int] = field(default_factory=list)


class Exchange(Protocol):
    """One backend on one rank of a group of ``world``. It belongs to one thread."""

    name: str
    rank: int
    world: int
    traffic: ExchangeStats
    device: torch.device

    def fetch(self, numbers: Tensor) -> Tensor:
        """A few numbers on the host, wherever they lie: the one wait for a device that a round
        needs. Where bytes are on their way between devices it has the deadline of a round, and what
        was sent moves meanwhile."""
        ...

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        """Begin a round: where the segment for each rank is to be written.

        uint8 on ``device``, 64-byte aligned, at least ``sizes_R[r]`` long. ConfigError if a size is
        beyond what the backend was built for. Ends the life of what the lane's last ``receive``
        gave.
        """
        ...

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        """The segments are written and end after so many bytes, at most those announced. They move
        from here on; the caller goes on with other work."""
        ...

    def receive(self, lane: int) -> list[Tensor]:
        """The segment of every rank for this one, in order of ranks: uint8, exact length, 64-byte
        aligned, valid until ``areas`` begins the lane's next round. LateRankError names who is
        missing.
        """
        ...

    def close(self) -> None:
        """Give back memory and connections; no rank needs to do it at the same time."""
        ...
