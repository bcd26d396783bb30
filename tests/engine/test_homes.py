"""Homes near the experts that a kind of request uses: when they are chosen, and what that saves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from moeserve.comm.layout import LayerLayout
from moeserve.core import (
    BlockId,
    CacheScope,
    Chunk,
    Counters,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.ranks.expert_use import LOOKED_AT, ExpertUseCounter
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.homes import (
    HALVED_AT,
    MOST_KINDS,
    Candidates,
    ExpertUse,
    GivenHome,
    HomePolicy,
    LeastWork,
    NearExperts,
    RandomHomes,
    kind_of,
)
from moeserve.placement.formats.routing_files import read
from moeserve.placement.layer_use import layer_uses
from moeserve.placement.plan import Plan, contiguous

TRACE = Path(__file__).resolve().parents[2] / "examples/demo_model/routing_by_domain.safetensors"


def ask(name: str = "r", domain: str = "", salt: str = "", prompt: int = 4) -> Request:
    ids = tuple(range(prompt))
    return Request(RequestId(name), ids, SamplingParams(), domain=domain, scope=CacheScope(salt))


def load(rank: int, tokens: int, cached: int = 0, running: int = 1) -> tuple[int, ...]:
    return rank, running, tokens, cached


def among(*loads: tuple[int, ...]) -> Candidates:
    return Candidates(*np.array(loads, np.int64).T)


def test_a_request_is_of_its_domain_else_of_its_tenant_else_of_its_beginning() -> None:
    assert kind_of(ask(domain="law", salt="t")) == "domain law"
    assert kind_of(ask(salt="t")) == "salt t"
    assert kind_of(ask(prompt=16)) == kind_of(ask(prompt=40))
    assert kind_of(ask(prompt=15)) != kind_of(ask(prompt=16))


def test_a_known_kind_goes_near_its_experts_unless_that_overloads_the_rank() -> None:
    homes = NearExperts()
    homes.learn(ExpertUse("domain law", 100, (20, 60, 50)))
    law = ask(domain="law")
    assert homes.pick(law, among(load(0, 100), load(1, 110), load(2, 90))) == 1
    assert homes.pick(law, among(load(0, 100), load(1, 160), load(2, 90))) == 2
    assert homes.pick(law, among(load(0, 100), load(2, 90))) == 2
    assert homes.pick(law, among(load(0, 100, cached=99), load(1, 100), load(2, 100))) == 0


def test_an_unknown_kind_goes_where_least_is_to_do() -> None:
    homes = NearExperts()
    homes.learn(ExpertUse("domain law", 10, (0, 9)))
    loads = among(load(0, 5), load(1, 6))
    assert homes.pick(ask(domain="law"), loads) == 0
    assert homes.pick(ask(domain="art"), loads) == LeastWork().pick(ask(), loads) == 0


def test_old_counts_fade_and_kinds_are_bounded() -> None:
    homes = NearExperts()
    homes.learn(ExpertUse("domain law", HALVED_AT, (HALVED_AT, 0)))
    for _ in range(3):
        homes.learn(ExpertUse("domain law", HALVED_AT // 2, (0, HALVED_AT // 2)))
    idle = among(load(0, 0), load(1, 0))
    assert homes.pick(ask(domain="law"), idle) == 1
    for i in range(MOST_KINDS):
        homes.learn(ExpertUse(f"domain {i}", 100, (100, 0)))
    assert homes.pick(ask(domain="law"), among(load(0, 1), load(1, 0))) == 1
    assert homes.pick(ask(domain="0"), idle) == 0


def test_of_ranks_with_equal_work_that_with_fewer_requests_is_home() -> None:
    equal = among(load(1, 9, running=3), load(4, 12, cached=3, running=2), load(5, 9, running=2))
    assert LeastWork().pick(ask(), equal) == 4


def test_a_given_home_holds_where_it_has_room() -> None:
    given = {"a": 2, "b": 1}
    homes = GivenHome(lambda request: given.get(request.id), LeastWork())
    loads = among(load(0, 5), load(2, 9))
    assert [homes.pick(ask(name), loads) for name in "abc"] == [2, 0, 0]


def test_random_homes_follow_from_seed_and_id() -> None:
    loads = among(load(1, 0), load(3, 9), load(6, 5))
    drawn = [[RandomHomes(s).pick(ask(str(i)), loads) for i in range(60)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {1, 3, 6}


class ShardedExperts:
    """A layer's layout, where a pipeline keeps it."""

    def __init__(self, layout: LayerLayout) -> None:
        self.layout = layout


class Pipeline:
    def __init__(self, *layouts: LayerLayout | None) -> None:
        self.sharded = [None if layout is None else ShardedExperts(layout) for layout in layouts]


def test_ranks_that_hold_a_prompts_experts_are_counted() -> None:
    """Expert 1 has a replica: it is near both ranks. Decoding tokens are not looked at."""
    layout = LayerLayout(np.array([0, 1, 2, 1], np.int32), 3, 2)
    counter = ExpertUseCounter(Pipeline(None, layout, layout), 2)  # type: ignore[arg-type]
    chunks = (
        Chunk(ask("a", domain="x"), (5,), 9, (BlockId(0),), 1, (1,)),
        Chunk(ask("b", domain="x"), (0, 1, 2), 0, (BlockId(1),), 0),
        Chunk(ask("c", salt="y", prompt=90), tuple(range(90)), 0, (BlockId(2),), 0),
    )
    counter.begin(StepPlan(chunks))
    ids_TC = np.array([[2, 2]] + [[0, 0], [0, 1], [2, 2]] + [[2, 1]] * 90, np.int32)
    for layer in (1, 2):
        counter.record(layer, ids_TC)
    assert counter.take() == []
    counter.end()
    assert counter.take() == [
        ExpertUse("domain x", 6, (4, 4)),
        ExpertUse("salt y", 2 * LOOKED_AT, (2 * LOOKED_AT, 2 * LOOKED_AT)),
    ]
    assert counter.take() == []
    counter.begin(StepPlan(chunks[:1]))
    counter.end()
    assert counter.take() == []


def copies(homes: HomePolicy, ranks: int) -> tuple[int, float]:
    """Copies away from home when the demo model's recorded requests are served, and the greatest
    share of the tokens on one rank, over the mean."""
    routing = read(TRACE)
    lens, domains = routing.seq_lens_C, routing.workloads[0].domain_C
    assert domains is not None
    layers = routing.tokens_TLK.shape[1]
    expert_LS = contiguous(layers=layers, experts=32, slots=32, devices=ranks)
    plan = Plan(expert_LS, 32, ranks, 1, tuple(range(layers)))
    used_TR = sum(u.used_TD.astype(np.int64) for u in layer_uses(plan, routing.tokens_TLK))
    start_C = np.cumsum(lens) - lens
    sequences = [used_TR[a : a + n] for a, n in zip(start_C, lens, strict=True)]  # type: ignore[index]

    config = SchedulerConfig(512, max_num_seqs=8, max_num_batched_tokens=256)
    counters = Counters()
    pools = [BlockPool(256, 16, counters) for _ in range(ranks)]
    fleet = Fleet(config, pools, counters, homes)
    order = [int(c) for c in np.flatnonzero(lens >= 140)] * 2
    random.Random(0).shuffle(order)
    todo = [(f"{i}-{c}", c) for i, c in enumerate(order)]
    sent, served_R = 0, [0] * ranks
    while todo or fleet.has_work:
        while todo and fleet.num_running + fleet.num_waiting < 4 * ranks:
            name, c = todo.pop()
            prompt = tuple(range(1000 * len(todo), 1000 * len(todo) + 128))
            params = SamplingParams(max_tokens=int(lens[c]) - 127, ignore_eos=True)
            fleet.add(Request(RequestId(name), prompt, params, domain=str(domains[c])))
        step = fleet.plan(0.0)
        for chunk in step.chunks:
            use_TR = sequences[int(chunk.request.id.split("-")[1])]
            rows_TR = use_TR[chunk.start : chunk.start + len(chunk.token_ids)]
            served_R[chunk.rank] += len(rows_TR)
            sent += int(rows_TR.sum() - rows_TR[:, chunk.rank].sum())
            if chunk.start == 0 and isinstance(homes, NearExperts):
                seen_TR = rows_TR[:LOOKED_AT]
                kind = kind_of(chunk.request)
                homes.learn(
                    ExpertUse(kind, layers * len(seen_TR), tuple(seen_TR.sum(axis=0).tolist()))
                )
        made = tuple(Sampled(c.request.id, (1,)) for c in step.chunks if c.samples)
        fleet.apply(StepResult(made))
    return sent, max(served_R) * ranks / sum(served_R)


@pytest.mark.parametrize("ranks", [2, 4])
def test_near_homes_save_copies_of_the_demo_models_traffic(ranks: int) -> None:
    """By a few percent, for its seven domains in one stream, and with balanced ranks."""
    plain, _ = copies(LeastWork(), ranks)
    near, imbalance = copies(NearExperts(), ranks)
    assert near <= 0.985 * plain
    assert imbalance <= 1.25
