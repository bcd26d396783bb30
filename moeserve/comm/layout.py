"""Where the experts of every layer lie: a placement plan, seen from the ranks that serve it.

Slot s of a layer lies on rank s // (S / R), as in ``placement.plan``; a rank numbers its
own from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class LayerLayout:
    """One layer: ``expert_S[s]`` lies in slot s; ``slots`` on each rank."""

    expert_S: NDArray[np.int32]
    num_experts: int
    world: int

    @property
    def slots(self) -> int:
        return len(self.expert_S) // self.world

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Logical experts of the rank's slots, in order of slots."""
        return tuple(int(e) for e in self.expert_S[rank * self.slots : (rank + 1) * self.slots])


def layouts(
    plan: Plan, moe_layers: tuple[int, ...], num_experts: int, world: int
) -> dict[int, LayerLayout]:
    """By model layer number; PlacementError where the plan is of another model or group."""
    if (plan.moe_layers, plan.num_experts, plan.num_devices) != (moe_layers, num_experts, world):
        raise PlacementError(
            f"the plan is for {plan.num_experts} experts in layers {list(plan.moe_layers)} on "
            f"{plan.num_devices} devices; the model has {num_experts} in layers "
            f"{list(moe_layers)}, and {world} ranks serve it: solve one for them with "
            "`moeserve place solve`"
        )
    return {
        layer: LayerLayout(plan.expert_LS[l], num_experts, world)
        for l, layer in enumerate(moe_layers)
    }
