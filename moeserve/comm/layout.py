"""Where the experts of every layer lie: a placement plan, seen from the ranks that serve it.

Slot s of a layer lies on rank s // (S / R), as in ``placement.plan``. A record numbers slots from
0 within the unit that it is sent to: a rank, or, under the hierarchical dispatcher, a node of
several ranks (``group.ranks_per_node``). The one limit on slots is ``wire.MOST_SLOTS`` in a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.comm.group import Topology, ranks_per_node
from moeserve.errors import PlacementError
from moeserve.kernels.wire import MOST_SLOTS
from moeserve.placement.plan import EMPTY, Plan, contiguous, load


@dataclass(frozen=True, slots=True, eq=False)
class LayerLayout:
    """One layer: ``expert_S[s]`` lies in slot s, -1 is none; ``slots`` on each rank."""

    expert_S: NDArray[np.int32]
    num_experts: int
    world: int

    @property
    def slots(self) -> int:
        return len(self.expert_S) // self.world

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Logical experts of the rank's slots, in order of slots; empty ones come last."""
        mine_S = self.expert_S[rank * self.slots : (rank + 1) * self.slots]
        return tuple(int(e) for e in mine_S if e >= 0)

    def holds(self, experts: int) -> bool:
        """Whether there is a rank of so many."""
        filled_R = (self.expert_S >= 0).reshape(self.world, -1).sum(axis=1)
        return bool((filled_R == experts).any())


def plan_of(
    file: Path | None,
    moe_layers: tuple[int, ...],
    num_experts: int,
    node_R: Sequence[int],
    attention_ranks: int | None = None,
) -> Plan:
    """The plan in ``file``; without one, experts in their own order in as many slots as they are,
    rounded up to a multiple of the ranks. ``node_R[r]`` is the node of rank r.

    Where only the first ``attention_ranks`` have requests, the others share the experts.

    PlacementError where the plan is of another model or group, or puts ranks together on nodes
    as they are not; one that knows a single node fits any. Its dataflow and phase do not matter.
    """
    world = len(node_R)
    if file is None and attention_ranks is not None and attention_ranks < world:
        row_S = _beside_attention(num_experts, world, attention_ranks)
        expert_LS = np.tile(row_S, (len(moe_layers), 1))
        return Plan(expert_LS, num_experts, world, 1, moe_layers)
    if file is None:
        slots = -(-num_experts // world) * world
        expert_LS = contiguous(
            layers=len(moe_layers), experts=num_experts, slots=slots, devices=world
        )
        return Plan(expert_LS, num_experts, world, 1, moe_layers)
    plan = load(file)
    try:
        check(plan, moe_layers, num_experts, world, node_R)
    except PlacementError as error:
        raise PlacementError(f"{file}: {error.message}") from error
    return plan


def _beside_attention(num_experts: int, world: int, attention_ranks: int) -> NDArray[np.int32]:
    """[S]: experts in their order on the ranks behind the first, each of which has one copy of one:
    what a rank sends has the form of the experts that it knows."""
    rows = np.full((world, -(-num_experts // (world - attention_ranks))), EMPTY, np.int32)
    rows[:attention_ranks, 0] = np.arange(attention_ranks) % num_experts
    shares = np.array_split(np.arange(num_experts), world - attention_ranks)
    for row, experts in zip(rows[attention_ranks:], shares, strict=True):
        row[: len(experts)] = experts
    return rows.ravel()


def check(
    plan: Plan,
    moe_layers: tuple[int, ...],
    num_experts: int,
    world: int,
    node_R: Sequence[int] | None = None,
) -> None:
    """PlacementError where these ranks cannot serve this model by this plan. Without ``node_R``
    their nodes are not compared."""
    if (plan.moe_layers, plan.num_experts, plan.num_devices) != (moe_layers, num_experts, world):
        raise PlacementError(
            f"the plan is for {plan.num_experts} experts in layers {list(plan.moe_layers)} on "
            f"{plan.num_devices} devices; the model has {num_experts} in layers "
            f"{list(moe_layers)}, and {world} ranks serve it: solve one for them with "
            "`moeserve place solve`"
        )
    if node_R is not None and plan.num_nodes > 1 and plan.node_D.tolist() != list(node_R):
        raise PlacementError(
            f"the plan has its devices on nodes {plan.node_D.tolist()}, and the ranks run on nodes "
            f"{list(node_R)}: order the hosts so, or solve with --nodes for these"
        )
    size = None if node_R is None else ranks_per_node(Topology(tuple(node_R)))
    require_numbered(plan.slots_per_device, size or 1)


def require_numbered(slots: int, ranks_per_unit: int) -> None:
    """PlacementError where a record cannot number the slots of a unit: ``slots`` of each rank."""
    if slots * ranks_per_unit > MOST_SLOTS:
        unit = "device" if ranks_per_unit == 1 else f"node of {ranks_per_unit} ranks"
        raise PlacementError(
            f"{slots * ranks_per_unit} slots of a layer on a {unit}: a record numbers at most "
            f"{MOST_SLOTS}; solve a plan with fewer --slots, or spread the experts over more "
            f"{'devices' if ranks_per_unit == 1 else 'nodes'}"
        )


def layouts(
    plan: Plan, moe_layers: tuple[int, ...], num_experts: int, world: int
) -> dict[int, LayerLayout]:
    """By model layer number; PlacementError where the plan is of another model or group."""
    check(plan, moe_layers, num_experts, world)
    return {
        layer: LayerLayout(plan.expert_LS[l], num_experts, world)
        for l, layer in enumerate(moe_layers)
    }


def own_experts(layouts: Mapping[int, LayerLayout], rank: int) -> dict[int, tuple[int, ...]]:
    """What the rank loads, by layer: the ``experts`` of ``models.decoder.load_decoder``."""
    return {layer: layout.of_rank(rank) for layer, layout in layouts.items()}
