"""Name the groups of each layer so that tokens stay where they are, for the migrating dataflow.

Grouping leaves open which device gets which group. ``chain`` settles it layer after layer: given
where the tokens stand, the names of the next layer are an assignment problem (nodes first, then
devices inside a node). ``sweep`` then regroups each layer with a rebate for the devices where its
tokens come from and where they are wanted next. ``nearest`` names groups after an existing plan.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.layer_use import layer_uses
from moeserve.placement.migration import fit_guide, landing
from moeserve.placement.plan import Plan, held, tidy, with_slots
from moeserve.placement.problem import Problem
from moeserve.placement.solvers.annealing import AnnealingSchedule
from moeserve.placement.solvers.grouping import group_layer, prices
from moeserve.placement.solvers.search import assign

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def best_names(gain_DD: F64, nodes: int) -> I32:
    """New device of each group, groups of a node staying together: the most gain.

    ``gain_DD[g, d]`` is what group g brings when it is named d.
    """
    devices = len(gain_DD)
    per_node = devices // nodes
    if nodes == 1:
        return assign(-gain_DD)
    blocks = gain_DD.reshape(nodes, per_node, nodes, per_node)
    inner = np.zeros((nodes, nodes, per_node), np.int32)
    total_NN = np.zeros((nodes, nodes))
    for a in range(nodes):
        for b in range(nodes):
            inner[a, b] = assign(-blocks[a, :, b])
            total_NN[a, b] = blocks[a, np.arange(per_node), b, inner[a, b]].sum()
    node_N = assign(-total_NN)
    names = [node_N[a] * per_node + inner[a, node_N[a]] for a in range(nodes)]
    return np.concatenate(names).astype(np.int32)


def renamed(expert_S: I32, names_D: I32) -> I32:
    """The row with group d moved to device ``names_D[d]``."""
    groups = expert_S.reshape(len(names_D), -1)
    moved = np.empty_like(groups)
    moved[names_D] = groups
    return moved.ravel()


def with_guide(plan: Plan, topk_TLK: I32) -> Plan:
    return replace(plan, guide_LED=fit_guide(plan, topk_TLK))


def one_layer(plan: Plan, l: int) -> Plan:
    guide = None if plan.guide_LED is None else plan.guide_LED[l : l + 1]
    return replace(
        plan, expert_LS=plan.expert_LS[l : l + 1], moe_layers=(plan.moe_layers[l],), guide_LED=guide
    )


def chain(plan: Plan, topk_TLK: I32, weight_T: F64) -> Plan:
    """The plan with every layer's groups named so that most tokens can stay."""
    rows = [plan.expert_LS[0]]
    bare = replace(plan, guide_LED=None)
    at_T = _landed(bare, 0, topk_TLK)
    for l in range(1, plan.num_layers):
        use = next(layer_uses(one_layer(bare, l), topk_TLK[:, l : l + 1]))
        gain_DD = np.zeros((plan.num_devices, plan.num_devices))
        np.add.at(gain_DD.T, at_T, use.used_TD * weight_T[:, None])
        names_D = best_names(gain_DD, plan.num_nodes)
        rows.append(renamed(plan.expert_LS[l], names_D))
        named = with_slots(one_layer(bare, l), rows[-1][None])
        use = next(layer_uses(named, topk_TLK[:, l : l + 1]))
        landed_T = landing(named, 0, topk_TLK[:, l], use)
        # A token stays where it can; the others follow the majority of their experts.
        at_T = np.where(use.used_TD[np.arange(len(at_T)), at_T], at_T, landed_T).astype(np.int32)
    return with_guide(with_slots(bare, tidy(np.stack(rows), plan.num_devices)), topk_TLK)


def _landed(plan: Plan, l: int, topk_TLK: I32) -> I32:
    layer = one_layer(plan, l)
    use = next(layer_uses(layer, topk_TLK[:, l : l + 1]))
    return landing(layer, 0, topk_TLK[:, l], use)


def sweep(
    problem: Problem,
    plan: Plan,
    topk_TLK: I32,
    load_LEW: F64,
    weight_T: F64,
    schedule: AnnealingSchedule,
    *,
    forward: bool,
) -> Plan:
    """Every layer regrouped once, given where its tokens come from and go to."""
    rows = plan.expert_LS.copy()
    price = prices(problem)[0]
    order = range(plan.num_layers) if forward else range(plan.num_layers - 1, -1, -1)
    current = plan
    for l in order:
        rebate_DT = np.zeros((plan.num_devices, len(topk_TLK)), np.uint8)
        tokens = np.arange(len(topk_TLK))
        if l > 0:
            rebate_DT[_landed(current, l - 1, topk_TLK), tokens] += np.uint8(price // 2)
        if l + 1 < plan.num_layers:
            rebate_DT[_landed(current, l + 1, topk_TLK), tokens] += np.uint8(price // 4)
        rows[l] = group_layer(
            problem, rows[l], topk_TLK[:, l], load_LEW[l], weight_T, l, schedule, rebate_DT
        )
        current = with_slots(current, rows.copy())
    return with_guide(with_slots(plan, tidy(rows, plan.num_devices)), topk_TLK)


def nearest(plan: Plan, previous: Plan) -> Plan:
    """The plan with groups named so that the fewest experts move away from ``previous``."""
    held_LDE = held(previous)
    rows = []
    for l in range(plan.num_layers):
        groups = plan.expert_LS[l].reshape(plan.num_devices, -1)
        kept_GD = held_LDE[l][:, groups].sum(axis=2).T.astype(np.float64)
        rows.append(renamed(plan.expert_LS[l], best_names(kept_GD, plan.num_nodes)))
    return with_slots(plan, tidy(np.stack(rows), plan.num_devices))
