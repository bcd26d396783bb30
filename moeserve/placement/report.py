"""The figures of a plan on given routing: what ``evaluate`` prints and ``solve`` writes down.

``objective`` and ``bound`` are of one kind: priced copies per token-layer where grouping moves
anything (home-dedup, migrate, with tokens at hand), else the mean imbalance: of the mixture where
workloads are traces, which are served together; of the worst where they are counts, which are
alternatives. ``gap`` is
objective / bound - 1, and None where the bound is 0. ``bound_is`` says which bound it is, and of
which plans: "columns" is for those no more unbalanced than this one, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import (
    Traffic,
    histogram_homes,
    imbalance,
    phase_loads,
    traffic,
)
from moeserve.placement.plan import Plan
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.bounds import copies_bounds, mean_balance_bound
from moeserve.placement.solvers.columns.certify import PlanBounds
from moeserve.placement.solvers.columns.levels import BoundedRouting


@dataclass(frozen=True, slots=True)
class CopyBytes:
    """What one copy weighs on its way out and back; 0 leaves bytes out of the report."""

    dispatch: int = 0
    combine: int = 0


@dataclass(frozen=True, slots=True)
class BoundEffort:
    """Seconds that a bound by columns may take; 0 leaves it at what is known at once."""

    seconds: float = 0.0
    threads: int = 1


def loads(plan: Plan, routing: Routing, batch: int) -> NDArray[np.float64]:
    """[L, E, W] shares, or in decode the chances that experts are read."""
    k = max(w.topk_TLK.shape[2] if w.topk_TLK is not None else 1 for w in routing.workloads)
    shares = routing.share_LEW
    return np.stack(
        [
            phase_loads(shares[:, :, w], plan.phase, batch=batch, k=k)
            for w in range(shares.shape[2])
        ],
        axis=2,
    )


def check_fits(plan: Plan, routing: Routing) -> None:
    if (routing.num_layers, routing.num_experts) != (plan.num_layers, plan.num_experts):
        raise PlacementError(
            f"the routing has {routing.num_layers} layers of {routing.num_experts} experts, the "
            f"plan {plan.num_layers} of {plan.num_experts}; they must be of one model"
        )


def figures(
    plan: Plan,
    routing: Routing,
    cluster: Cluster,
    *,
    batch: int = 256,
    homes: str = "uniform",
    copy_bytes: CopyBytes | None = None,
    effort: BoundEffort | None = None,
    bound_L: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Everything about ``plan`` on ``routing``, except how long it took to find."""
    check_fits(plan, routing)
    load_LEW = loads(plan, routing, batch)
    share_W = routing.mix_W
    by_workload_WL = np.stack(
        [imbalance(plan, load_LEW[:, :, w], cluster.speed_D) for w in range(len(share_W))]
    )
    mixed_L = imbalance(plan, load_LEW @ share_W, cluster.speed_D)
    moves = traffic_of(plan, routing, homes)
    report: dict[str, Any] = {
        "imbalance": {
            "mean": float(mixed_L.mean()),
            "worst": float(mixed_L.max()),
            "per_layer": [round(float(x), 6) for x in mixed_L],
            "per_workload": {
                w.name: {"mean": float(row.mean()), "worst": float(row.max())}
                for w, row in zip(routing.workloads, by_workload_WL, strict=True)
            },
        },
        "copies_per_token_layer": None if moves is None else moves.copies,
        "cross_node_copies_per_token_layer": None if moves is None else moves.cross,
    }
    report |= _bytes(moves, plan, copy_bytes or CopyBytes())
    if plan.dataflow.moved_by_grouping and moves is not None:
        bounded = BoundedRouting(
            routing.tokens_TLK, routing.token_weight_T, load_LEW @ share_W, homes != "uniform"
        )
        report |= copies_figures(plan, bounded, cluster, moves, effort or BoundEffort(), bound_L)
    else:
        alternatives = load_LEW if not routing.has_tokens else (load_LEW @ share_W)[:, :, None]
        report |= _balance_figures(plan, cluster, alternatives)
    return report


def traffic_of(plan: Plan, routing: Routing, homes: str = "uniform") -> Traffic | None:
    """None where only counts are known and the dataflow depends on tokens."""
    if plan.dataflow is Dataflow.REPLICATED:
        return traffic(plan, np.zeros((0, plan.num_layers, 1), np.int32))
    if not routing.has_tokens:
        return None
    home_T = None
    if homes == "histogram":
        home_T = histogram_homes(plan, routing, prefix=0.25)
    elif homes != "uniform":
        raise PlacementError(f"homes={homes!r}: expected 'uniform' or 'histogram'")
    return traffic(plan, routing.tokens_TLK, weight_T=routing.token_weight_T, home_T=home_T)


def _bytes(moves: Traffic | None, plan: Plan, weigh: CopyBytes) -> Mapping[str, Any]:
    if moves is None or weigh.dispatch + weigh.combine == 0:
        return {}
    per_copy = (weigh.dispatch + weigh.combine) / 2
    return {
        "bytes_per_token": {
            "inside_nodes": (moves.copies - moves.cross) * per_copy * plan.num_layers,
            "across_nodes": moves.cross * per_copy * plan.num_layers,
        }
    }


def worst_imbalance(plan: Plan, load_LEW: NDArray[np.float64], cluster: Cluster) -> float:
    """Mean over layers, of the worst workload."""
    means = [imbalance(plan, w, cluster.speed_D).mean() for w in np.moveaxis(load_LEW, 2, 0)]
    return float(max(means))


def copies_figures(
    plan: Plan,
    routing: BoundedRouting,
    cluster: Cluster,
    moves: Traffic,
    effort: BoundEffort,
    shown_L: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Objective, bound and gap, of all layers and of each, where grouping moves copies.

    ``shown_L`` are bounds by columns that are known already.
    """
    objective_L = moves.copies_L + (cluster.node_ratio - 1) * moves.cross_L
    at_once_L = copies_bounds(
        plan,
        routing.topk_TLK,
        node_ratio=cluster.node_ratio,
        weight_T=routing.weight_T,
        any_home=routing.any_home,
    )
    if shown_L is None and effort.seconds > 0:
        bounds = PlanBounds(plan, routing, cluster, routing.most_L(plan, cluster, 1.0))
        bounds.run(seconds=effort.seconds, nodes=1 << 60, threads=effort.threads)
        shown_L = bounds.bound_L()
    bound_L = at_once_L if shown_L is None else np.maximum(at_once_L, shown_L)
    same_L = np.isclose(bound_L, objective_L, rtol=1e-9, atol=1e-9)  # but for rounding
    bound_L = np.where(same_L, objective_L, bound_L)
    objective, bound = float(objective_L.mean()), float(bound_L.mean())
    by_columns = shown_L is not None and bool((shown_L > at_once_L).any())
    return {
        "objective": objective,
        "objective_is": "priced copies per token-layer",
        "bound": bound,
        "bound_is": "columns" if by_columns else "pairs of experts, any balance",
        "gap": objective / bound - 1 if bound else None,
        "bound_per_layer": [round(float(x), 6) for x in bound_L],
        "objective_per_layer": [round(float(x), 6) for x in objective_L],
        "layers_proven": int((objective_L == bound_L).sum()),
    }


def _balance_figures(plan: Plan, cluster: Cluster, load_LEW: NDArray[np.float64]) -> dict[str, Any]:
    objective = worst_imbalance(plan, load_LEW, cluster)
    bound = max(
        mean_balance_bound(load_LE, cluster.speed_D, plan.num_slots)
        for load_LE in np.moveaxis(load_LEW, 2, 0)
    )
    several = load_LEW.shape[2] > 1
    return {
        "objective": objective,
        "objective_is": "mean imbalance, worst workload" if several else "mean imbalance",
        "bound": bound,
        "bound_is": "heaviest copies",
        "gap": objective / bound - 1 if bound else None,
    }
