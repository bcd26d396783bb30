"""What a plan lets travel in a step, by the planner's cost model: copies and bytes by link class,
and the time that links take.

Where tokens go is ``placement.layer_use``, batch by batch as senders choose. With one rank a node,
a copy goes to every other rank that holds experts of a token. With several, one goes to every other
node, to the rank there of the sender's number within its node, and from it to the ranks that hold
them (``comm.dispatcher.HierarchicalDispatcher``).

Each layer is an exchange there and one back, and each takes as long as the link with most to carry:
a node has one link, which carries both ways at once. Letters as in ``placement``; R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from expert_parallel.record_bytes import copy_bytes, link_seconds
from numpy.typing import NDArray

from moeserve.placement.layer_use import LayerUse, split_uses
from moeserve.placement.plan import Plan

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PredictedStep:
    """One way, of one step: ``inter_LNN[l, n, m]`` copies from node n to node m, ``intra_L`` copies
    between ranks of a node."""

    inter_LNN: I64
    intra_L: I64

    @property
    def inter(self) -> int:
        return int(self.inter_LNN.sum())

    @property
    def intra(self) -> int:
        return int(self.intra_L.sum())

    @property
    def busiest_L(self) -> I64:
        """[L]: copies on the link with most, in the direction with most."""
        most_L: I64 = np.maximum(self.inter_LNN.sum(axis=2), self.inter_LNN.sum(axis=1)).max(axis=1)
        return most_L

    def seconds(self, hidden: int, top_k: int, rate: int | None) -> float:
        """What the links between nodes take of a step."""
        return link_seconds(float(self.busiest_L.sum()) * sum(copy_bytes(hidden, top_k)), rate)


def predict(plan: Plan, ids_TLK: I32, home_T: I32, batch: int) -> PredictedStep:
    """A step of these tokens; each home sends ``batch`` of them at a time."""
    inter, intra = [], []
    for use in split_uses(plan, ids_TLK, home_T, batch):
        inter_NN, inside = _layer(plan, use, home_T)
        inter.append(inter_NN)
        intra.append(inside)
    return PredictedStep(np.stack(inter), np.array(intra, np.int64))


def _layer(plan: Plan, use: LayerUse, home_T: I32) -> tuple[I64, int]:
    nodes, size = plan.num_nodes, plan.num_devices // plan.num_nodes
    node_T, rows = plan.node_D[home_T], np.arange(len(home_T))
    inter_NN = np.zeros((nodes, nodes), np.int64)
    np.add.at(inter_NN, node_T, use.used_TN.astype(np.int64))
    np.fill_diagonal(inter_NN, 0)
    # Of each node the token goes to, the rank that its copy comes in by needs no copy more.
    landing_TN = np.arange(nodes) * size + (home_T % size)[:, None]
    landed_TN = use.used_TD[rows[:, None], landing_TN]
    return inter_NN, int(use.used_TD.sum()) - int(landed_TN.sum())
