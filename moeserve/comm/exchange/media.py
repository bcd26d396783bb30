"""What moves bytes between devices for ``collective``: process groups of torch.

``StreamMedium`` is NCCL's or HCCL's, whose collectives are work of the device: they run on a stream
of their own, behind what they send and before what reads it, and no host waits for them.
``HostMedium`` is gloo's, over tensors of the CPU, or over those of a device in name, which ``bare``
takes for what holds their bytes: everything of an exchange but the library's call.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllToAllOptions, PrefixStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.streams import DeviceWork, NoWork, poll
from moeserve.comm.exchange.torch import break_connections, connect, gloo_done, release_aside
from moeserve.comm.group import Group
from moeserve.errors import ConfigError, first_line

# Our own deadlines come first; this ends what nobody waits for any more.
LEFT_ALONE_S = 600.0
LIBRARIES = {"cuda": "nccl", "npu": "hccl"}


class StreamTransfer:
    """A collective on a stream, whose end ``event`` marks; keeps what it reads and writes.

    The library's own ``is_completed`` says yes of a communicator that failed, too, whose kernel
    holds up the device still.
    """

    def __init__(self, event: Any, current_stream: Callable[[], Any], *held: Any) -> None:
        self._event = event
        self._current_stream = current_stream
        self._held = held

    def done(self, wait_s: float) -> bool:
        return poll(self._event.query, wait_s)

    def order_after(self) -> None:
        self._current_stream().wait_event(self._event)  # the host goes on


class StreamMedium:
    """Owns the process group, and the stream that collectives begin on."""

    ordered = True

    def __init__(self, name: str, pg: Any, device: torch.device) -> None:
        self.name = name
        self.device = device
        self._pg = pg
        work = DeviceWork(device)
        self.mark, self.passed, self.to_host = work.mark, work.passed, work.to_host
        self._of: Any = torch.get_device_module(device)
        self._stream = self._of.Stream(device)

    def begin(
        self,
        mark: Any,
        incoming: Tensor,
        outgoing: Tensor,
        come_R: list[int],
        go_R: list[int],
    ) -> StreamTransfer:
        event = self._of.Event()
        with self._of.stream(self._stream):
            self._stream.wait_event(mark)
            work = self._pg.alltoall_base(incoming, outgoing, come_R, go_R, AllToAllOptions())
            work.wait()  # this stream does; the host goes on
            event.record(self._stream)
        current = partial(self._of.current_stream, self.device)
        return StreamTransfer(event, current, work, incoming, outgoing)

    def end(self, failed: bool) -> None:
        with contextlib.suppress(RuntimeError):
            (self._pg.abort if failed else self._pg.shutdown)()
        del self._pg


class HostTransfer:
    """A collective of gloo's threads; keeps what they read and write."""

    def __init__(self, work: Any, *held: Tensor) -> None:
        self.work = work
        self._held = held

    def done(self, wait_s: float) -> bool:
        return gloo_done(self.work, wait_s)

    def order_after(self) -> None: ...


class HostMedium:
    """Owns a process group of gloo."""

    name = "gloo"
    ordered = False

    def __init__(
        self, pg: Any, device: torch.device, bare: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        self.device = device
        work = NoWork()
        self.mark, self.passed, self.to_host = work.mark, work.passed, work.to_host
        self._pg = pg
        self._bare = bare
        self._others = [r for r in range(pg.size()) if r != pg.rank()]

    @classmethod
    def open(
        cls,
        group: Group,
        key: str,
        device: torch.device,
        bare: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> HostMedium:
        """Collective over the group."""
        timeout = timedelta(seconds=LEFT_ALONE_S)
        pg = connect(PrefixStore(f"{key}/gloo", group.store), group, None, timeout)
        return cls(pg, device, bare)

    def begin(
        self,
        mark: Any,
        incoming: Tensor,
        outgoing: Tensor,
        come_R: list[int],
        go_R: list[int],
    ) -> HostTransfer:
        came, gone = self._bare(incoming), self._bare(outgoing)
        work = self._pg.alltoall_base(came, gone, come_R, go_R, AllToAllOptions())
        return HostTransfer(work, came, gone)

    def end(self, failed: bool) -> None:
        if failed:
            break_connections(self._pg, self._others)
        held = [self._pg]
        del self._pg
        release_aside(held)


def open_stream_medium(group: Group, key: str, device: torch.device) -> StreamMedium:
    """NCCL on a CUDA device, HCCL on an NPU; collective over the group. ConfigError where torch has
    no such library, or the communicator cannot be made."""
    name = LIBRARIES[device.type]
    if reason := lacking(device.type):
        raise ConfigError(f"comm backend {name!r}: {reason}")
    store = PrefixStore(f"{key}/{name}", group.store)
    timeout = timedelta(seconds=LEFT_ALONE_S)
    leave_unwatched(name)
    try:
        made = process_groups(device.type)
        options = made.Options()
        options._timeout = timeout
        pg = made(store, group.rank, group.world, options)
        if name == "nccl":  # HCCL joins in the first round
            pg.eager_connect_single_device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"comm backend {name!r}: no communicator of rank {group.of_run(group.rank)} on "
            f"{device}: {first_line(error)}; {name.upper()}_DEBUG=INFO says more, and 'tcp' goes "
            "without it"
        ) from error
    return StreamMedium(name, pg, device)


def leave_unwatched(library: str) -> None:
    """A rank that is lost is for our deadlines and heartbeats to find, not for threads of torch
    that watch groups of the library ("nccl", "hccl"), which would end this process."""
    for variable in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING"):
        os.environ.setdefault(f"TORCH_{library.upper()}_{variable}", "0")


def process_groups(kind: str) -> Any:
    """The class of process groups between such devices; None where there is none."""
    if kind == "cuda":
        return getattr(torch.distributed, "ProcessGroupNCCL", None)
    try:
        return importlib.import_module("torch_npu")._C._distributed_c10d.ProcessGroupHCCL
    except (ImportError, AttributeError):
        return None


def lacking(kind: str) -> str:
    """Why this torch has no collectives between such devices; "" where it has."""
    if process_groups(kind) is not None:
        return ""
    if kind == "cuda":
        return (
            f"torch {torch.__version__} was built without NCCL: install a build of torch for CUDA, "
            "or choose 'tcp'"
        )
    return "torch_npu brings no HCCL: install one of torch's minor version, or choose 'tcp'"
