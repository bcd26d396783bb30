"""The work that a device has been given, as the host sees it: a mark, and whether it has passed.

``DeviceWork`` is of an accelerator, whose module in torch is like ``torch.cuda``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# How a wait for a device goes: other threads run between looks, which come less often later on.
_BUSY_S = 0.001
_PAUSE_S = 0.0001


class GivenWork(Protocol):
    """Of one device, in order."""

    def mark(self) -> Any:
        """What the device has been given until here."""
        ...

    def passed(self, mark: Any, wait_s: float) -> bool:
        """Whether it has done all that, after at most so long."""
        ...

    def to_host(self, numbers: Tensor) -> Tensor:
        """A copy on the host, which is whole once a mark made after this call has passed."""
        ...


def poll(over: Callable[[], bool], wait_s: float) -> bool:
    """Whether it is over, after at most so long."""
    begun = time.monotonic()
    while not over():
        waited_s = time.monotonic() - begun
        if waited_s >= wait_s:
            return False
        time.sleep(0.0 if waited_s < _BUSY_S else _PAUSE_S)
    return True


class DeviceWork:
    """On the current stream of the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: Any = torch.get_device_module(device)

    def mark(self) -> Any:
        event = self._of.Event()
        event.record(self._of.current_stream(self._device))
        return event

    def passed(self, mark: Any, wait_s: float) -> bool:
        return poll(mark.query, wait_s)

    def to_host(self, numbers: Tensor) -> Tensor:
        there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        return there.copy_(numbers, non_blocking=True)


class NoWork:
    """Of a device that has done what it was given as soon as the call returns."""

    def mark(self) -> None: ...

    def passed(self, mark: Any, wait_s: float) -> bool:
        return True

    def to_host(self, numbers: Tensor) -> Tensor:
        return numbers.cpu()
