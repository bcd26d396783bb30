"""What a rank's tokens travel over, as ``moeserve.comm.build`` lays it: one exchange of all ranks,
or, where nodes have several ranks each, one between nodes and one within.

Several plans may use them in turn, each with a dispatcher of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.comm.dispatcher import Dispatcher, FlatDispatcher, HierarchicalDispatcher
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.open import open_exchange
from moeserve.comm.group import Group, Topology, ranks_per_node
from moeserve.kernels.ops import Ops
from moeserve.observe.progress import Progress


@dataclass(frozen=True, slots=True)
class RankExchanges:
    """``members[i]`` are the run's ranks in ``exchanges[i]``: of all, or between nodes and within.
    ``per_node`` is 1 where there is one."""

    rank: int
    topology: Topology
    exchanges: Sequence[Exchange]
    members: Sequence[Sequence[int]]
    per_node: int

    def dispatcher(self, ops: Ops, progress: Progress) -> Dispatcher:
        if len(self.exchanges) == 1:
            return FlatDispatcher(ops, self.exchanges[0], self.topology, progress)
        outer, inner = self.exchanges
        return HierarchicalDispatcher(ops, outer, inner, self.topology, progress)

    def sent_R(self) -> list[int]:
        """Bytes handed to each rank of the run so far, itself left out."""
        sent_R = [0] * self.topology.world
        for exchange, members in zip(self.exchanges, self.members, strict=True):
            for rank, sent in zip(members, exchange.traffic.sent_R, strict=True):
                sent_R[rank] += sent if rank != self.rank else 0
        return sent_R

    def close(self) -> None:
        for exchange in self.exchanges:
            exchange.close()


def open_exchanges(backend: str, group: Group, topology: Topology, lanes: Lanes) -> RankExchanges:
    """Collective over ``group``, which is all of the run."""
    rank, world, size = group.rank, group.world, ranks_per_node(topology)
    if size is None:
        every = open_exchange(backend, group, topology, lanes)
        return RankExchanges(rank, topology, (every,), (range(world),), 1)
    rail = range(rank % size, world, size)
    node = topology.ranks_of(topology.node_R[rank])
    outer = open_exchange(backend, group.sub_group(rail), topology, lanes, key="outer")
    inner = open_exchange(backend, group.sub_group(node), topology, lanes, key="inner")
    return RankExchanges(rank, topology, (outer, inner), (rail, node), size)
