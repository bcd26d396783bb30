"""Service between tenants: alike while both have requests waiting, whoever floods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import Counters, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Admission, FirstComeFirstServed
from moeserve.engine.policies.fairness import (
    MOST_TENANTS,
    OUTPUT_WEIGHT,
    TURN_S,
    FairTenants,
    ServiceCounters,
)
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.waiting import WaitingQueue

BLOCK = 4
LIMIT = 64


def ask(name: str, tenant: str, prompt: int, answer: int, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    ids = tuple(range(1, prompt + 1))
    return Request(RequestId(name), ids, params, priority=priority, tenant=tenant)


class Rank:
    """A scheduler, stepped by hand; a step takes a second."""

    def __init__(self, admission: Admission, num_blocks: int = 40, seqs: int = 6) -> None:
        self.counters = Counters()
        pool = BlockPool(num_blocks, BLOCK, self.counters)
        config = SchedulerConfig(LIMIT, seqs, 64, prefix_cache=False)
        self.scheduler = Scheduler(config, pool, self.counters, admission)
        self.executor = NullExecutor(num_blocks, BLOCK, 50)
        self.tenants: dict[RequestId, str] = {}
        self.service: Counter[str] = Counter()
        self.started: list[RequestId] = []
        self.now = 0.0

    def add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.tenants[request.id] = request.tenant

    def step(self) -> tuple[RequestId, ...]:
        plan = self.scheduler.plan(self.now)
        for chunk in plan.chunks:
            if chunk.request.id not in self.started:
                self.started.append(chunk.request.id)
                self.service[chunk.request.tenant] += len(chunk.request.prompt_ids)
        for out in self.scheduler.apply(self.executor.run(plan)):
            self.service[self.tenants[out.request_id]] += OUTPUT_WEIGHT
        self.now += 1
        return tuple(chunk.request.id for chunk in plan.chunks)

    def waiting(self) -> Counter[str]:
        waits = [*self.scheduler.sequences][self.scheduler.num_running :]
        return Counter(seq.request.tenant for seq in waits)


def crowd() -> list[Request]:
    """One floods with short and long ones before the others come, who differ in size."""
    flood = [ask(f"flood{i}", "flood", 4 + i % 9, 8 + 5 * (i % 5)) for i in range(240)]
    small = [ask(f"small{i}", "small", 5, 6) for i in range(120)]
    large = [ask(f"large{i}", "large", 20, 24) for i in range(40)]
    return [*flood, *small, *large]


def service_while_all_wait(admission: Admission) -> Counter[str]:
    rank = Rank(admission)
    rank.add(crowd())
    while len(rank.waiting()) == 3:
        rank.step()
        if rank.scheduler.num_waiting < 60:
            break
    return rank.service


@pytest.mark.parametrize("inner", [FirstComeFirstServed(), PastFuture(LIMIT)])
def test_one_that_floods_gets_no_more_than_the_others(inner: Admission) -> None:
    service = service_while_all_wait(FairTenants(inner))
    assert sum(service.values()) > 5000
    assert max(service.values()) <= 1.15 * min(service.values())


def test_in_order_of_arrival_it_gets_all() -> None:
    service = service_while_all_wait(FirstComeFirstServed())
    assert service["flood"] > 10 * (service["small"] + service["large"])


def test_the_counters_are_what_was_computed_and_made() -> None:
    fair = FairTenants(PastFuture(LIMIT))
    rank = Rank(fair, num_blocks=24)  # who is preempted is not charged twice
    rank.add(crowd()[200:280])
    found = []
    for steps in (10, 60):
        for _ in range(steps):
            rank.step()
        found.append((dict(fair.counters.service), dict(rank.service)))
    assert rank.counters.preemptions > 0
    (charged, served), (charged_later, served_later) = found
    assert charged_later.keys() == served_later.keys() == {"flood", "small"}
    for tenant in served_later:
        made = served_later[tenant] - served.get(tenant, 0)
        assert made > 100
        # What the newest step made is charged in the next one.
        assert abs(charged_later[tenant] - charged.get(tenant, 0) - made) <= 40


def test_nobody_saves_up_service_while_away() -> None:
    counters = ServiceCounters()
    counters.come(frozenset("ab"))
    counters.charge("a", 100)
    counters.charge("b", 30)
    counters.come(frozenset("a"))
    counters.charge("a", 100)
    counters.come(frozenset("ab"))
    assert counters.service == {"a": 200, "b": 200}
    counters.charge("b", 50)
    counters.come(frozenset())
    counters.come(frozenset("bc"))  # of none who was there, the least that there was
    assert counters.service == {"a": 200, "b": 250, "c": 200}


def test_tenants_that_went_long_ago_are_forgotten() -> None:
    counters = ServiceCounters()
    for i in range(2 * MOST_TENANTS):
        counters.come(frozenset({f"t{i}", "always"}))
        counters.charge(f"t{i}", i)
    assert len(counters.service) <= MOST_TENANTS + 3
    assert "always" in counters.service


def test_a_priority_that_never_starts_has_a_turn() -> None:
    rank = Rank(FairTenants(FirstComeFirstServed()), seqs=1)
    rank.add([ask("late", "b", 4, 2, priority=3)])
    rank.add([ask(f"urgent{i}", "a", 4, 2) for i in range(40)])
    while "late" not in rank.started:
        rank.step()
    assert TURN_S <= rank.now <= TURN_S + 4
    assert rank.started[:-1] == [f"urgent{i}" for i in range(len(rank.started) - 1)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(10, 30),
)
def test_one_tenant_alone_is_served_as_without(
    sizes: list[tuple[int, int]], num_blocks: int
) -> None:
    ran = []
    for fair in (False, True):
        inner = PastFuture(LIMIT)
        rank = Rank(FairTenants(inner) if fair else inner, num_blocks, 4)
        rank.add([ask(f"r{i}", "a", *size) for i, size in enumerate(sizes)])
        steps = []
        while rank.scheduler.has_work:
            steps.append(rank.step())
        ran.append(steps)
    assert ran[0] == ran[1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(-1, 1), st.sampled_from("ab"), st.booleans()),
        max_size=30,
    )
)
def test_the_first_of_each_tenant_and_priority_is_known(
    turns: list[tuple[int, int, str, bool]],
) -> None:
    queue = WaitingQueue()
    for i, (action, priority, tenant, ran) in enumerate(turns):
        if action == 0 and queue:
            queue.take([*queue][i % len(queue)])
        elif action == 1:
            queue.withdraw(1)
        else:
            seq = SequenceState(replace(ask(f"r{i}", tenant, 2, 2), priority=priority))
            if ran:
                seq.output_ids.append(1)
            queue.put(seq) if action == 2 else queue.put_first(seq)
        first: dict[tuple[int, str], SequenceState] = {}
        for seq in queue.values():
            first.setdefault((seq.request.priority, seq.request.tenant), seq)
        assert {s.request.id for s in queue.heads()} == {s.request.id for s in first.values()}


def test_one_that_is_cancelled_is_no_longer_there() -> None:
    fair = FairTenants(FirstComeFirstServed())
    rank = Rank(fair, seqs=1)
    rank.add([ask("a", "a", 4, 8), ask("b", "b", 4, 8)])
    rank.step()
    assert fair.counters.present == {"a", "b"}
    for name in "ab":
        assert rank.scheduler.abort(RequestId(name), FinishReason.ABORT)
    rank.add([ask("c", "c", 4, 1)])
    rank.step()
    assert fair.counters.present <= {"c"}
    assert not rank.scheduler.has_work
