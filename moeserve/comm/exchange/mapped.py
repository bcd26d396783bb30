"""The exchange of ranks whose accelerators can write into one another's memory, on one host.

The protocol is that of ``shm``: a segment is written where its receiver reads it, and flags in
memory of the host say that it is there. What is written is work of a device, though, so a flag says
only that the work was given, and an event that both processes know orders the reader behind it.
That two areas in turn suffice has the same reason as there (``comm/shm.cc``), in the order of each
device's work: who writes into an area of round n + 2 has ordered itself behind the events of round
n + 1, which each reader has marked after what reads round n.

On CUDA areas and events are shared by IPC handles (``CudaSharing``), between cards that reach one
another's memory, or between processes on one card. Threads of a process share them as they are
(``ThreadSharing``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import padded
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.shm import MailboxExchange
from moeserve.comm.exchange.streams import DeviceWork, GivenWork, NoWork
from moeserve.comm.group import Group
from moeserve.errors import ConfigError, first_line

PARITIES = 2


class Fence(Protocol):
    """An event of one rank, lane and parity."""

    def record(self) -> None:
        """By its owner: what its device has been given until here."""
        ...

    def wait(self) -> None:
        """By any rank: what its own device is given from here on comes after the last record."""
        ...


class Sharing(Protocol):
    """How ranks come by one another's areas and fences, and what their devices are given."""

    device: torch.device
    work: GivenWork

    def share(self, group: Group, key: str, size: int, fences: int) -> tuple[Any, Any]:
        """``size`` bytes on the device of each rank, uint8, and so many fences of each, by rank.
        Collective over the group. ConfigError, on all alike, where any cannot."""
        ...


class MappedMemory:
    """A ``shm.SegmentMemory`` over blocks of devices."""

    def __init__(
        self,
        rank: int,
        blocks: Sequence[Tensor],
        fences_RF: Sequence[Sequence[Fence]],
        lane_bytes: Sequence[int],
    ) -> None:
        self.device = blocks[rank].device
        self._rank, self._world = rank, len(blocks)
        self._blocks, self._fences_RF = list(blocks), list(fences_RF)
        self._bytes = list(lane_bytes)

    def area(self, owner: int, lane: int, parity: int, source: int) -> Tensor:
        at = block_bytes(self._world, self._bytes[:lane])
        at += (parity * self._world + source) * padded(self._bytes[lane])
        return self._blocks[owner][at : at + self._bytes[lane]]

    def announce(self, lane: int, parity: int) -> None:
        self._fences_RF[self._rank][lane * PARITIES + parity].record()

    def order_after(self, lane: int, parity: int) -> None:
        for rank, fences in enumerate(self._fences_RF):
            if rank != self._rank:
                fences[lane * PARITIES + parity].wait()

    def close(self) -> None:
        self._blocks, self._fences_RF = [], []


def block_bytes(world: int, lane_bytes: Sequence[int]) -> int:
    """On the device of each rank."""
    return PARITIES * world * sum(map(padded, lane_bytes))


class MappedExchange(MailboxExchange):
    """Collective, as ``MailboxExchange``. All that a rank does with segments it gives its device on
    one stream."""

    name = "mapped"

    def __init__(self, group: Group, lanes: Lanes, key: str, sharing: Sharing) -> None:
        def opened(_: Sequence[Tensor]) -> MappedMemory:
            size = max(1, block_bytes(group.world, lanes.bytes_L))
            count = PARITIES * len(lanes.bytes_L)
            blocks, fences = sharing.share(group, f"{key}/areas", size, count)
            return MappedMemory(group.rank, blocks, fences, lanes.bytes_L)

        # Pages of the flags' memory that nobody touches do not exist.
        super().__init__(group, lanes, key, opened)
        self._work = sharing.work

    def fetch(self, numbers: Tensor) -> Tensor:
        self._require_open()
        if numbers.device != self.device:
            return numbers.cpu()
        there = self._work.to_host(numbers)
        mark = self._work.mark()
        self._wait(0, lambda _, wait_s, __: self._work.passed(mark, wait_s), lambda: self._others)
        return there


class ThreadSharing:
    """Between threads of one process, for tests and measurements: ``shared`` is one for all.

    ``new_fence`` is of the device: on one whose work is done when a call returns, none is needed.
    """

    def __init__(
        self,
        device: torch.device,
        shared: dict[Any, Any],
        new_fence: Callable[[], Fence] | None = None,
        work: GivenWork | None = None,
    ) -> None:
        self.device = device
        self.work: GivenWork = NoWork() if work is None else work
        self._shared = shared
        self._new_fence = NoFence if new_fence is None else new_fence

    def share(self, group: Group, key: str, size: int, fences: int) -> tuple[Any, Any]:
        block = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._shared[key, group.rank] = block, [self._new_fence() for _ in range(fences)]
        group.all_gather(key, b"")
        found = [self._shared[key, r] for r in range(group.world)]
        return [block for block, _ in found], [fences for _, fences in found]


class NoFence:
    def record(self) -> None: ...

    def wait(self) -> None: ...


class StreamFence:
    """An event of CUDA, its own or another process's."""

    def __init__(self, device: torch.device, event: Any) -> None:
        self._device = device
        self.event = event

    def record(self) -> None:
        self.event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self.event)


def new_stream_fence(device: torch.device) -> StreamFence:
    return StreamFence(device, torch.cuda.Event(interprocess=True))  # type: ignore[no-untyped-call]


class CudaSharing:
    """By IPC handles. What is shared stays allocated for as long as this rank's exchange."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.work: GivenWork = DeviceWork(device)

    def share(self, group: Group, key: str, size: int, fences: int) -> tuple[Any, Any]:
        reason, note, own = "", b"", None
        try:
            with torch.cuda.device(self.device):
                block = torch.empty(size, dtype=torch.uint8, device=self.device)
                own = block, [new_stream_fence(self.device) for _ in range(fences)]
                note = handles_note(block, [fence.event for fence in own[1]])
        except (RuntimeError, torch.OutOfMemoryError) as error:
            reason = f"{size} bytes of {self.device} cannot be shared: {first_line(error)}"
        found: list[Any] = []
        for rank, theirs in enumerate(group.all_gather(f"{key}/handles", note)):
            if rank == group.rank or reason:
                found.append(own)
                continue
            try:
                with torch.cuda.device(self.device):
                    found.append(self._opened(theirs))
            except (RuntimeError, ValueError, TypeError) as error:
                reason = (
                    f"the memory of rank {group.of_run(rank)}'s card cannot be mapped: "
                    f"{first_line(error)}"
                )
        require_all(group, key, reason)
        return [block for block, _ in found], [fences for _, fences in found]

    def _opened(self, note: bytes) -> tuple[Tensor, list[StreamFence]]:
        """ValueError where it is no note of handles."""
        if not note:
            raise ValueError("it has none")
        told = json.loads(note)
        parts = [bytes.fromhex(p) if isinstance(p, str) else p for p in told["storage"]]
        parts[0] = self.device.index  # whose address space it is mapped into
        untyped: Any = torch.UntypedStorage
        storage = untyped._new_shared_cuda(*parts)
        block = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        events: Any = torch.cuda.Event
        opened = [
            events.from_ipc_handle(self.device, bytes.fromhex(handle)) for handle in told["events"]
        ]
        return block, [StreamFence(self.device, event) for event in opened]


def handles_note(block: Tensor, events: Sequence[Any]) -> bytes:
    """What another process opens them by; bytes as hexadecimal digits."""
    storage: Any = block.untyped_storage()
    parts = [p.hex() if isinstance(p, bytes) else p for p in storage._share_cuda_()]
    return json.dumps({"storage": parts, "events": [e.ipc_handle().hex() for e in events]}).encode()


def require_all(group: Group, key: str, reason: str) -> None:
    """ConfigError, on all alike, if any rank has a reason."""
    for rank, note in enumerate(group.all_gather(f"{key}/mapped", reason.encode())):
        if why := note.decode(errors="replace"):
            raise ConfigError(
                f"no memory of cards between ranks: rank {group.of_run(rank)}: {why}. Cards must "
                "reach one another (nvidia-smi topo -p2p r) and be seen by all ranks; or choose "
                "'nccl' or 'shm', or lower max_num_batched_tokens"
            )
