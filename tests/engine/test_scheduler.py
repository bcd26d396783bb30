"""The scheduler, run by the null executor: whatever it decides, tokens stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    BlockId,
    CacheScope,
    Counters,
    FinishReason,
    Grammar,
    GrammarKind,
    Refusal,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.foresight import NextStep, foresee_step
from moeserve.engine.kv_exchange import running_urgent
from moeserve.engine.null import NullExecutor, NullSwapMemory
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History, SequenceState
from moeserve.engine.swapping import KvSwap, Swapping
from moeserve.engine.waiting import WaitingQueue
from moeserve.errors import ConfigError, ExhaustedError, InvalidRequestError

BLOCK = 4
VOCAB = 50
EOS = 7
Guessers = Callable[..., Drafter]


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    deadline: float | None = None,
    salt: str = "",
    **params: object,
) -> Request:
    return Request(
        RequestId(name),
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        deadline=deadline,
        scope=CacheScope(salt),
    )


@dataclass
class House:
    """A scheduler with its pool and executor, stepped by hand."""

    num_blocks: int = 64
    config: SchedulerConfig = field(
        default_factory=lambda: SchedulerConfig(
            max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, eos_ids=frozenset({EOS})
        )
    )
    drafter: Drafter | None = None
    swap_places: int = 0

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.pool = BlockPool(self.num_blocks, BLOCK, self.counters)
        self.executor = NullExecutor(self.num_blocks, BLOCK, VOCAB)
        swapping = None
        if self.swap_places:
            host = NullSwapMemory(self.executor, self.swap_places)
            swapping = Swapping(host, SwapOrCompute())
        self.scheduler = Scheduler(
            self.config, self.pool, self.counters, drafter=self.drafter, swapping=swapping
        )
        self.tokens: dict[RequestId, list[int]] = {}
        self.finish: dict[RequestId, FinishReason | None] = {}
        self.prompts: dict[RequestId, int] = {}
        self.running: set[RequestId] = set()
        self.now = 0.0

    @property
    def swap(self) -> KvSwap | None:
        return self.scheduler.swap

    def add(self, *requests: Request) -> None:
        for r in requests:
            self.scheduler.add(r)
            self.take_note(r)

    def take_note(self, r: Request, output_ids: Sequence[int] = ()) -> None:
        self.tokens[r.id] = [*output_ids]
        self.finish[r.id] = None
        self.prompts[r.id] = len(r.prompt_ids)

    def step(self) -> StepPlan:
        self.now += 1
        waited = self.scheduler.num_waiting
        plan = self.scheduler.plan(self.now)
        self.assert_choice_holds(plan, waited)
        for request_id in plan.expired:
            self.finish[request_id] = FinishReason.DEADLINE
        if plan.chunks:
            for out in self.scheduler.apply(self.executor.run(plan)):
                self.tokens[out.request_id].append(out.token_id)
                self.finish[out.request_id] = out.finish
        self.running = self.running - {*plan.preempted} | {c.request.id for c in plan.chunks}
        self.assert_counts_hold()
        return plan

    def assert_choice_holds(self, plan: StepPlan, waited: int) -> None:
        """What a plan says of itself is what a look at it finds."""
        said = plan.choice
        assert said.decodes + said.prefill_tokens + said.drafted == plan.num_tokens <= said.budget
        assert said.budget == self.config.max_num_batched_tokens
        assert said.most_drafts == max((len(c.draft_ids) for c in plan.chunks), default=0)
        assert said.preempted == len(plan.preempted)
        assert (said.refused is Refusal.NONE) == (self.scheduler.num_waiting == 0)
        assert said.admitted <= waited

    def assert_counts_hold(self) -> None:
        """What the scheduler counts on the way is what a look at all would find."""
        self.running = {r for r in self.running if self.finish[r] is None}
        assert self.scheduler.num_running == len(self.running)
        assert self.scheduler.num_tokens == sum(
            self.prompts[r] + len(self.tokens[r]) for r in self.running
        )

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still running after {most} steps")

    def abort(self, name: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        found = self.scheduler.abort(RequestId(name), reason)
        if found:
            self.finish[RequestId(name)] = reason
        return found

    def assert_nothing_leaked(self) -> None:
        self.pool.check()
        assert self.pool.num_free == self.pool.num_blocks
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.num_tokens == 0
        if self.swap is not None:
            self.swap.check()
            assert self.swap.space.num_free == self.swap_places


def alone(r: Request, config: SchedulerConfig) -> list[int]:
    """The tokens a request gets when nobody else is there, in one piece."""
    roomy = replace(config, max_num_batched_tokens=1024)
    house = House(64, roomy)
    house.add(replace(r, deadline=None))
    house.run()
    return house.tokens[r.id]


def test_a_request_gets_its_tokens_and_leaves_nothing_behind() -> None:
    house = House()
    house.add(request("a", range(10), max_tokens=5, ignore_eos=True))
    house.run()
    assert len(house.tokens[RequestId("a")]) == 5
    assert house.finish[RequestId("a")] is FinishReason.LENGTH
    assert house.counters.finished == {FinishReason.LENGTH: 1}
    assert house.counters.prompt_tokens == 10
    assert house.counters.computed_tokens == 10 + 4
    house.assert_nothing_leaked()


def test_decodes_come_before_prompts_and_prompts_fill_the_budget() -> None:
    house = House()
    house.add(request("a", range(5), ignore_eos=True), request("b", range(40, 70)))
    sizes = [[(c.request.id, len(c.token_ids)) for c in house.step().chunks] for _ in range(3)]
    assert sizes == [
        [("a", 5), ("b", 11)],
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 4)],
    ]


def test_a_common_beginning_is_computed_once() -> None:
    house = House()
    shared = list(range(20))
    house.add(request("a", [*shared, 1], max_tokens=1))
    house.run()
    house.add(request("b", [*shared, 2], max_tokens=1))
    house.run()
    assert house.counters.prefix_hit_tokens == 20
    assert house.counters.computed_tokens == 21 + 1


def test_the_last_prompt_token_is_always_computed() -> None:
    house = House()
    for name in "ab":
        house.add(request(name, range(8), max_tokens=1))
        house.run()
    assert house.counters.prefix_hit_tokens == 4
    assert house.tokens[RequestId("a")] == house.tokens[RequestId("b")]


def test_a_block_is_shared_only_when_all_its_tokens_are_computed() -> None:
    config = SchedulerConfig(64, max_num_seqs=2, max_num_batched_tokens=6)
    house = House(config=config)
    house.add(request("a", range(21), 1), request("b", range(21), 1))
    starts = [[(c.request.id, c.start) for c in house.step().chunks] for _ in range(4)]
    assert starts[2:] == [[("a", 12)], [("a", 18), ("b", 16)]]


def test_tenants_do_not_see_each_others_prefixes() -> None:
    house = House()
    for name in "ab":
        house.add(request(name, range(20), max_tokens=1, salt=name))
        house.run()
    assert house.counters.prefix_hit_tokens == 0


def test_the_prefix_cache_can_be_off() -> None:
    house = House(config=SchedulerConfig(64, prefix_cache=False))
    for name in "ab":
        house.add(request(name, range(20), max_tokens=1))
        house.run()
    assert house.counters.prefix_hit_tokens == 0
    assert house.pool.num_cached == 0


def test_the_latest_admitted_yields_when_blocks_run_out() -> None:
    house = House(num_blocks=6)
    house.add(
        request("a", range(8), max_tokens=12, ignore_eos=True),
        request("b", range(20, 28), max_tokens=12, ignore_eos=True),
    )
    preempted = [p for _ in range(8) for p in house.step().preempted]
    house.run()
    assert preempted[0] == "b"
    assert house.counters.preemptions >= 1
    assert len(house.tokens[RequestId("b")]) == 12
    house.assert_nothing_leaked()


def test_recomputed_tokens_are_counted() -> None:
    house = House(num_blocks=6, config=SchedulerConfig(64, prefix_cache=False))
    requests = [
        request(name, range(at, at + 8), max_tokens=12, ignore_eos=True)
        for name, at in (("a", 0), ("b", 20))
    ]
    house.add(*requests)
    again = 0
    while house.scheduler.has_work:
        plan = house.step()
        again += sum(max(0, min(c.reached - c.start, len(c.token_ids))) for c in plan.chunks)
    assert house.counters.recomputed_tokens == again > 0
    assert house.counters.computed_tokens == 2 * 19 + house.counters.recomputed_tokens


@pytest.mark.parametrize(
    ("params", "stop_token", "count", "reason"),
    [
        ({}, None, 4, FinishReason.STOP),
        ({"ignore_eos": True}, None, 20, FinishReason.LENGTH),
        ({"min_tokens": 3}, None, 4, FinishReason.STOP),
        ({"min_tokens": 4}, None, 20, FinishReason.LENGTH),
        ({"ignore_eos": True}, 5, 6, FinishReason.STOP),
        ({"ignore_eos": True, "min_tokens": 6}, 5, 20, FinishReason.LENGTH),
    ],
)
def test_what_ends_a_request(
    params: dict[str, object], stop_token: int | None, count: int, reason: FinishReason
) -> None:
    """EOS is what the request makes fourth, a stop token what it makes sixth, and only then."""
    free = alone(request("x", [1, 2], 20, seed=4), SchedulerConfig(64))
    assert free.count(free[3]) == free.count(free[5]) == 1
    stops = () if stop_token is None else (free[stop_token],)
    house = House(config=SchedulerConfig(64, eos_ids=frozenset({free[3]})))
    house.add(request("x", [1, 2], 20, seed=4, stop_token_ids=stops, **params))
    house.run()
    assert house.tokens[RequestId("x")] == free[:count]
    assert house.finish[RequestId("x")] is reason


def test_a_request_ends_at_max_model_len() -> None:
    house = House(config=SchedulerConfig(12))
    house.add(request("x", range(8), 100))
    house.run()
    assert len(house.tokens[RequestId("x")]) == 4
    assert house.finish[RequestId("x")] is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        (request("x", []), InvalidRequestError, "no tokens"),
        (request("x", range(64)), InvalidRequestError, "64 tokens, and the model serves 64"),
        (request("x", [1], 0), InvalidRequestError, "max_tokens=0"),
        (request("x", range(50), 14), ExhaustedError, "need 16 KV blocks, and there are 15"),
        (request("busy", [1]), InvalidRequestError, "'busy' is in use"),
    ],
)
def test_what_can_never_run_is_refused_up_front(
    refused: Request, error: type[Exception], message: str
) -> None:
    house = House(num_blocks=15)
    house.add(request("busy", [1, 2, 3]))
    with pytest.raises(error, match=message):
        house.scheduler.add(refused)
    house.run()
    house.assert_nothing_leaked()


def test_the_largest_request_that_fits_alone_runs() -> None:
    house = House(num_blocks=15)
    house.add(request("x", range(50), 11, ignore_eos=True), request("y", range(50), 11))
    house.run()
    assert len(house.tokens[RequestId("x")]) == 11
    house.assert_nothing_leaked()


def test_a_full_queue_refuses() -> None:
    house = House(config=SchedulerConfig(64, max_queue=2))
    house.add(request("a", [1]), request("b", [1]))
    with pytest.raises(ExhaustedError, match="2 requests are waiting"):
        house.scheduler.add(request("c", [1]))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "one token for each running"),
    ],
)
def test_contradictory_bounds_are_refused(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{"max_model_len": 64, **bounds})


def test_a_late_request_is_freed_by_the_next_plan() -> None:
    house = House()
    house.add(
        request("a", range(8), 50, deadline=3.0, ignore_eos=True), request("b", [1], deadline=0.5)
    )
    assert house.step().expired == ("b",)
    house.step()
    assert house.pool.num_free < house.pool.num_blocks
    assert house.step().expired == ("a",)
    house.assert_nothing_leaked()
    assert house.counters.finished == {FinishReason.DEADLINE: 2}


def test_an_abort_frees_at_once_also_while_the_step_runs() -> None:
    house = House()
    house.add(request("a", range(8)), request("b", range(5)))
    plan = house.scheduler.plan(1.0)
    assert house.abort("a")
    assert not house.abort("a")
    outs = house.scheduler.apply(house.executor.run(plan))
    assert [o.request_id for o in outs] == ["b"]
    house.abort("b")
    house.assert_nothing_leaked()


def test_an_id_can_be_used_again_when_its_request_has_ended() -> None:
    house = House()
    house.add(request("a", range(8), 4, ignore_eos=True))
    house.step()
    house.abort("a")
    house.add(request("a", range(30, 38), 4, ignore_eos=True))
    house.run()
    assert house.tokens[RequestId("a")] == alone(
        request("a", range(30, 38), 4, ignore_eos=True), house.config
    )


def test_what_failed_is_not_offered_to_others() -> None:
    house = House()
    house.add(request("a", range(8), 4, ignore_eos=True))
    house.step()
    house.abort("a", FinishReason.ERROR)
    assert house.pool.num_cached == 0


def test_first_come_first_served() -> None:
    house = House(num_blocks=8)
    house.add(*(request(f"r{i}", [i] * 12, 3, ignore_eos=True) for i in range(6)))
    ended: list[RequestId] = []
    while house.scheduler.has_work:
        house.step()
        ended += [r for r, f in house.finish.items() if f is not None and r not in ended]
    assert ended == [f"r{i}" for i in range(6)]


def test_who_is_urgent_is_served_first_and_of_others_who_came_first() -> None:
    house = House(config=SchedulerConfig(64, max_num_seqs=1))
    order = {"late": 1, "plain": 0, "urgent": -5, "plain too": 0, "urgent too": -5}
    asked = {name: replace(request(name, [7, 8], 2, ignore_eos=True), priority=priority)
             for name, priority in order.items()}  # fmt: skip
    house.add(*asked.values())
    served: list[str] = []
    while house.scheduler.has_work:
        served += [name for name in ran(house.step()) if name not in served]
    assert served == ["urgent", "urgent too", "plain", "plain too", "late"]


@pytest.mark.parametrize("urgent", ["a", "b"])
def test_who_is_least_urgent_yields_when_blocks_run_out(urgent: str) -> None:
    house = House(num_blocks=6)
    asked = [
        replace(request(name, range(at, at + 8), 12, ignore_eos=True), priority=-(name == urgent))
        for name, at in (("a", 0), ("b", 20))
    ]
    house.add(*asked)
    assert running_urgent(house.scheduler) == 0
    house.step()
    assert running_urgent(house.scheduler) == 1
    preempted = [p for _ in range(60) for p in house.step().preempted]
    assert set(preempted) == {"a", "b"} - {urgent}
    for one in asked:
        assert house.tokens[one.id] == alone(one, house.config)
    house.assert_nothing_leaked()


@given(st.lists(st.tuples(st.sampled_from(["come", "moved", "with kv", "preempted"]),
                          st.integers(-2, 2)), max_size=20))  # fmt: skip
def test_a_queue_is_in_order_of_priority_and_then_as_before(steps: list[tuple[str, int]]) -> None:
    """Each part of the queue is what a queue of that priority alone would be."""
    whole, parts = WaitingQueue(), {priority: WaitingQueue() for priority in range(-2, 3)}
    for number, (how, priority) in enumerate(steps):
        for queue in (whole, parts[priority]):
            one = replace(request(str(number), [1]), priority=priority)
            made = (5,) if how in ("moved", "preempted") else ()
            seq = SequenceState.of(one, History(made))
            if how == "with kv":
                seq.blocks = (BlockId(number),)
            (queue.put_first if how == "preempted" else queue.put)(seq)
    assert list(whole) == [name for priority in sorted(parts) for name in parts[priority]]


def test_a_request_starts_where_its_blocks_and_one_for_each_running_one_are_free() -> None:
    """B needs 2 blocks, and A, which holds 2, may need one more: 5 in all."""
    for num_blocks, started in ((5, ["a", "b"]), (4, ["a"])):
        house = House(num_blocks)
        house.add(request("a", range(8), 2), request("b", range(20, 28), 2))
        plan = house.step()
        assert ran(plan) == started
        assert plan.choice.admitted == len(started)
        assert plan.choice.refused is (Refusal.NONE if len(started) == 2 else Refusal.BLOCKS)


def test_blocks_that_are_shared_again_are_not_free_any_more() -> None:
    """C holds 1 block and may need another; B shares 2 that nobody holds, and needs 1: 5 in all."""
    for num_blocks, started in ((5, ["c", "b"]), (4, ["c"])):
        house = House(num_blocks)
        house.add(request("a", range(8), 1))
        house.run()
        house.add(request("c", range(40, 44), 2), request("b", [*range(8), 9], 2))
        assert ran(house.step()) == started


def test_as_many_run_as_may_and_no_more() -> None:
    house = House(config=SchedulerConfig(64, max_num_seqs=2, max_num_batched_tokens=16))
    house.add(*(request(name, [1, 2], 4, ignore_eos=True) for name in "abc"))
    plan = house.step()
    assert ran(plan) == ["a", "b"]
    assert plan.choice.refused is Refusal.SEQUENCES
    assert (house.scheduler.num_running, house.scheduler.num_waiting) == (2, 1)


def test_a_deadline_is_missed_when_it_comes() -> None:
    for now, expired in ((2.9, ()), (3.0, ("a",)), (3.1, ("a",))):
        house = House()
        house.add(request("a", [1], deadline=3.0))
        assert house.scheduler.plan(now).expired == expired


def test_only_full_blocks_whose_tokens_are_computed_can_be_found() -> None:
    house = House()
    house.add(request("a", range(7), 3, ignore_eos=True))
    cached = []
    while house.scheduler.has_work:
        house.step()
        cached.append(house.pool.num_cached)
    assert cached == [1, 2, 2]  # 7, 8 and 9 tokens


def test_what_was_cancelled_is_offered_to_others() -> None:
    house = House()
    house.add(request("a", range(8), 4, ignore_eos=True))
    house.step()
    house.abort("a")
    assert house.pool.num_cached == 2


def test_the_tightest_bounds_that_make_sense_are_taken() -> None:
    config = SchedulerConfig(2, max_num_seqs=1, max_num_batched_tokens=1, max_queue=1)
    house = House(1, config)
    house.add(request("a", [1], 9))
    house.run()
    assert len(house.tokens[RequestId("a")]) == 1


def test_what_is_looked_up_and_found_is_counted_once_per_request() -> None:
    house = House(num_blocks=6)
    house.add(
        request("a", range(8), max_tokens=12, ignore_eos=True),
        request("b", range(20, 28), max_tokens=12, ignore_eos=True),
    )
    house.run()
    assert house.counters.preemptions > 0
    assert house.counters.prefix_queried_tokens == 16
    assert house.counters.prefix_hit_tokens == 0


def test_a_preempted_request_is_first_in_the_queue_and_says_how_far_it_was() -> None:
    house = House(num_blocks=6, config=SchedulerConfig(64, prefix_cache=False))
    house.add(
        *(request(n, range(at, at + 8), 12, ignore_eos=True) for n, at in (("a", 0), ("b", 20)))
    )
    house.add(request("c", [1], 1))
    plans = []
    while house.scheduler.has_work:
        plans.append(house.step())
    (preempting,) = [plan for plan in plans if plan.preempted]
    assert ran(preempting) == ["a"]
    reached = max(
        c.start + len(c.token_ids)
        for p in plans[: plans.index(preempting)]
        for c in p.chunks
        if c.request.id == "b"
    )
    again = [c for p in plans[plans.index(preempting) :] for c in p.chunks if c.request.id == "b"]
    assert (again[0].start, again[0].reached) == (0, reached)
    started = [name for plan in plans[plans.index(preempting) :] for name in ran(plan)]
    assert started.index("b") < started.index("c")


def test_right_drafts_make_several_tokens_a_step(guessers: Guessers) -> None:
    house = House(drafter=guessers(VOCAB, 3))
    asked = request("a", range(5), 8, ignore_eos=True)
    house.add(asked)
    samples = []
    while house.scheduler.has_work:
        samples += [c.samples for c in house.step().chunks]
    assert samples == [1, 4, 3]  # at most what the answer still needs
    assert house.tokens[RequestId("a")] == alone(asked, house.config)
    count = house.counters
    assert (count.steps, count.generated_tokens, count.computed_tokens) == (3, 8, 12)
    assert (count.drafted_tokens, count.accepted_tokens) == (5, 5)


def test_wrong_drafts_cost_no_token_and_leave_no_trace(guessers: Guessers) -> None:
    house = House(drafter=guessers(VOCAB, 3, errs=1))
    asked = request("a", range(5), 8, ignore_eos=True)
    house.add(asked)
    house.run()
    assert house.tokens[RequestId("a")] == alone(asked, house.config)
    assert (house.counters.steps, house.counters.accepted_tokens) == (8, 0)
    assert house.counters.computed_tokens == 5 + 7
    assert house.counters.recomputed_tokens == 0


def test_an_answer_with_a_grammar_has_no_drafts(guessers: Guessers) -> None:
    house = House(drafter=guessers(VOCAB, 3))
    grammar = Grammar(GrammarKind.REGEX, "a*")
    house.add(request("a", range(5), 8, ignore_eos=True, grammar=grammar))
    house.run()
    assert (house.counters.steps, house.counters.drafted_tokens) == (8, 0)


def test_drafts_leave_every_generating_request_its_token(guessers: Guessers) -> None:
    config = SchedulerConfig(64, max_num_seqs=3, max_num_batched_tokens=5)
    house = House(config=config, drafter=guessers(VOCAB, 4))
    house.add(*(request(name, [i], 9, ignore_eos=True) for i, name in enumerate("abc")))
    house.step()
    assert [(c.request.id, c.samples) for c in house.step().chunks] == [
        ("a", 3),
        ("b", 1),
        ("c", 1),
    ]


def test_drafts_take_free_blocks_only(guessers: Guessers) -> None:
    house = House(num_blocks=4, drafter=guessers(VOCAB, 9))
    house.add(request("a", range(8), 9, ignore_eos=True), request("b", [1], 2, ignore_eos=True))
    house.step()
    plan = house.step()
    assert [(c.request.id, len(c.token_ids), len(c.blocks)) for c in plan.chunks] == [
        ("a", 4, 3),
        ("b", 1, 1),
    ]
    assert not plan.preempted


def test_tokens_behind_one_that_ends_the_request_are_dropped(guessers: Guessers) -> None:
    free = alone(request("a", [1, 2], 20, seed=4, ignore_eos=True), SchedulerConfig(64))
    config = SchedulerConfig(64, eos_ids=frozenset({free[3]}))
    house = House(config=config, drafter=guessers(VOCAB, 6))
    house.add(request("a", [1, 2], 20, seed=4))
    house.run()
    assert house.tokens[RequestId("a")] == free[:4]
    assert house.finish[RequestId("a")] is FinishReason.STOP
    assert house.counters.generated_tokens == 4
    assert house.counters.computed_tokens == 2 + 3
    house.assert_nothing_leaked()


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
    for i in range(draw(st.integers(1, 8))):
        prompt = [
            *draw(st.sampled_from(beginnings)),
            *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)),
        ][draw(st.integers(0, 8)) :]
        r = request(
            f"r{i}",
            prompt,
            draw(st.integers(1, 12)),
            draw(st.none() | st.integers(1, 60)),
            draw(st.sampled_from(["", "tenant"])),
            seed=draw(st.integers(0, 2)),
            min_tokens=draw(st.integers(0, 3)),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))),
        )
        r = replace(r, priority=draw(st.sampled_from([0, 0, 0, -1, 2])))
        at = draw(st.integers(0, 20))
        abort_at = draw(st.none() | st.integers(at, at + 20))
        found.append(Arrival(at, r, abort_at))
    return found


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals(),
    num_blocks=st.integers(8, 20),
    max_num_seqs=st.integers(1, 5),
    spare=st.integers(0, 20),
    prefix_cache=st.booleans(),
    drafts=st.sampled_from([0, 0, 1, 2, 5, -4]),
    errs=st.integers(0, 4),
    swap_places=st.sampled_from([0, 20, 50, 1000]),
)
def test_scheduling_never_changes_tokens(
    arrivals: list[Arrival],
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_cache: bool,
    drafts: int,
    errs: int,
    swap_places: int,
    guessers: Guessers,
) -> None:
    """Nor does sampling several at a time, under preemption, stops and bounds of the answer; nor
    does KV that is swapped."""
    config = SchedulerConfig(
        max_model_len=40,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_cache,
    )
    drafter = guessers(VOCAB, drafts, errs) if drafts else None
    house = House(num_blocks, config, drafter, swap_places)
    last = max(max(a.step, a.abort_at or 0) for a in arrivals)
    for now in range(2000):
        house.add(*(a.request for a in arrivals if a.step == now))
        for a in arrivals:
            if a.abort_at == now:
                house.abort(a.request.id)
        if now > last and not house.scheduler.has_work:
            break
        plan = house.step()
        assert plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.chunks) <= max_num_seqs
        assert plan.chunks or not house.scheduler.has_work, "work is left and nothing is planned"
        house.pool.check()
        if house.swap is not None:
            house.swap.check()
    house.assert_nothing_leaked()
    for a in arrivals:
        expected, got = alone(a.request, config), house.tokens[a.request.id]
        if house.finish[a.request.id] in (FinishReason.STOP, FinishReason.LENGTH):
            assert got == expected
        else:
            assert got == expected[: len(got)]
            assert house.finish[a.request.id] in (FinishReason.ABORT, FinishReason.DEADLINE)
    assert sum(house.counters.finished.values()) == len(arrivals)
    computed = house.counters.computed_tokens
    assert house.counters.generated_tokens == sum(map(len, house.tokens.values()))
    assert computed <= len(arrivals) * 40 + house.counters.recomputed_tokens
    assert house.counters.accepted_tokens <= house.counters.drafted_tokens


@settings(max_examples=60, deadline=None)
@given(num_blocks=st.integers(10, 16), count=st.integers(2, 12))
def test_nobody_starves(num_blocks: int, count: int) -> None:
    """While anyone is served, whoever was admitted first advances in every step."""
    config = SchedulerConfig(40, max_num_seqs=4, max_num_batched_tokens=6)
    house = House(num_blocks, config)
    house.add(*(request(f"r{i}", [i] * 20, 20) for i in range(count)))
    admitted: list[RequestId] = []
    while house.scheduler.has_work:
        plan = house.step()
        admitted += [c.request.id for c in plan.chunks if c.request.id not in admitted]
        oldest = next(r for r in admitted if house.finish[r] is None or r in ran(plan))
        assert oldest in ran(plan)
    assert admitted == [f"r{i}" for i in range(count)]


def test_deadlines_are_met_in_any_order_and_after_others_ended() -> None:
    house = House()
    deadlines = {"a": 5.0, "b": 3.0, "c": None, "d": 3.0, "e": 4.0}
    house.add(*(request(n, [1, 2], 50, d, ignore_eos=True) for n, d in deadlines.items()))
    assert [house.step().expired for _ in range(2)] == [(), ()]
    house.abort("e")
    assert [house.step().expired for _ in range(3)] == [("b", "d"), (), ("a",)]
    house.add(request("f", [1], 50, 6.0))
    assert [house.step().expired for _ in range(2)] == [("f",), ()]


def test_one_more_token_keeps_the_same_blocks_and_outputs() -> None:
    """By these an executor knows what did not change."""
    house = House()
    house.add(request("a", range(6), 9, ignore_eos=True))
    chunks = [chunk for _ in range(9) for chunk in house.step().chunks]
    assert len({id(c.output_ids) for c in chunks}) == 1
    for before, chunk in itertools.pairwise(chunks):
        grew = (chunk.start + 1 - 1) % BLOCK == 0
        assert len(chunk.blocks) == len(before.blocks) + grew
        assert grew or chunk.blocks is before.blocks


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=9),
    max_num_seqs=st.integers(1, 5),
    spare=st.integers(0, 12),
)
def test_what_is_foreseen_comes_where_nothing_unforeseen_happens(
    sizes: list[tuple[int, int]], max_num_seqs: int, spare: int
) -> None:
    config = SchedulerConfig(40, max_num_seqs, max_num_seqs + spare, prefix_cache=False)
    house = House(64, config)
    for i, (prompt, answer) in enumerate(sizes):
        house.add(request(f"r{i}", range(prompt), answer, ignore_eos=True))
    expected = None
    while house.scheduler.has_work:
        plan = house.scheduler.plan(0.0)
        decodes = [c.start >= len(c.request.prompt_ids) for c in plan.chunks]
        assert expected in (None, NextStep(plan.num_tokens, all(decodes)))
        expected = house.scheduler.foresee()
        house.scheduler.apply(house.executor.run(plan))
    assert expected == NextStep(0, True)


def test_who_finds_no_room_is_foreseen_when_somebody_leaves() -> None:
    house = House(num_blocks=4)
    house.add(request("a", range(8), 3, ignore_eos=True), request("b", range(8), 3))
    seen = []
    for _ in range(3):
        plan = house.scheduler.plan(0.0)
        assert ran(plan) == ["a"]
        seen.append(house.scheduler.foresee())
        house.scheduler.apply(house.executor.run(plan))
    assert seen == [NextStep(1, True), NextStep(1, True), NextStep(8, False)]


def test_what_is_foreseen_holds_no_more_than_is_there() -> None:
    house = House()
    assert house.scheduler.foresee() == NextStep(0, True)
    house.add(request("a", range(8)), request("b", range(5)))
    assert house.scheduler.foresee() == NextStep(13, False)
    house.step()
    house.abort("a")
    assert house.scheduler.foresee() == NextStep(1, True)


def test_foreseen_tokens_stay_within_the_budget() -> None:
    looked_at = iter([5, 6, 7, 8])
    found = foresee_step(generating=2, left=3, waiting=looked_at, budget=12)
    assert found == NextStep(12, False)
    assert list(looked_at) == [8]
    assert foresee_step(generating=4, left=0, waiting=[9], budget=4) == NextStep(4, True)


def test_only_who_waits_can_be_withdrawn() -> None:
    house = House(config=SchedulerConfig(64, max_num_seqs=1))
    house.add(request("a", [1, 2], 3, ignore_eos=True), request("b", [3, 4], 3))
    house.step()
    (taken,) = house.scheduler.withdraw(2)
    assert (taken.request.id, taken.output_ids, taken.finish) == ("b", [], None)
    assert house.scheduler.withdraw(2) == []
    assert not house.scheduler.owns(RequestId("b"))
    house.run()
    assert house.counters.finished == {FinishReason.LENGTH: 1}
    house.assert_nothing_leaked()


def move(source: House, target: House, count: int = 1) -> list[RequestId]:
    """Of those that wait, so many now wait elsewhere."""
    moved = source.scheduler.withdraw(count)
    for seq in moved:
        request_id = seq.request.id
        assert source.tokens[request_id] == seq.output_ids
        target.scheduler.add(seq.request, History(tuple(seq.output_ids), seq.reached, True))
        target.take_note(seq.request, source.tokens.pop(request_id))
        del source.finish[request_id]
    return [seq.request.id for seq in moved]


def test_a_preempted_request_goes_on_elsewhere_with_its_tokens() -> None:
    config = SchedulerConfig(64, max_num_seqs=2, prefix_cache=False)
    source, target = House(6, config), House(64, config)
    asked = [request(n, range(at, at + 8), 12, ignore_eos=True) for n, at in (("a", 0), ("b", 20))]
    source.add(*asked)
    target.add(request("c", [1], 1), request("d", [2], 1), request("e", [3], 1))
    while not source.step().preempted:
        pass
    made = len(source.tokens[RequestId("b")])
    assert made > 1
    assert move(source, target) == ["b"]
    assert ran(target.step()) == ["b", "c"]  # it goes before those that never ran
    source.run()
    target.run()
    assert target.tokens[RequestId("b")] == alone(asked[1], config)
    assert source.counters.prompt_tokens == 16
    assert target.counters.prompt_tokens == 3
    assert target.counters.generated_tokens == 3 + 12 - made
    assert target.counters.recomputed_tokens == 8 + made - 1
    assert target.counters.prefix_queried_tokens == 3
    source.assert_nothing_leaked()
    target.assert_nothing_leaked()


def test_a_request_that_moves_keeps_its_deadline() -> None:
    source, target = House(), House()
    source.add(request("a", [1], 9, deadline=3.0))
    assert move(source, target) == ["a"]
    assert [target.scheduler.plan(now).expired for now in (2.0, 3.0)] == [(), ("a",)]


@pytest.mark.parametrize("made", [4, 5, 10])
def test_an_answer_that_is_complete_is_not_taken_over(made: int) -> None:
    house = House(config=SchedulerConfig(12))
    with pytest.raises(InvalidRequestError, match=f"{made} tokens of an answer that may have 4: "):
        house.scheduler.add(request("a", [1], 4), History((0,) * made))
    with pytest.raises(InvalidRequestError, match="10 tokens of an answer that may have 10: "):
        house.scheduler.add(request("b", [1, 2], 99), History((0,) * 10))
    house.scheduler.add(request("b", [1, 2], 99), History((0,) * 9))


@settings(max_examples=60, deadline=None)
@given(
    arrivals=arrivals(),
    num_blocks=st.integers(8, 14),
    moves=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7), st.booleans()), max_size=20),
    prefix_cache=st.booleans(),
)
def test_moving_what_waits_never_changes_tokens(
    arrivals: list[Arrival],
    num_blocks: int,
    moves: list[tuple[int, int, bool]],
    prefix_cache: bool,
) -> None:
    """Requests arrive at one of two schedulers and move between them while they wait."""
    config = SchedulerConfig(40, 3, 8, eos_ids=frozenset({EOS}), prefix_cache=prefix_cache)
    houses = [House(num_blocks, config), House(num_blocks, config)]
    for now in range(200):
        for i, a in enumerate(arrivals):
            if a.step == now:
                houses[i % 2].add(replace(a.request, deadline=None))
        for at, count, back in moves:
            if at == now:
                source, target = houses[::-1] if back else houses
                move(source, target, count)
        for house in houses:
            house.step()
            house.pool.check()
    for house in houses:
        house.assert_nothing_leaked()
    made = {**houses[0].tokens, **houses[1].tokens}
    assert made == {a.request.id: alone(a.request, config) for a in arrivals}
    prompts = sum(len(a.request.prompt_ids) for a in arrivals)
    assert sum(house.counters.prompt_tokens for house in houses) == prompts


def ran(plan: StepPlan) -> list[RequestId]:
    return [c.request.id for c in plan.chunks]
