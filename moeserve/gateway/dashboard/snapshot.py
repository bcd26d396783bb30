"""What the dashboard shows at one moment: plain data, and its JSON.

A ``SnapshotSource`` tells who serves: a process of its own members, a gateway those of its cluster.
What the gateway itself has seen (answers in time, tokens per second) is ``history``'s.

Letters in names are shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moeserve.gateway.dashboard.history import Attainment, Point
from moeserve.pools.members import Report

# A cell of the heat map is its load in this part of the layer's mean, up to 255 of them.
HEAT_UNIT = 1 / 32
# What is shown of a cluster that is larger; the page says how many there are.
MOST_MEMBERS, MOST_FLOWS = 1024, 2048


@dataclass(frozen=True, slots=True)
class Flow:
    """KV that one member has had from another: bytes, and runs of positions of one layer, since the
    receiver started. ``source`` and ``target`` are ids of members."""

    source: str
    target: str
    bytes: int
    runs: int
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoads:
    """How often each expert was chosen since counting began. ``layers`` are the decoder's numbers
    of the MoE layers."""

    layers: tuple[int, ...]
    load_LE: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``time`` is seconds of the epoch, ``uptime_s`` of the process that shows it. ``streams`` are
    answers of this door under way. ``experts`` None where nobody counts; ``counts`` are totals by
    name, as far as this process knows them."""

    time: float
    uptime_s: float
    model: str
    state: str
    streams: int
    members: tuple[Report, ...]
    flows: tuple[Flow, ...]
    attainment: Attainment
    points: tuple[Point, ...]
    experts: ExpertLoads | None = None
    counts: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the page. Of members it has nothing that only their peers need."""
        shown: dict[str, Any] = {
            "time": self.time,
            "uptime_s": self.uptime_s,
            "model": self.model,
            "state": self.state,
            "streams": self.streams,
            "members": [_member(report) for report in self.members[:MOST_MEMBERS]],
            "member_count": len(self.members),
            "flows": [asdict(flow) for flow in self.flows[:MOST_FLOWS]],
            "flow_count": len(self.flows),
            "attainment": asdict(self.attainment),
            "points": [asdict(point) for point in self.points],
            "experts": None if self.experts is None else heat_of(self.experts),
            "counts": {name: n for name, n in self.counts.items() if math.isfinite(n)},
        }
        return json.dumps(shown, separators=(",", ":"), allow_nan=False)


class SnapshotSource(Protocol):
    """Who can tell of members. On the event loop's thread; only ``refresh`` may wait, and no longer
    than a few seconds."""

    async def refresh(self) -> None:
        """Bring figures of others up to date, where they do not come by themselves."""
        ...

    def reports(self) -> Sequence[Report]: ...

    def flows(self) -> Sequence[Flow]:
        """TrafficTotals; ``bytes_per_s`` is of no account."""
        ...

    def experts(self) -> ExpertLoads | None: ...

    def counts(self) -> Mapping[str, float]: ...


def with_rates(before: Sequence[Flow], now: Sequence[Flow], seconds: float) -> tuple[Flow, ...]:
    """``now`` with what moved in the ``seconds`` since ``before``. Who counts less than before has
    started anew: all of it is new."""
    known = {(flow.source, flow.target): flow.bytes for flow in before}
    found = []
    for flow in now:
        # Of one that was not there before, nobody knows since when it counts.
        had = known.get((flow.source, flow.target), flow.bytes)
        moved = flow.bytes - had if flow.bytes >= had else flow.bytes
        found.append(replace(flow, bytes_per_s=moved / seconds if seconds > 0 else 0.0))
    return tuple(found)


def heat_of(experts: ExpertLoads) -> dict[str, Any]:
    """``cells`` is base64 of uint8 [L, E]: the load over the mean of its layer, in ``HEAT_UNIT``.
    ``balance`` has for each layer its largest load over its mean, 1 where it has none."""
    load_LE = np.asarray(experts.load_LE, np.float64)
    layers, count = load_LE.shape
    mean_L = load_LE.mean(axis=1, keepdims=True) if count else np.zeros((layers, 1))
    share_LE = np.divide(load_LE, mean_L, out=np.ones_like(load_LE), where=mean_L > 0)
    cells_LE = np.minimum(np.rint(share_LE / HEAT_UNIT), 255).astype(np.uint8)
    return {
        "layers": list(experts.layers),
        "experts": count,
        "unit": HEAT_UNIT,
        "choices": int(load_LE.sum()),
        "cells": base64.b64encode(cells_LE.tobytes()).decode("ascii"),
        "balance": [round(float(peak), 3) for peak in share_LE.max(axis=1, initial=0.0)],
    }


def _member(report: Report) -> dict[str, Any]:
    member, load = report.member, report.load
    return {
        "id": member.id,
        "instance": member.instance,
        "role": member.role.value,
        "address": member.address,
        "rank": member.rank,
        "ranks": member.ranks,
        "model": member.terms.name,
        **asdict(load),
    }
