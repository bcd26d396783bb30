"""Several ranks behind one queue, each run by a null executor that owns its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    Chunk,
    Counters,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.ranks.fleet import Fleet
from moeserve.engine.ranks.homes import Candidates, HomePolicy
from moeserve.errors import ExhaustedError, InvalidRequestError

BLOCK, VOCAB, EOS = 4, 50, 7
CONFIG = SchedulerConfig(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, eos_ids=frozenset({EOS})
)


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    deadline: float | None = None,
    **params: object,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling, deadline=deadline)


@dataclass
class Town:
    """A fleet, stepped by hand; every rank sees only its own chunks, as in a group."""

    ranks: int = 2
    num_blocks: int = 64
    config: SchedulerConfig = CONFIG
    homes: HomePolicy | None = None
    drafter: Drafter | None = None
    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    finish: dict[RequestId, FinishReason | None] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.pools = [BlockPool(self.num_blocks, BLOCK, self.counters) for _ in range(self.ranks)]
        self.fleet = Fleet(self.config, self.pools, self.counters, self.homes, self.drafter)
        self.executors = [NullExecutor(self.num_blocks, BLOCK, VOCAB) for _ in range(self.ranks)]

    def add(self, *requests: Request) -> None:
        for r in requests:
            self.fleet.add(r)
            self.tokens[r.id] = []
            self.finish[r.id] = None

    def run_plan(self, plan: StepPlan) -> StepResult:
        found = {}
        for rank, executor in enumerate(self.executors):
            own = tuple(c for c in plan.chunks if c.rank == rank)
            assert all(0 <= b < self.num_blocks for c in own for b in c.blocks)
            for sampled in executor.run(replace(plan, chunks=own)).sampled:
                found[sampled.request_id] = sampled
        return StepResult(tuple(found[c.request.id] for c in plan.chunks if c.samples))

    def step(self) -> StepPlan:
        self.now += 1
        plan = self.fleet.plan(self.now)
        for request_id in plan.expired:
            self.finish[request_id] = FinishReason.DEADLINE
        if plan.chunks:
            for out in self.fleet.apply(self.run_plan(plan)):
                self.tokens[out.request_id].append(out.token_id)
                self.finish[out.request_id] = out.finish
        return plan

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.fleet.has_work:
                return
            self.step()
        raise AssertionError(f"still running after {most} steps")

    def abort(self, name: str) -> bool:
        found = self.fleet.abort(RequestId(name), FinishReason.ABORT)
        if found:
            self.finish[RequestId(name)] = FinishReason.ABORT
        return found

    def assert_nothing_leaked(self) -> None:
        for pool in self.pools:
            pool.check()
        assert self.fleet.blocks.free == self.fleet.blocks.total == self.ranks * self.num_blocks
        assert (self.fleet.num_running, self.fleet.num_waiting) == (0, 0)


def homes_of(plan: StepPlan) -> dict[str, int]:
    return {c.request.id: c.rank for c in plan.chunks}


def alone(r: Request, config: SchedulerConfig) -> list[int]:
    """The tokens a request gets when nobody else is there."""
    town = Town(1, 64, replace(config, max_num_batched_tokens=1024))
    town.add(replace(r, deadline=None))
    town.run()
    return town.tokens[r.id]


def test_requests_spread_over_free_ranks() -> None:
    town = Town(ranks=3)
    town.add(*(request(f"r{i}", [i] * 5, ignore_eos=True) for i in range(6)))
    assert homes_of(town.step()) == {"r0": 0, "r1": 1, "r2": 2, "r3": 0, "r4": 1, "r5": 2}


def test_a_request_follows_its_prefix_while_that_saves_more_than_it_overloads() -> None:
    town = Town()
    shared = list(range(12))
    town.add(request("first", [*shared, 1], 1))
    town.run()
    town.add(*(request(f"r{i}", [*shared, 20 + i], ignore_eos=True) for i in range(4)))
    assert homes_of(town.step()) == {"r0": 0, "r1": 1, "r2": 0, "r3": 1}
    assert town.counters.prefix_hit_tokens == 2 * 12
    town.run()
    town.assert_nothing_leaked()


def test_nobody_queues_beside_a_free_rank() -> None:
    """The long prompt fills its rank's step: who came after it goes elsewhere at once."""
    town = Town()
    town.add(request("long", range(50)), request("a", [1] * 4), request("b", [2] * 12))
    assert homes_of(town.step()) == {"long": 0, "a": 1, "b": 1}
    town.add(request("c", [3]))
    assert homes_of(town.step())["c"] == 1


def test_a_request_that_waits_has_no_home_yet() -> None:
    town = Town(num_blocks=16)
    town.add(*(request(n, [i] * 50, 12, ignore_eos=True) for i, n in enumerate("abc")))
    town.step()
    assert (town.fleet.num_running, town.fleet.num_waiting) == (2, 1)
    town.abort("b")
    assert homes_of(town.step())["c"] == 1


def test_a_preempted_request_may_go_to_another_rank() -> None:
    class First:
        """Fills rank 0 before rank 1."""

        def pick(self, request: Request, candidates: Candidates) -> int:
            return int(candidates.rank_C[0])

    town = Town(num_blocks=6, homes=First())
    asked = [
        request("a", range(8), 12, ignore_eos=True),
        request("b", range(20, 28), 12, ignore_eos=True),
    ]
    town.add(*asked)
    plans = [town.step() for _ in range(8)]
    homes = [homes_of(p)["b"] for p in plans if "b" in homes_of(p)]
    assert any(p.preempted == ("b",) for p in plans)
    assert (homes[0], homes[-1]) == (0, 1)
    town.run()
    for r in asked:
        assert town.tokens[r.id] == alone(r, CONFIG)
    town.assert_nothing_leaked()


def test_an_id_can_be_used_again_on_another_rank() -> None:
    """What ended on a rank that then has nothing to do is told at once all the same."""
    town = Town()
    town.add(request("a", range(8), ignore_eos=True), request("b", range(6), ignore_eos=True))
    assert homes_of(town.step()) == {"a": 0, "b": 1}
    town.abort("a")
    town.abort("b")
    town.add(request("x", [1] * 9), request("a", range(30, 38)))
    plan = town.step()
    assert homes_of(plan) == {"x": 0, "a": 1}
    assert set(plan.ended) == {"a", "b"}
    assert town.step().ended == ()
    town.run()
    assert town.tokens[RequestId("a")] == alone(request("a", range(30, 38)), CONFIG)


def test_what_can_never_run_is_refused_up_front() -> None:
    town = Town(num_blocks=4, config=replace(CONFIG, max_queue=1))
    with pytest.raises(ExhaustedError, match="need 5 KV blocks, and there are 4"):
        town.add(request("big", range(10), 8))
    town.add(request("a", range(4)))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        town.add(request("a", range(4)))
    with pytest.raises(ExhaustedError, match="1 requests are waiting"):
        town.add(request("b", range(4)))
    town.step()
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        town.add(request("a", range(4)))


def test_a_request_can_expire_before_it_has_a_home() -> None:
    town = Town(ranks=1, num_blocks=4)
    town.add(request("a", range(8), 8, ignore_eos=True), request("b", range(8), 8, deadline=2.0))
    town.step()
    assert town.step().expired == ("b",)
    town.run()
    assert town.counters.finished == {FinishReason.LENGTH: 1, FinishReason.DEADLINE: 1}
    town.assert_nothing_leaked()


@dataclass(frozen=True)
class Arrival:
    step: int
    request: Request
    abort_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Requests over time; prompts come from few beginnings, so that prefixes are shared."""
    beginnings = [[b] * 8 for b in range(3)]
    found = []
    for i in range(draw(st.integers(1, 10))):
        prompt = [
            *draw(st.sampled_from(beginnings)),
            *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)),
        ][draw(st.integers(0, 8)) :]
        r = request(
            f"r{i}",
            prompt,
            draw(st.integers(1, 12)),
            draw(st.none() | st.integers(1, 60)),
            seed=draw(st.integers(0, 2)),
        )
        at = draw(st.integers(0, 20))
        found.append(Arrival(at, r, draw(st.none() | st.integers(at, at + 20))))
    return found


def history(
    arrivals: list[Arrival],
    ranks: int,
    num_blocks: int,
    config: SchedulerConfig,
    drafter: Drafter | None,
) -> tuple[Town, list[StepPlan]]:
    town, plans = Town(ranks, num_blocks, config, drafter=drafter), []
    last = max(max(a.step, a.abort_at or 0) for a in arrivals)
    for now in range(2000):
        town.add(*(a.request for a in arrivals if a.step == now))
        for a in arrivals:
            if a.abort_at == now:
                town.abort(a.request.id)
        if now > last and not town.fleet.has_work:
            break
        plans.append(town.step())
        assert plans[-1].chunks or not town.fleet.has_work, "work is left and nothing is planned"
        for pool in town.pools:
            pool.check()
    return town, plans


@settings(max_examples=120, deadline=None)
@given(
    arrivals=arrivals(),
    ranks=st.integers(1, 4),
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 4),
    spare=st.integers(0, 20),
    prefix_cache=st.booleans(),
    drafts=st.sampled_from([0, 0, 1, 3]),
    errs=st.integers(0, 4),
)
def test_homes_never_change_tokens(
    arrivals: list[Arrival],
    ranks: int,
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_cache: bool,
    drafts: int,
    errs: int,
    guessers: Callable[..., Drafter],
) -> None:
    config = SchedulerConfig(
        max_model_len=32,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
    )
    drafter = guessers(VOCAB, drafts, errs) if drafts else None
    town, plans = history(arrivals, ranks, num_blocks, config, drafter)
    town.assert_nothing_leaked()
    for plan in plans:
        for rank in range(ranks):
            own = [c for c in plan.chunks if c.rank == rank]
            assert len(own) <= max_num_seqs
            assert sum(len(c.token_ids) for c in own) <= config.max_num_batched_tokens
    for a in arrivals:
        expected, got = alone(a.request, config), town.tokens[a.request.id]
        if town.finish[a.request.id] in (FinishReason.STOP, FinishReason.LENGTH):
            assert got == expected
        else:
            assert got == expected[: len(got)]
            assert town.finish[a.request.id] in (FinishReason.ABORT, FinishReason.DEADLINE)
    assert sum(town.counters.finished.values()) == len(arrivals)
    assert town.counters.generated_tokens == sum(map(len, town.tokens.values()))
    again, same = history(arrivals, ranks, num_blocks, config, drafter)
    assert (again.tokens, same) == (town.tokens, plans)


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 3), num_blocks=st.integers(10, 16), count=st.integers(2, 12))
def test_requests_start_in_the_order_they_came(ranks: int, num_blocks: int, count: int) -> None:
    """And on every rank whoever is there longest advances in every step."""
    config = SchedulerConfig(40, max_num_seqs=4, max_num_batched_tokens=6)
    town = Town(ranks, num_blocks, config)
    town.add(*(request(f"r{i}", [i] * 20, 20) for i in range(count)))
    started: list[RequestId] = []
    admitted: list[list[RequestId]] = [[] for _ in range(ranks)]
    while town.fleet.has_work:
        plan = town.step()
        ran = [c.request.id for c in sorted(plan.chunks, key=arrival)]
        started += [r for r in ran if r not in started]
        for rank, here in enumerate(admitted):
            ran = [c.request.id for c in plan.chunks if c.rank == rank]
            here[:] = [r for r in here if r in ran or town.finish[r] is None]
            here[:] = [r for r in here if r not in plan.preempted or r in ran]
            here += [r for r in ran if r not in here]
            assert not here or here[0] in ran
    assert started == [f"r{i}" for i in range(count)]


def arrival(chunk: Chunk) -> int:
    return int(chunk.request.id[1:])


def test_preempted_requests_come_back_in_order_of_arrival() -> None:
    town = Town(num_blocks=4)
    ends = {"0": 8, "1": 13, "2": 13, "3": 13}
    for name, most in ends.items():
        town.add(request(name, [int(name) + 1] * 3, most, ignore_eos=True))
    assert homes_of(town.step()) == {"0": 0, "1": 1, "2": 0, "3": 1}
    while not (plan := town.step()).preempted:
        pass
    assert set(plan.preempted) == {"2", "3"}
    assert town.fleet.num_waiting == 2
    while town.finish[RequestId("0")] is None:
        assert homes_of(town.step()).keys() <= {"0", "1"}
    # One rank is free: who arrived first has it, whichever rank it ran on.
    assert homes_of(town.step()) == {"1": 1, "2": 0}
    town.run()
    assert {name: len(town.tokens[RequestId(name)]) for name in ends} == ends
    town.assert_nothing_leaked()


def test_of_several_preempted_requests_the_one_that_is_named_ends() -> None:
    town = Town(num_blocks=4)
    for i in range(4):
        town.add(request(str(i), [i + 1] * 3, 13, ignore_eos=True))
    while not town.step().preempted:
        pass
    assert town.abort("3")
    assert town.fleet.num_waiting == 1
    assert not town.abort("3")
    town.run()
    assert town.finish[RequestId("2")] is FinishReason.LENGTH
    assert town.counters.finished == {FinishReason.ABORT: 1, FinishReason.LENGTH: 3}
    town.assert_nothing_leaked()


def test_steps_and_prompts_are_counted_once_for_all_ranks() -> None:
    town = Town()
    town.add(request("a", [1] * 5, 3, ignore_eos=True), request("b", [2] * 7, 3, ignore_eos=True))
    assert town.counters.prompt_tokens == 12
    steps = 0
    while town.fleet.has_work:
        steps += bool(town.step().chunks)
    assert town.counters.steps == steps == 3
