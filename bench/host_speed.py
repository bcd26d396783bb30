"""How fast a host is at the moment, by two kernels that are always the same.

A host that others use too changes its speed by a fifth or more within seconds. What was predicted
with figures of one minute and measured in another is apart by that, whatever the prediction is
worth. So both are asked how fast the host was meanwhile, and what is known of one minute is said
for the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeserve.forecast.kernels import random_matrix
from moeserve.forecast.timing import CallTimer
from moeserve.kernels.ops import Linear, Ops
from moeserve.offload.model.machine import MachineModel

# Seconds between looks.
EVERY_S = 0.2
# A matrix that stays in a cache and is met by many rows, and one that no cache holds, met by one.
SMALL, ROWS, LARGE = 1024, 64, 8192


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of the kernel that arithmetic binds, and of the one that memory binds."""

    compute: float
    memory: float

    def of(self, machine: MachineModel, before: Speed) -> MachineModel:
        """``machine``, measured with the host as it was ``before``, as it is at this speed."""
        compute, memory = before.compute / self.compute, before.memory / self.memory
        slower = machine.overheads.times(1 / compute)
        return replace(machine.scaled(memory=memory, compute=compute), overheads=slower)


class HostSpeed:
    """A clock that looks at the host as it is asked for the time, and does not count that."""

    def __init__(self, ops: Ops, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ops, self._clock, self._timer = ops, clock, CallTimer(clock, seconds=0.0)
        self._looking = 0.0
        self._seen: list[tuple[float, Speed]] = []
        small, large = (ops.pack_linear(random_matrix("int8", n, n)) for n in (SMALL, LARGE))
        self._compute = self._call(small, ROWS)
        self._memory = self._call(large, 1)
        self.look()

    def _call(self, matrix: Linear, rows: int) -> Callable[[], object]:
        x_TK = torch.randn(rows, matrix.in_features)
        return lambda: self._ops.linear(x_TK, matrix)

    def __call__(self) -> float:
        if self._clock() - self._seen[-1][0] > EVERY_S:
            self.look()
        return self._clock() - self._looking

    def look(self) -> None:
        began = self._clock()
        speed = Speed(*(self._timer.typical(call) for call in (self._compute, self._memory)))
        self._seen.append((self._clock(), speed))
        self._looking += self._seen[-1][0] - began

    @property
    def looks(self) -> int:
        return len(self._seen)

    def since(self, look: int) -> Speed:
        """The median of the looks from that one on."""
        seen = [speed for _, speed in self._seen[look:]]
        return Speed(
            statistics.median(one.compute for one in seen),
            statistics.median(one.memory for one in seen),
        )
