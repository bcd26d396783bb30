"""The cluster that arguments of ``moeserve place`` speak of: flags, or a file in their place; and
what steps take on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moeserve.errors import PlacementError
from moeserve.placement import topology
from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.step_time import ModelSizes, PlacementRates, rates_of

_USUAL = {"devices": None, "nodes": 1, "node_ratio": 9.0, "speeds": (), "memory": 0}


def describe_cluster(arguments: argparse.Namespace) -> None:
    """Fill in what was not said of the cluster: from the topology, or what is usual; and the
    ``rates`` of a step on it."""
    asked = vars(arguments)
    if "topology" not in asked:
        return
    given = [name for name in _USUAL if asked.get(name) is not None]
    described: dict[str, Any] = dict(_USUAL)
    if arguments.topology is not None:
        if given:
            option = "--" + given[0].replace("_", "-")
            raise PlacementError(f"{option} beside --topology: the file says it; give one of both")
        cluster = topology.load(Path(arguments.topology)).cluster()
        described = {name: getattr(cluster, name) for name in _USUAL}
    asked.update({name: value for name, value in described.items() if name not in given})
    arguments.rates = _rates(arguments)


def plan_cluster(plan: Plan, arguments: argparse.Namespace) -> Cluster:
    """Of the plan's size, with the rates and speeds that were asked for."""
    if arguments.topology is not None:
        cluster = topology.load(Path(arguments.topology)).cluster()
        if (cluster.devices, cluster.nodes) != (plan.num_devices, plan.num_nodes):
            raise PlacementError(
                f"{arguments.topology} has {cluster.devices} devices in {cluster.nodes} nodes, the "
                f"plan {plan.num_devices} in {plan.num_nodes}"
            )
        return cluster
    return Cluster(plan.num_devices, plan.num_nodes, arguments.node_ratio, tuple(arguments.speeds))


def _rates(arguments: argparse.Namespace) -> PlacementRates:
    """By the topology, for a model of the sizes that were given; the usual rates without one."""
    if arguments.topology is None:
        return PlacementRates()
    usual, copies = ModelSizes(), arguments.dispatch_bytes + arguments.combine_bytes
    flops = usual.expert_flops if arguments.expert_flops is None else arguments.expert_flops
    sizes = ModelSizes(flops, copies / 2 or usual.copy_bytes)
    return rates_of(topology.load(Path(arguments.topology)), sizes)
