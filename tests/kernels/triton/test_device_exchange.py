"""Two ranks on devices in name: their records go from device to device, and the host sees counts.

gloo stands for the library that carries bytes between devices; all else is what runs there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.build import shard_experts
from moeserve.comm.dispatcher import FlatDispatcher, HierarchicalDispatcher
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.collective import BeginningOrder, CollectiveExchange
from moeserve.comm.exchange.mapped import MappedExchange, ThreadSharing
from moeserve.comm.exchange.media import HostMedium
from moeserve.comm.exchange.open import open_host_exchanges
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.libraries.deepep_exchange import DeepEpExchange
from moeserve.comm.libraries.deepep_twin import Buffer, ThreadGroup
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.matrix import Matrix, part_of, stack, to_int8
from moeserve.kernels.ops import MoeWeights, Ops, Part, Routed, RouterSpec, RouterWeights
from moeserve.kernels.thread_meeting import ThreadMeeting
from moeserve.kernels.triton.double import DEVICE, Crossings, bare, device_double, device_thread
from moeserve.kernels.wire import Combine
from moeserve.observe.progress import Progress

HIDDEN, INNER, EXPERTS, CHOSEN = 34, 16, 8, 3
ROWS = (5, 3, 0, 2)  # of each rank
LANES = Lanes((1 << 16, 1 << 16), 20.0)


@pytest.fixture(params=["triton", "ascend"])
def there(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """On a device in name, the operators of NPUs too: what the host is asked for is counted."""
    with device_double():
        if request.param == "ascend":
            request.getfixturevalue("npu")  # their twin
            yield AscendOps(DEVICE)
            return
        from moeserve.kernels.triton.ops import TritonOps

        yield TritonOps(DEVICE)


@dataclass(frozen=True)
class Mixture:
    """One layer over all ranks, and the tokens of each."""

    weights: tuple[Matrix, Matrix]
    x_RTH: list[Tensor]
    routed_R: list[tuple[Tensor, Tensor, Tensor]]
    combine: Combine

    @classmethod
    def drawn(cls, combine: Combine, world: int) -> Mixture:
        torch.manual_seed(5)
        up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 6
        down = torch.randn(EXPERTS, HIDDEN, INNER) / 4
        rows = ROWS[:world]
        routed = [
            (
                torch.randn(n, HIDDEN),
                torch.rand(n, EXPERTS).topk(CHOSEN).indices.int(),
                torch.rand(n, CHOSEN),
            )
            for n in rows
        ]
        xs = [torch.randn(n, HIDDEN) for n in rows]
        return cls((to_int8(up), to_int8(down)), xs, routed, combine)

    def part(self, ops: Ops, experts: list[int]) -> Part[MoeWeights]:
        mine = [stack([part_of(w, e) for e in experts]) for w in self.weights]
        return ops.prepare(MoeWeights(ops.pack_experts(*mine), None, self.combine))

    def routed(self, rank: int) -> Routed:
        return Routed(*(t.to(DEVICE) for t in self.routed_R[rank]))

    def alone(self, ops: Ops, rank: int) -> Tensor:
        x_TH = self.x_RTH[rank].to(DEVICE)
        ops.moe(x_TH, self.part(ops, list(range(EXPERTS))), self.routed(rank))
        return x_TH.cpu()


def router() -> Part[RouterWeights]:
    spec = RouterSpec(num_experts=EXPERTS, top_k=CHOSEN)
    return Part(RouterWeights(torch.ones(HIDDEN), 1e-6, None, spec), None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Way:
    """How one rank's exchanges carry bytes; ``shared`` is one for all, None for collectives, and a
    meeting for DeepEP's twin."""

    order: BeginningOrder
    shared: dict[Any, Any] | ThreadMeeting | None

    def open(self, group: Group, key: str) -> Exchange:
        if isinstance(self.shared, ThreadMeeting):
            buffer = Buffer(ThreadGroup(self.shared, group.rank), 1 << 40)
            return DeepEpExchange(group, LANES, buffer, DEVICE)
        if self.shared is None:
            return by_collectives(group, key, self.order)
        return MappedExchange(group, LANES, key, ThreadSharing(DEVICE, self.shared))


def by_collectives(group: Group, key: str, order: BeginningOrder) -> Exchange:
    on_host = open_host_exchanges(group, Topology((0,) * 4), LANES, key=key)
    medium = HostMedium.open(group, key, DEVICE, bare)
    return CollectiveExchange(group, LANES, *on_host, medium, order)


def as_ranks(world: int, run: Callable[[Group, Crossings], Tensor]) -> list[Tensor]:
    """What came out of each rank, a thread on a device of its own."""
    store = HashStore()

    def rank(r: int) -> Tensor:
        with device_thread() as seen:
            return run(Group(r, world, store), seen)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world), timeout=120))


def layout_of(world: int, replicas: bool) -> LayerLayout:
    order = np.random.default_rng(3).permutation(EXPERTS)
    expert_S = np.concatenate([order, order[:world]]) if replicas else order
    return LayerLayout(expert_S.astype(np.int32), EXPERTS, world)


@pytest.mark.parametrize(
    ("combine", "replicas", "node", "by"),
    [
        (Combine.EXACT, False, 0, "collectives"),
        (Combine.EXACT, False, 0, "deepep"),
        (Combine.EXACT, True, 0, "mapped"),
        (Combine.FAST, False, 0, "collectives"),
        (Combine.ORDERED, False, 0, "mapped"),
        (Combine.EXACT, False, 2, "collectives"),
    ],
)
def test_ranks_give_the_bits_of_one_and_the_host_sees_one_tensor_a_hop(
    there: Ops, combine: Combine, replicas: bool, node: int, by: str
) -> None:
    """With ``node``, over nodes of so many ranks: two hops, of which each counts once."""
    world = 2 * node or 2
    mixture, layout = Mixture.drawn(combine, world), layout_of(world, replicas)
    ways: dict[str, dict[Any, Any] | ThreadMeeting] = {"mapped": {}}
    shared = ThreadMeeting(world) if by == "deepep" else ways.get(by)
    wanted = [mixture.alone(there, r) for r in range(world)]

    def run(group: Group, seen: Crossings) -> Tensor:
        rank, way = group.rank, Way(BeginningOrder(), shared)
        part = mixture.part(there, list(layout.of_rank(rank)))
        sharded = shard_experts(there, router(), part, layout, node or 1, wide=True)
        topology = Topology(tuple(r // (node or world) for r in range(world)))
        moves: FlatDispatcher | HierarchicalDispatcher
        if node:
            rail = group.sub_group(range(rank % node, world, node))
            inside = group.sub_group(topology.ranks_of(topology.node_R[rank]))
            exchanges = way.open(rail, "outer"), way.open(inside, "inner")
            moves = HierarchicalDispatcher(there, *exchanges, topology, Progress())
        else:
            moves = FlatDispatcher(there, way.open(group, "flat"), topology, Progress())
        x_TH, routed = mixture.x_RTH[rank].to(DEVICE), mixture.routed(rank)
        before = seen.to_host, seen.waits, seen.to_device
        for _ in moves.moe(0, sharded, x_TH, routed):
            pass
        if combine is not Combine.ORDERED and by != "deepep":  # whose twin looks at what it carries
            assert (seen.to_host, seen.waits) == (before[0] + (2 if node else 1), before[1])
            # With replicas the rule is the host's: tokens and slots go back.
            assert seen.to_device == before[2] + (2 if replicas else 0)
        moves.close()
        return x_TH.cpu()

    for x_TH, alone in zip(as_ranks(world, run), wanted, strict=True):
        near = torch.allclose(x_TH, alone, rtol=0.02, atol=0.02)
        assert near if combine is Combine.FAST else torch.equal(x_TH, alone)
