"""A real cluster as a file: nodes, rails, rates of each class of link, devices' speed and memory.

TOML, or JSON with the same keys (by the file's ending)::

    format = "moeserve-topology"
    version = 1
    name = "8 nodes of 8 H200"

    [links.inside]                      between the devices of one node
    bandwidth_bytes_per_s = 450e9       of each device, one direction
    latency_s = 2e-6                    of one message (optional, 0)

    [links.across]                      between nodes
    bandwidth_bytes_per_s = 50e9        of each rail, one direction
    latency_s = 5e-6

    [devices]                           what experts are computed at (optional)
    flops_per_s = 500e12                of a device of speed 1, as reached by large matrix products

    [[nodes]]                           groups of nodes that are alike, in the devices' order
    count = 8
    devices = 8                         in each node; the same in every group
    rails = 8                           network ports that the node's devices share (optional: one
                                        for each device)
    speed = 1.0                         of a device, relative (optional)
    memory_bytes = 100e9                for experts on each device (optional, 0: no limit)

Numbers may be written as whole or as floating point. Keys that are not listed are refused, as are
values outside of what they can mean: a PlacementError names the file and the key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster
from moeserve.placement.files import MOST_DEVICES, read_text, reason, shown

FORMAT = "moeserve-topology"
VERSION = 1
MOST_TOPOLOGY_BYTES = 1 << 20
MOST_NAME = 200
# Bytes per second, bytes, speeds, and operations per second: more is a slip of the unit.
MOST_RATE, MOST_MEMORY, MOST_SPEED, MOST_FLOPS = 1e15, 1e15, 1e6, 1e21
MOST_LATENCY_S = 10.0

_TOP = {"format", "version", "name", "links", "nodes"}
_DEVICES = {"flops_per_s"}
_CLASSES = {"inside", "across"}
_LINK = {"bandwidth_bytes_per_s", "latency_s"}
_GROUP = {"count", "devices", "rails", "speed", "memory_bytes"}


@dataclass(frozen=True, slots=True)
class LinkClass:
    """Bytes a second of one direction, and seconds of one message."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """``count`` nodes that are alike; ``memory_bytes`` 0 is no limit."""

    count: int
    devices: int
    rails: int
    speed: float = 1.0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ClusterTopology:
    """``inside`` is of each device, ``across`` of each rail. ``flops_per_s`` are of a device of
    speed 1; 0 where the file does not say."""

    name: str
    inside: LinkClass
    across: LinkClass
    groups: tuple[NodeGroup, ...]
    flops_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.groups:
            raise PlacementError("nodes: a cluster needs one group of nodes at least")
        sizes = sorted({group.devices for group in self.groups})
        if len(sizes) > 1:
            raise PlacementError(
                f"nodes: groups have {' and '.join(map(str, sizes))} devices in a node; plans are "
                "for nodes of one size: describe a larger node as several"
            )
        if self.devices > MOST_DEVICES:
            raise PlacementError(f"nodes: {self.devices} devices in all, at most {MOST_DEVICES}")

    @property
    def nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def devices(self) -> int:
        return sum(group.count * group.devices for group in self.groups)

    @property
    def across_per_device(self) -> float:
        """Bytes a second that a device has across nodes: its share of the node's rails. Where nodes
        differ, the mean over devices of the time of a byte."""
        seconds = sum(
            group.count * group.devices * group.devices / group.rails for group in self.groups
        )
        return self.across.bandwidth_bytes_per_s * self.devices / seconds

    @property
    def mean_speed(self) -> float:
        return sum(g.count * g.devices * g.speed for g in self.groups) / self.devices

    @property
    def node_ratio(self) -> float:
        """What a copy across nodes costs over one inside; never less than as much."""
        return max(1.0, self.inside.bandwidth_bytes_per_s / self.across_per_device)

    def cluster(self) -> Cluster:
        """What solvers need of it. Memory is that of the smallest device."""
        speeds = [g.speed for g in self.groups for _ in range(g.count * g.devices)]
        alike = len(set(speeds)) == 1
        limits = [g.memory_bytes for g in self.groups if g.memory_bytes]
        return Cluster(
            self.devices,
            self.nodes,
            self.node_ratio if self.nodes > 1 else 1.0,
            () if alike else tuple(speeds),
            min(limits, default=0),
        )


def load(path: Path) -> ClusterTopology:
    """The cluster that ``path`` describes."""
    text = read_text(path, MOST_TOPOLOGY_BYTES)
    try:
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise PlacementError(f"{path} is not {kind}: {reason(cause)}") from cause
    try:
        return _topology(document)
    except PlacementError as cause:
        raise PlacementError(f"{path}: {cause.message}") from cause


def _topology(document: Any) -> ClusterTopology:
    top = _table(document, "the file", _TOP | {"devices"}, required=_TOP)
    if top["format"] != FORMAT:
        raise PlacementError(f'format={shown(top["format"])}: must be "{FORMAT}"')
    if top["version"] != VERSION:
        raise PlacementError(f"version={shown(top['version'])}: this reads version {VERSION}")
    name = top["name"]
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
        raise PlacementError(f"name={shown(name)}: must be text of 1 to {MOST_NAME} characters")
    links = _table(top["links"], "links", _CLASSES, required=_CLASSES)
    groups = top["nodes"]
    if not isinstance(groups, list) or len(groups) > MOST_DEVICES:
        raise PlacementError("nodes: must be a list of groups of nodes ([[nodes]])")
    return ClusterTopology(
        name,
        _link(links["inside"], "links.inside"),
        _link(links["across"], "links.across"),
        tuple(_group(group, f"nodes[{i}]") for i, group in enumerate(groups)),
        _flops_per_s(top),
    )


def _flops_per_s(top: Mapping[str, Any]) -> float:
    if "devices" not in top:
        return 0.0
    table = _table(top["devices"], "devices", _DEVICES, required=_DEVICES)
    return _number(table, "flops_per_s", "devices", 1.0, MOST_FLOPS)


def _link(value: Any, where: str) -> LinkClass:
    table = _table(value, where, _LINK, required={"bandwidth_bytes_per_s"})
    return LinkClass(
        _number(table, "bandwidth_bytes_per_s", where, 1.0, MOST_RATE),
        _number(table, "latency_s", where, 0.0, MOST_LATENCY_S, 0.0),
    )


def _group(value: Any, where: str) -> NodeGroup:
    table = _table(value, where, _GROUP, required={"count", "devices"})
    devices = _whole(table, "devices", where, 1, MOST_DEVICES)
    return NodeGroup(
        _whole(table, "count", where, 1, MOST_DEVICES),
        devices,
        _whole(table, "rails", where, 1, MOST_DEVICES, devices),
        _number(table, "speed", where, 1e-6, MOST_SPEED, 1.0),
        _whole(table, "memory_bytes", where, 0, int(MOST_MEMORY), 0),
    )


def _table(value: Any, where: str, known: set[str], required: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PlacementError(f"{where}: must be a table, not {shown(value)}")
    unknown = sorted(shown(key) for key in value.keys() - known)
    if unknown:
        raise PlacementError(
            f"{where}: unknown key {unknown[0]}; it may have {', '.join(sorted(known))}"
        )
    missing = sorted(required - value.keys())
    if missing:
        raise PlacementError(f"{where}: lacks {', '.join(missing)}")
    return value


def _number(
    table: Mapping[str, Any],
    key: str,
    where: str,
    least: float,
    most: float,
    default: float | None = None,
) -> float:
    value = table.get(key, default)
    if type(value) not in (int, float) or not least <= value <= most:  # NaN is not within
        raise PlacementError(
            f"{where}.{key}={shown(value)}: must be a number from {least:g} to {most:g}"
        )
    return float(value)


def _whole(
    table: Mapping[str, Any],
    key: str,
    where: str,
    least: int,
    most: int,
    default: int | None = None,
) -> int:
    value = _number(table, key, where, least, most, default)
    if not value.is_integer():
        raise PlacementError(f"{where}.{key}={shown(value)}: must be a whole number")
    return int(value)
