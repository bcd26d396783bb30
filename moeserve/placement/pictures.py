"""What is to be seen of a plan, as heat maps: loads of devices, experts used together, traffic."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cost import device_loads
from moeserve.placement.heat_map import HeatMap, Scale
from moeserve.placement.layer_use import layer_uses
from moeserve.placement.plan import EMPTY, Plan
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.dp import affinity

F64 = NDArray[np.float64]
MOST_BORDERS = 64  # more are no help


def coactivation(topk_TK: NDArray[np.int32], experts: int) -> F64:
    """[E, E] share of the layer's tokens that use both experts."""
    used_TE = np.zeros((len(topk_TK), experts), np.float32)
    for k in range(topk_TK.shape[1]):
        valid = topk_TK[:, k] >= 0
        used_TE[np.flatnonzero(valid), topk_TK[valid, k]] = 1
    both_EE = (used_TE.T @ used_TE).astype(np.float64) / max(1, len(topk_TK))
    np.fill_diagonal(both_EE, 0)
    return both_EE


def device_traffic(plan: Plan, topk_TLK: NDArray[np.int32]) -> F64:
    """[D, D] share of token-layers that use both devices; the diagonal is that of each device."""
    both_DD = np.zeros((plan.num_devices, plan.num_devices))
    for use in layer_uses(plan, topk_TLK):
        used_TD = use.used_TD.astype(np.float32)
        both_DD += used_TD.T @ used_TD
    return both_DD / (len(topk_TLK) * plan.num_layers)


def load_maps(plans: Mapping[str, Plan], routing: Routing) -> list[HeatMap]:
    """Load of each device over the mean, for plans by name, all in one scale."""
    load_LE = routing.mixed_LE
    maps = []
    for name, plan in plans.items():
        over_LD = device_loads(plan, load_LE) * plan.num_devices
        most, least = over_LD.max(), over_LD.min()
        worst = plan.moe_layers[int(over_LD.max(axis=1).argmax())]
        says = (
            f"From {least:.2f} to {most:.2f} of the mean; the fullest device is in layer {worst}."
        )
        maps.append(
            HeatMap(
                name, over_LD, Scale.LOAD, "device", "MoE layer", says, columns_before=_nodes(plan)
            )
        )
    return maps


def layer_maps(plan: Plan, routing: Routing, layer: int) -> list[HeatMap]:
    """Experts of one layer used together, and with those of the next, in the order of slots."""
    topk_TLK = routing.tokens_TLK
    order, borders = _filled(plan, layer)
    both_EE = coactivation(topk_TLK[:, layer], plan.num_experts)[np.ix_(order, order)]
    number = plan.moe_layers[layer]
    blind = (len(order) / plan.num_devices - 1) / max(1, len(order) - 1)
    maps = [
        HeatMap(
            f"Experts used together in layer {number}",
            both_EE,
            Scale.SHARE,
            "slot",
            "slot",
            f"{_inside(both_EE, borders, borders):.0%} of pairs lie on one device (lines are "
            f"borders of devices), {blind:.0%} if experts were shuffled.",
            borders,
            borders,
        )
    ]
    if layer + 1 < plan.num_layers:
        pairs_EE = affinity(topk_TLK[:, layer : layer + 2], plan.num_experts)[0]
        after, after_borders = _filled(plan, layer + 1)
        pairs_EE = pairs_EE[np.ix_(order, after)]
        following = plan.moe_layers[layer + 1]
        maps.append(
            HeatMap(
                f"From experts of layer {number} to those of layer {following}",
                pairs_EE,
                Scale.SHARE,
                f"slot in layer {following}",
                f"slot in layer {number}",
                f"{_inside(pairs_EE, borders, after_borders):.0%} of pairs stay on one device. "
                "Only where tokens migrate does this save copies.",
                after_borders,
                borders,
            )
        )
    return maps


def traffic_maps(plans: Mapping[str, Plan], routing: Routing) -> list[HeatMap]:
    """Devices that tokens use together, what crosses between them, for plans by name in one
    scale."""
    both = {name: device_traffic(plan, routing.tokens_TLK) for name, plan in plans.items()}
    uses = {name: float(np.trace(both_DD)) for name, both_DD in both.items()}
    for both_DD in both.values():
        np.fill_diagonal(both_DD, 0)
    most = max(float(both_DD.max()) for both_DD in both.values())
    maps = []
    for name, both_DD in both.items():
        nodes = _nodes(plans[name])
        says = f"A token uses {uses[name]:.2f} devices in a layer."
        maps.append(
            HeatMap(name, both_DD, Scale.SHARE, "device", "device", says, nodes, nodes, most=most)
        )
    return maps


def require_layer(plan: Plan, layer: int) -> None:
    if not 0 <= layer < plan.num_layers:
        raise PlacementError(f"layer {layer}: the plan has {plan.num_layers}")


def _nodes(plan: Plan) -> tuple[int, ...]:
    """Devices before which a node ends."""
    return tuple(np.flatnonzero(np.diff(plan.node_D)) + 1) if plan.num_nodes > 1 else ()


def _filled(plan: Plan, layer: int) -> tuple[NDArray[np.int32], tuple[int, ...]]:
    """Experts in the order of slots, and where a device begins among them."""
    filled_S = plan.expert_LS[layer] != EMPTY
    device_X = plan.device_S[filled_S]
    borders = np.flatnonzero(np.diff(device_X)) + 1
    return plan.expert_LS[layer][filled_S], tuple(int(b) for b in borders)


def _inside(matrix: F64, rows_before: tuple[int, ...], columns_before: tuple[int, ...]) -> float:
    """Share of the matrix that lies in the blocks of devices."""
    device_R = np.searchsorted(rows_before, np.arange(matrix.shape[0]), side="right")
    device_C = np.searchsorted(columns_before, np.arange(matrix.shape[1]), side="right")
    inside = matrix[device_R[:, None] == device_C[None, :]].sum()
    return float(inside / max(matrix.sum(), 1e-300))
