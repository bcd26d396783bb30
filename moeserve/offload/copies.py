"""Copies from host memory to a device, beside its kernels.

Kernels run in one order, that of their launches; copies in another, that of their submission. A
``Mark`` is a place in either: "all that was launched (or copied) so far". What ties the two orders
together is said with marks alone: a copy runs after a mark of the kernels, so that no slot is
overwritten before the kernels that read it are done; kernels wait for the mark of a copy. Nothing
here blocks the host but ``finish``, which has a deadline.

``CudaCopies`` is a stream of its own. ``InOrderCopies`` copies at once, for devices whose one queue
runs everything in order, and for tests.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from moeserve.errors import DeadlineError, ExhaustedError

Mark = Any  # an event of the device; None of one whose work is done when it is launched
POLL_S = 5e-5


class DeviceCopies(Protocol):
    """One thread at a time."""

    @property
    def device(self) -> torch.device: ...

    def pin(self, memory: Tensor) -> None:
        """Host memory that copies are made from stays where it is, so that the device can read it
        by itself; until the process ends or ``unpin``. ExhaustedError where the system refuses."""
        ...

    def unpin(self, memory: Tensor) -> None: ...

    def launched(self) -> Mark:
        """All kernels that were launched so far."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Begins when ``after`` is reached; both are uint8 of one length, and ``source`` stays as
        it is until the mark that is returned is reached."""
        ...

    def need(self, mark: Mark) -> None:
        """Kernels that are launched from here on run after it."""
        ...

    def done(self, mark: Mark) -> bool:
        """Whether it is reached."""
        ...

    def finish(self, mark: Mark, deadline_s: float) -> None:
        """Returns when it is reached; DeadlineError where that takes too long."""
        ...


class InOrderCopies:
    """Each copy is made when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pin(self, memory: Tensor) -> None: ...

    def unpin(self, memory: Tensor) -> None: ...

    def launched(self) -> Mark:
        return None

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        target.copy_(source)
        return None

    def need(self, mark: Mark) -> None: ...

    def done(self, mark: Mark) -> bool:
        return True

    def finish(self, mark: Mark, deadline_s: float) -> None: ...


class CudaCopies:
    """A stream beside the one that kernels are launched on (torch's current stream)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda: Any = torch.cuda  # parts of it have no types
        self._stream = self._cuda.Stream(device)

    def pin(self, memory: Tensor) -> None:
        failed = int(self._cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if failed:
            raise ExhaustedError(
                f"{memory.nbytes} bytes of host memory cannot be locked for {self.device} (CUDA "
                f"error {failed}): give less with --memory, or raise the limit (ulimit -l)"
            )

    def unpin(self, memory: Tensor) -> None:
        self._cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def launched(self) -> Mark:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self.device))
        return event

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        self._stream.wait_event(after)
        event = self._cuda.Event()
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event

    def need(self, mark: Mark) -> None:
        self._cuda.current_stream(self.device).wait_event(mark)

    def done(self, mark: Mark) -> bool:
        return bool(mark.query())

    def finish(self, mark: Mark, deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        while not mark.query():
            if time.monotonic() > until:
                raise DeadlineError(
                    f"a copy to {self.device} is not done after {deadline_s:g} s: the device does "
                    "not answer"
                )
            time.sleep(POLL_S)


def open_copies(device: torch.device) -> DeviceCopies:
    return CudaCopies(device) if device.type == "cuda" else InOrderCopies(device)
