"""What a step takes under a plan, by rates: the one figure in which copies and balance are traded.

A layer of a step waits for its slowest device and then for its fullest link::

    step = expert * k * (max over devices of load / speed)
         + copy * (max over devices of copies, those across nodes counted node_ratio times)

in the time that one token takes, devices being equally busy with tokens of their own; k is the mean
number of experts of a token. Evenly spread copies give the priced copies of ``cost``. Where only
counts are known, or the dataflow gives every link the same, the second maximum is the mean, or is
left out. Pure; a prediction to compare plans by, not a clock.

What one expert takes beside one copy follows from a cluster's topology and the model's sizes
(``rates_of``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import BATCH, imbalance, priced
from moeserve.placement.layer_use import LayerUse, layer_uses, round_robin_homes, split_uses
from moeserve.placement.plan import Plan
from moeserve.placement.report import loads, traffic_of
from moeserve.placement.routing import Routing
from moeserve.placement.topology import ClusterTopology

F64 = NDArray[np.float64]

USUAL_FLOPS_PER_S = 500e12  # of devices whose topology does not say


@dataclass(frozen=True, slots=True)
class PlacementRates:
    """Times in any unit: of one expert on one token, and of one copy inside a node, one way.

    The default, where no topology is given, is DeepSeek-V3 on H800: ``ModelSizes()`` at 500 TFLOP/s
    and the 43 GB/s that DeepEP publishes over RDMA.
    """

    expert: float = 0.7
    copy: float = 1.0

    def __post_init__(self) -> None:
        for name in ("expert", "copy"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise PlacementError(f"rate {name}={value}: must be finite and at least 0")
        if self.expert == self.copy == 0:
            raise PlacementError("rates: experts and copies cannot both take no time")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Operations of one expert on one token; bytes of a copy, the mean of out and back. The default
    is DeepSeek-V3."""

    expert_flops: float = 88e6
    copy_bytes: float = 10.9e3

    def __post_init__(self) -> None:
        for name in ("expert_flops", "copy_bytes"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise PlacementError(f"{name}={value}: must be finite and positive")


def rates_of(topology: ClusterTopology, sizes: ModelSizes | None = None) -> PlacementRates:
    """Of a device of mean speed, in the time of a copy inside a node; what copies across nodes cost
    beside that is the cluster's ``node_ratio``."""
    sizes = sizes or ModelSizes()
    flops_per_s = topology.mean_speed * (topology.flops_per_s or USUAL_FLOPS_PER_S)
    copy_s = sizes.copy_bytes / topology.inside.bandwidth_bytes_per_s
    return PlacementRates(sizes.expert_flops / flops_per_s / copy_s, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class StepFigures:
    """Of every layer: max/mean load of the mixture, priced copies (None: only counts are known),
    and the predicted step in the unit of the rates."""

    imbalance_L: F64
    copies_L: F64 | None
    step_L: F64

    @property
    def imbalance(self) -> float:
        return float(self.imbalance_L.mean())

    @property
    def copies(self) -> float | None:
        return None if self.copies_L is None else float(self.copies_L.mean())

    @property
    def step(self) -> float:
        return float(self.step_L.mean())


def step_figures(
    plan: Plan, routing: Routing, cluster: Cluster, rates: PlacementRates, batch: int = 256
) -> StepFigures:
    """``batch`` is the tokens of a decode step, read only in that phase."""
    uneven_L = imbalance(plan, loads(plan, routing, batch) @ routing.mix_W, cluster.speed_D)
    if not routing.has_tokens:
        return StepFigures(uneven_L, None, rates.expert * uneven_L)
    tokens_TLK = routing.tokens_TLK
    k = float((tokens_TLK >= 0).mean()) * tokens_TLK.shape[2]
    if plan.dataflow is Dataflow.HOME_DEDUP:
        copies_L, fullest_L = _links(plan, routing, cluster)
    else:
        moves = traffic_of(plan, routing)
        assert moves is not None
        copies_L = moves.copies_L + (cluster.node_ratio - 1) * moves.cross_L
        fullest_L = copies_L
    return StepFigures(uneven_L, copies_L, rates.expert * k * uneven_L + rates.copy * fullest_L)


def _links(plan: Plan, routing: Routing, cluster: Cluster) -> tuple[F64, F64]:
    """[L] each: priced copies, and those of the fullest device times the number of devices."""
    tokens_TLK, weight_T = routing.tokens_TLK, routing.token_weight_T / len(routing.token_weight_T)
    uses = layer_uses(plan, tokens_TLK)
    home_T = None
    if (plan.copies_LE > 1).any():
        home_T = round_robin_homes(len(tokens_TLK), plan.num_devices, BATCH)
        uses = split_uses(plan, tokens_TLK, home_T, BATCH)
    mean, fullest = [], []
    for use in uses:
        came_D, came_N = _arrivals(plan, use, weight_T, home_T)
        per_node = plan.num_devices // plan.num_nodes
        link_D = came_D + (cluster.node_ratio - 1) * (came_N / per_node)[plan.node_D]
        mean.append(2 * priced(float(came_D.sum()), float(came_N.sum()), cluster.node_ratio))
        fullest.append(2 * plan.num_devices * float(link_D.max()))
    return np.array(mean), np.array(fullest)


def _arrivals(
    plan: Plan, use: LayerUse, weight_T: F64, home_T: NDArray[np.int32] | None
) -> tuple[F64, F64]:
    """Copies that come to each device, and across to each node, per token; homes even if None."""
    if home_T is None:
        came_D = weight_T @ use.used_TD * (1 - 1 / plan.num_devices)
        return came_D, weight_T @ use.used_TN * (1 - 1 / plan.num_nodes)
    rows_T = np.arange(len(home_T))
    away_TD, away_TN = use.used_TD.copy(), use.used_TN.copy()
    away_TD[rows_T, home_T] = False
    away_TN[rows_T, plan.node_D[home_T]] = False
    return weight_T @ away_TD, weight_T @ away_TN
