"""The exchange of ranks that share a host: a segment is written where its receiver reads it.

``MailboxExchange`` is the protocol: who has sent what is told by flags in memory of the host, and
segments lie in a ``SegmentMemory``. ``ShmExchange`` has them beside the flags; ``mapped`` in the
memory of accelerators.

Every rank owns one anonymous block of memory (memfd) that the others map, found under
``/proc/PID/fd`` by a name that went around at the start. Nothing bears a name in a file system, so
nothing outlives the processes, however they end. What lies in a block, and why a receiver needs no
acknowledgement to be safe, stands in ``comm/shm.cc``.

Pages exist from the first touch on, so that capacity costs nothing until it is used.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import Group
from moeserve.comm.native import native_half
from moeserve.errors import ConfigError
from moeserve.host import allowed_cores

_TOKEN_BYTES = 32
_PARITIES = 2
# Views of lengths met before; beyond so many of one area they are made anew.
_VIEWS = 4096
# How a wait begins: a few looks without pause where every rank has a core, then looks between which
# others run. Longer ones without pause cost all of it whenever two ranks meet on a core.
_SPIN_NS = 2_000
_YIELD_NS = 100_000


class SegmentMemory(Protocol):
    """Areas of all ranks, seen by one of them: for each lane and parity of its rounds one from each
    source, as long as the lane's longest segment.

    What a rank reads and writes may be work of a device, done later, in order. Then ``announce``
    marks what it has been given so far, and ``order_after`` puts what it is given from here on
    behind the marks of all ranks.
    """

    device: torch.device

    def area(self, owner: int, lane: int, parity: int, source: int) -> Tensor:
        """Where ``owner`` reads what ``source`` writes."""
        ...

    def announce(self, lane: int, parity: int) -> None:
        """Segments are written: before any flag says so."""
        ...

    def order_after(self, lane: int, parity: int) -> None:
        """All flags were seen."""
        ...

    def close(self) -> None: ...


# From the blocks of all ranks to the memory of segments.
OpenMemory = Callable[[Sequence[Tensor]], SegmentMemory]


class MailboxExchange(ExchangeBackend):
    """Collective: all ranks of the group build theirs at the same time."""

    def __init__(self, group: Group, lanes: Lanes, key: str, open_memory: OpenMemory) -> None:
        super().__init__(group, lanes)
        native, reason = native_half()
        if not hasattr(os, "memfd_create"):
            reason = "this system has no memfd (Linux has)"
        lane_bytes = list(lanes.bytes_L)
        size = 0 if native is None else native.block_bytes(group.world, lane_bytes)
        blocks = share_blocks(group, size, key, reason)
        assert native is not None
        self._blocks = [torch.frombuffer(block, dtype=torch.uint8) for block in blocks]
        self._memory = open_memory(self._blocks)
        self._mailboxes = native.Mailboxes(
            group.rank,
            [block.data_ptr() for block in self._blocks],
            lane_bytes,
            _SPIN_NS if group.world <= len(allowed_cores()) else 0,
            _YIELD_NS,
        )
        self.device, area = self._memory.device, self._memory.area
        ranks, parities, me = range(group.world), range(_PARITIES), group.rank
        every = range(len(lane_bytes))
        self._outbox_LPR = [[[area(r, l, p, me) for r in ranks] for p in parities] for l in every]
        self._inbox_LPR = [[[area(me, l, p, r) for r in ranks] for p in parities] for l in every]
        self._seen_LPR: list[list[list[dict[int, Tensor]]]] = [
            [[{} for _ in ranks] for _ in parities] for _ in every
        ]

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        return self._outbox_LPR[lane][self._mailboxes.begin(lane)]

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._memory.announce(lane, self.round_L[lane] & 1)
        self._mailboxes.send(lane, sizes_R)
        self._count_sent(sizes_R)

    def receive(self, lane: int) -> list[Tensor]:
        lengths = self._mailboxes.receive(lane)
        if lengths is None:
            self._wait(lane, self._sleep, lambda: self._mailboxes.missing(lane))
            lengths = self._mailboxes.receive(lane)
        parity = self.round_L[lane] & 1
        self._memory.order_after(lane, parity)
        segments = []
        for area, seen, length in zip(
            self._inbox_LPR[lane][parity], self._seen_LPR[lane][parity], lengths, strict=True
        ):
            segment = seen.get(length)
            if segment is None:
                if len(seen) >= _VIEWS:
                    seen.clear()
                segment = seen[length] = area[:length]
            segments.append(segment)
        return segments

    def _sleep(self, lane: int, slice_s: float, _: float) -> bool:
        return bool(self._mailboxes.sleep(lane, int(slice_s * 1e9)))

    def _release(self) -> None:
        # Blocks go with the last view of them, so that one which is still held stays readable.
        self._outbox_LPR = []
        self._inbox_LPR = []
        self._seen_LPR = []
        self._blocks = []
        self._memory.close()
        del self._mailboxes


class HostMemory:
    """Areas beside the flags; what is written is there."""

    device = torch.device("cpu")

    def __init__(self, blocks: Sequence[Tensor], lane_bytes: Sequence[int]) -> None:
        native, _ = native_half()
        assert native is not None  # or there were no blocks
        self._blocks, self._bytes = blocks, list(lane_bytes)
        self._offset = native.area_offset

    def area(self, owner: int, lane: int, parity: int, source: int) -> Tensor:
        at = self._offset(len(self._blocks), self._bytes, lane, parity, source)
        return self._blocks[owner][at : at + self._bytes[lane]]

    def announce(self, lane: int, parity: int) -> None: ...

    def order_after(self, lane: int, parity: int) -> None: ...

    def close(self) -> None:
        self._blocks = []


class ShmExchange(MailboxExchange):
    """Collective, as it is."""

    name = "shm"

    def __init__(self, group: Group, lanes: Lanes, key: str = "shm") -> None:
        super().__init__(group, lanes, key, lambda blocks: HostMemory(blocks, lanes.bytes_L))


def share_blocks(group: Group, size: int, key: str, reason: str = "") -> list[mmap.mmap]:
    """Every rank's block; ConfigError, on all alike, if any could not map them, or had a ``reason``
    to have none."""
    if reason:
        group.all_gather(f"{key}/block", b"")
        reasons = group.all_gather(f"{key}/mapped", reason.encode())
    else:
        token = secrets.token_bytes(_TOKEN_BYTES)
        fd = os.memfd_create("moeserve", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            blocks = [mmap.mmap(fd, size)] * group.world
            blocks[0][:_TOKEN_BYTES] = token
            note = f"{os.getpid()} {fd} {token.hex()}"
            for rank, theirs in enumerate(group.all_gather(f"{key}/block", note.encode())):
                try:
                    if rank != group.rank:
                        blocks[rank] = map_block(theirs.decode(errors="replace"), size)
                except (OSError, ValueError) as error:
                    reason = f"the memory of rank {group.of_run(rank)} cannot be mapped: {error}"
            reasons = group.all_gather(f"{key}/mapped", reason.encode())
        finally:
            os.close(fd)
    for rank, reason_of in enumerate(reasons):
        if why := reason_of.decode(errors="replace"):
            raise ConfigError(
                f"no shared memory between ranks: rank {group.of_run(rank)}: {why}. "
                "They must be of one host, one user and one PID namespace, with the same lanes; or "
                "choose another backend"
            )
    return blocks


def map_block(note: str, size: int) -> mmap.mmap:
    """ValueError if another block lies there than the note names: numbers of processes return."""
    if not note:
        raise ValueError("it has none")
    pid, number, token = note.split()
    fd = os.open(f"/proc/{int(pid)}/fd/{int(number)}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != size:
            raise ValueError(f"{os.fstat(fd).st_size} bytes, expected {size}")
        block = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    if block[:_TOKEN_BYTES] != bytes.fromhex(token):
        raise ValueError("it is another's")
    return block
