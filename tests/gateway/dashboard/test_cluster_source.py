"""The members of a cluster as the dashboard is told of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from moeserve.core import Counters
from moeserve.engine.ranks.counted import RankCounts, ReceivedKv
from moeserve.errors import UnavailableError
from moeserve.gateway.dashboard import cluster
from moeserve.gateway.dashboard.cluster import ClusterMembers, show_cluster
from moeserve.gateway.dashboard.history import SloTargets
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.dashboard.snapshot import Flow
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.service import InferenceService
from moeserve.observe.metrics import Metrics
from moeserve.pools.members import Member, Report, Role


def member(name: str, role: Role) -> Member:
    return Member(name, name, role, f"{name}:7000")


class MadeUp:
    """Two that prefill, one that decodes, one that keeps; each answers as the test says."""

    def __init__(self) -> None:
        names = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "c0": Role.CACHE}
        self.members = [member(name, role) for name, role in names.items()]
        self.counts = {name: RankCounts() for name in names}
        self.away: set[str] = set()
        self.silent: set[str] = set()
        self.asked: list[str] = []

    def reports(self) -> list[Report]:
        return [Report(one) for one in self.members]

    async def ask(self, one: Member) -> RankCounts:
        self.asked.append(one.id)
        if one.id in self.away:
            raise UnavailableError("gone")
        if one.id in self.silent:
            await asyncio.sleep(3600)
        return self.counts[one.id]


async def test_kv_that_came_is_a_flow_between_members() -> None:
    made = MadeUp()
    made.counts["d0"].received = (
        ReceivedKv("p0:7000", 100, 2),
        ReceivedKv("p1:7000", 50, 1),
        ReceivedKv("gone:7000", 9, 3),
    )
    source = ClusterMembers(made.reports, made.ask)
    await source.refresh()
    assert sorted(made.asked) == ["d0", "p0", "p1"], "who keeps KV has no engine to ask"
    assert source.flows() == [
        Flow("p0", "d0", 100, 2),
        Flow("p1", "d0", 50, 1),
        Flow("gone:7000", "d0", 9, 3),
    ]


async def test_who_does_not_answer_is_shown_as_before_and_forgotten_when_it_leaves() -> None:
    made = MadeUp()
    made.counts["d0"].received = (ReceivedKv("p0:7000", 100, 2),)
    source = ClusterMembers(made.reports, made.ask)
    await source.refresh()
    made.away, made.silent = {"d0"}, {"p0"}
    async with asyncio.timeout(10 * cluster.ASK_S):
        await source.refresh()
    assert source.flows() == [Flow("p0", "d0", 100, 2)]
    made.members = made.members[:2]
    made.silent = set()
    await source.refresh()
    assert source.flows() == []


async def test_experts_and_counters_of_members_add_up() -> None:
    made = MadeUp()
    for name, choices in (("p0", (1, 2, 3, 4)), ("d0", (10, 0, 0, 10)), ("p1", (7, 7))):
        made.counts[name].expert_choices = choices
        made.counts[name].moe_layers = (1, 2) if name != "p1" else (9,)
        made.counts[name].counters = Counters(steps=5, generated_tokens=2)
    source = ClusterMembers(made.reports, made.ask)
    assert source.experts() is None
    await source.refresh()
    heat = source.experts()
    assert heat is not None and heat.layers == (1, 2)
    assert np.array_equal(heat.load_LE, [[11, 2], [3, 14]])
    assert source.counts()["steps"] == 15
    assert source.counts()["generated_tokens"] == 6


@dataclass(slots=True)
class RouterCounts:
    """As the routing of a gateway has them."""

    chosen: int = 3


async def test_a_gateway_shows_its_cluster_on_the_page_and_in_its_metrics() -> None:
    made, metrics = MadeUp(), Metrics()
    service = InferenceService(Mailbox(asyncio.get_running_loop()))
    dashboard = Dashboard(service, SloTargets(1.0, 0.1), metrics.parts.totals)
    show_cluster(dashboard, metrics, made.reports, made.ask, [RouterCounts()])
    shown = await dashboard.snapshot()
    assert [report.member.id for report in shown.members] == ["p0", "p1", "d0", "c0"]
    assert shown.counts["router_chosen"] == 3
    page = metrics.render()[0].decode()
    assert 'moeserve_members{role="prefill"} 2.0' in page
    assert "moeserve_router_chosen_total 3.0" in page
    await service.texts.close()
