"""The machine a plan is for: devices in nodes, their speeds and the price of a link.

Knows nothing of models. Devices are numbered node by node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError


class Dataflow(StrEnum):
    """How activations travel, and so which placement gain is real (docs/placement.md)."""

    REPLICATED = "replicated"
    HOME_PER_EXPERT = "home-per-expert"
    HOME_DEDUP = "home-dedup"
    MIGRATE = "migrate"

    @property
    def moved_by_grouping(self) -> bool:
        return self in (Dataflow.HOME_DEDUP, Dataflow.MIGRATE)


class Phase(StrEnum):
    """What makes an expert expensive: its tokens, or that its weights are read at all."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Cluster:
    """``node_ratio`` is how much dearer a copy across nodes is than one inside a node.

    ``speeds`` are relative, one per device; empty means all alike. ``memory`` is bytes for
    experts on each device; 0 means unlimited.
    """

    devices: int
    nodes: int = 1
    node_ratio: float = 9.0
    speeds: tuple[float, ...] = ()
    memory: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1:
            raise PlacementError(
                f"devices={self.devices}, nodes={self.nodes}: both must be at least 1"
            )
        if self.devices % self.nodes:
            raise PlacementError(
                f"{self.devices} devices do not divide over {self.nodes} nodes; "
                "every node must have the same number of devices"
            )
        if not math.isfinite(self.node_ratio) or self.node_ratio < 1:
            raise PlacementError(f"node_ratio={self.node_ratio}: must be finite and at least 1")
        if self.speeds and len(self.speeds) != self.devices:
            raise PlacementError(
                f"{len(self.speeds)} device speeds for {self.devices} devices; give one each"
            )
        if any(not math.isfinite(s) or s <= 0 for s in self.speeds):
            raise PlacementError(f"device speeds {self.speeds}: all must be finite and positive")
        if self.memory < 0:
            raise PlacementError(f"memory={self.memory}: bytes per device cannot be negative")

    @property
    def node_D(self) -> NDArray[np.int32]:
        per_node = self.devices // self.nodes
        return np.arange(self.devices, dtype=np.int32) // np.int32(per_node)

    @property
    def speed_D(self) -> NDArray[np.float64]:
        """Speeds with mean 1."""
        speed_D = np.array(self.speeds or (1.0,) * self.devices, np.float64)
        speed_D /= speed_D.mean()
        return speed_D
