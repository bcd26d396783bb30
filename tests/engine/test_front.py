"""Doors choose homes from late tables: nobody is lost, none overtakes, tokens stay the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import (
    CacheScope,
    Counters,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockKey, BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.fairness import ServiceCounters
from moeserve.engine.ranks.front import Front, Placement
from moeserve.engine.ranks.homes import GivenHome, HomePolicy, LeastWork, RandomHomes
from moeserve.engine.ranks.loads import RankLoads, surplus
from moeserve.engine.ranks.prefixes import PrefixIndex
from moeserve.engine.ranks.rank_view import Doors, slots_of_door
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History
from moeserve.errors import ExhaustedError, InvalidRequestError

BLOCK, VOCAB, EOS = 4, 50, 7
CONFIG = SchedulerConfig(
    max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, eos_ids=frozenset({EOS})
)


def ask(name: str, prompt: Sequence[int] = (1, 2, 3), most: int = 8, **fields: object) -> Request:
    params = SamplingParams(max_tokens=most, ignore_eos=bool(fields.pop("endless", True)))
    return Request(RequestId(name), tuple(prompt), params, **fields)  # type: ignore[arg-type]


def table(step: int = 1, **columns: Sequence[int]) -> RankLoads:
    """Of ranks with nothing to do, but for the columns that are given."""
    ranks = max(map(len, columns.values()), default=2)
    filled = RankLoads.idle(np.full(ranks, 64, np.int64))
    given = {f"{name}_R": np.array(column, np.int64) for name, column in columns.items()}
    return replace(filled, step=step, **given)


def front_of(
    loads: RankLoads | None = None,
    config: SchedulerConfig = CONFIG,
    num_blocks: int = 64,
    **options: object,
) -> Front:
    check = Scheduler(config, BlockPool(num_blocks, BLOCK, Counters()), Counters()).check
    return Front(config, BLOCK, loads or table(), check, **{"ahead": 0, **options})  # type: ignore[arg-type]


def homes_of(placed: Sequence[Placement]) -> dict[str, int]:
    return {p.request.id: p.rank for p in placed}


def add(front: Front, *requests: Request) -> None:
    for request in requests:
        front.add(request)


def test_requests_spread_over_ranks_as_far_as_the_table_and_what_was_sent_leave_room() -> None:
    front = front_of(table(running=[1, 0, 0], held=[9, 0, 0]))
    add(front, *(ask(str(i)) for i in range(7)))
    assert homes_of(front.place()) == {"0": 1, "1": 2, "2": 1, "3": 2, "4": 0}
    assert (front.num_waiting, front.home_of(RequestId("5"))) == (2, None)
    assert front.place() == []


def test_urgent_requests_leave_first_also_those_that_were_given_back() -> None:
    front = front_of(table(running=[1]), config=replace(CONFIG, max_num_seqs=2))
    add(front, ask("plain"), ask("urgent", priority=-1), ask("late", priority=4))
    assert homes_of(front.place()) == {"urgent": 0}
    front.publish(table(2, running=[2]))
    front.returned(RequestId("urgent"), [4])
    front.publish(table(3, running=[1]))
    add(front, ask("urgent too", priority=-1), ask("most urgent", priority=-2))
    left = []
    for step in range(4, 9):
        left += [p.request.id for p in front.place()]
        for name in left:
            front.taken(RequestId(name), step)
        front.publish(table(step + 1, running=[1]))
    assert left == ["most urgent", "urgent", "urgent too", "plain", "late"]


def test_what_was_sent_counts_until_a_table_shows_it() -> None:
    front = front_of(table(running=[0]))
    add(front, *(ask(str(i)) for i in range(5)))
    assert homes_of(front.place()) == {"0": 0, "1": 0}
    front.publish(table(2, running=[0]))
    assert front.place() == []
    front.taken(RequestId("0"), 3)
    front.taken(RequestId("1"), 4)
    front.publish(table(3, running=[1]))
    assert front.place() == []  # the table shows 0; 1 is on its way
    front.publish(table(4, running=[1]))
    assert homes_of(front.place()) == {"2": 0}  # one of them has ended
    front.taken(RequestId("2"), 4)  # the table has it: there is a slot more than it seemed
    assert homes_of(front.place()) == {"3": 0}


def test_a_request_that_never_arrived_takes_no_room() -> None:
    front = front_of(table(running=[1]))
    add(front, ask("a"), ask("b"))
    assert homes_of(front.place()) == {"a": 0}
    front.finished(RequestId("a"))
    assert homes_of(front.place()) == {"b": 0}


def test_the_first_that_fits_nowhere_holds_all_others_up() -> None:
    front = front_of(table(free_blocks=[3, 2]))
    add(front, ask("long", range(20)), ask("short"))
    assert front.place() == []
    front.publish(table(2, free_blocks=[3, 5]))
    assert homes_of(front.place()) == {"long": 1, "short": 0}


def test_room_is_slots_blocks_to_grow_and_tokens_of_a_step() -> None:
    three = ask("a")
    for loads, fits in (
        (table(running=[1], free_blocks=[2]), True),
        (table(running=[1], free_blocks=[1]), False),
        (table(running=[1], waiting=[1]), False),
        (table(foreseen=[15]), True),
        (table(foreseen=[16]), False),
    ):
        front = front_of(loads)
        front.add(three)
        assert bool(front.place()) is fits, loads


def test_a_prompt_that_fills_the_step_sends_the_next_one_elsewhere() -> None:
    front = front_of(homes=GivenHome(lambda request: 0, LeastWork()))
    add(front, ask("long", range(16)), ask("next"))
    assert homes_of(front.place()) == {"long": 0, "next": 1}


def test_requests_ahead_wait_at_full_ranks_one_at_each_first() -> None:
    full = table(running=[2, 2], held=[5, 50])
    front = front_of(full, ahead=2)
    add(front, *(ask(str(i)) for i in range(5)))
    assert homes_of(front.place()) == {"0": 0, "1": 1, "2": 0, "3": 1}
    assert front.num_waiting == 1


def test_nobody_waits_ahead_where_more_than_a_slot_is_missing() -> None:
    for full in (table(running=[2], foreseen=[16]), table(running=[2], free_blocks=[2])):
        front = front_of(full, ahead=1)
        front.add(ask("a"))
        assert front.place() == []


def test_what_is_given_back_comes_before_all_others_in_order_of_arrival() -> None:
    front = front_of(table(running=[0]))
    add(front, *(ask(str(i)) for i in range(3)))
    assert homes_of(front.place()) == {"0": 0, "1": 0}
    assert front.returned(RequestId("1"), [])
    assert front.returned(RequestId("0"), [4, 5])
    assert [(p.request.id, p.output_ids) for p in front.place()] == [("0", (4, 5)), ("1", ())]


def test_what_is_refused() -> None:
    front = front_of(table(running=[2]), replace(CONFIG, max_queue=2), num_blocks=4)
    with pytest.raises(ExhaustedError, match="need 5 KV blocks, and there are 4"):
        front.add(ask("big", range(10)))
    front.add(ask("a"))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        front.add(ask("a"))
    front.add(ask("b"))
    with pytest.raises(ExhaustedError, match="2 requests are waiting"):
        front.add(ask("c"))


def test_those_who_wait_at_ranks_and_other_doors_count_for_the_bound_of_the_queue() -> None:
    front = front_of(config=replace(CONFIG, max_queue=4), doors=Doors((0, 1), 1))
    front.publish(table(waiting=[1, 1], queued=[2, 7]))
    with pytest.raises(ExhaustedError, match="4 requests are waiting"):
        front.add(ask("a"))


def test_a_sent_request_is_in_use_until_it_has_ended() -> None:
    front = front_of()
    front.add(ask("a"))
    front.place()
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        front.add(ask("a"))
    front.finished(RequestId("a"))
    front.add(ask("a"))


def test_abort_ends_what_waits_here_and_names_the_home_of_the_rest() -> None:
    front = front_of(table(running=[1]))
    add(front, ask("a"), ask("b"))
    front.place()
    assert front.abort(RequestId("b")) is None
    assert front.abort(RequestId("nobody")) is None
    assert front.num_waiting == 0
    assert front.abort(RequestId("a")) == 0
    assert not front.returned(RequestId("a"), [])  # it was on the way back: that ends it
    front.add(ask("a"))
    assert homes_of(front.place()) == {"a": 0}


def test_those_who_wait_here_expire_at_their_deadline_also_after_they_came_back() -> None:
    front = front_of(table(running=[1]))
    add(front, ask("a", deadline=5.0), ask("b", deadline=3.0), ask("c"))
    front.place()
    assert front.expire(2.9) == []
    assert front.expire(3.0) == ["b"]
    assert front.expire(5.0) == []  # its home does that
    front.returned(RequestId("a"), [])
    assert front.expire(5.0) == ["a"]
    assert (front.num_waiting, front.expire(99.0)) == (1, [])


def test_a_request_follows_its_prefix_while_that_saves_more_than_it_overloads() -> None:
    front = front_of(table(held=[1, 0]), replace(CONFIG, max_num_seqs=4), prefix_keys=100)
    shared = list(range(12))
    add(front, ask("first", [*shared, 1]))
    assert homes_of(front.place()) == {"first": 1}
    front.taken(RequestId("first"), 2)
    front.publish(table(2))
    add(front, *(ask(f"r{i}", [*shared, 20 + i]) for i in range(3)))
    # With r1 on its way, rank 0 will have the prefix, too.
    assert homes_of(front.place()) == {"r0": 1, "r1": 0, "r2": 0}


def test_a_prefix_is_of_its_scope() -> None:
    homes = GivenHome(lambda request: 1 if request.id == "a" else None, LeastWork())
    front = front_of(homes=homes, prefix_keys=100)
    front.add(ask("a", range(13)))
    front.place()
    front.taken(RequestId("a"), 2)
    front.publish(table(2))
    add(front, ask("b", range(13), scope=CacheScope("tenant")))
    assert homes_of(front.place()) == {"b": 0}
    front.finished(RequestId("b"))
    add(front, ask("c", range(13)))
    assert homes_of(front.place()) == {"c": 1}


def test_a_prompt_that_is_cached_up_to_its_end_still_has_a_token_to_compute() -> None:
    config = replace(CONFIG, max_num_batched_tokens=3, max_num_seqs=3)
    front = front_of(table(running=[0]), config, prefix_keys=100)
    front.add(ask("a", range(8)))
    front.place()
    front.taken(RequestId("a"), 2)
    front.publish(table(2, running=[0]))
    add(front, ask("b", range(8)), ask("c", range(8)))
    assert homes_of(front.place()) == {"b": 0}  # four tokens: its last block is computed anew


def test_ranks_give_back_who_waits_while_another_has_a_slot() -> None:
    def given(**columns: Sequence[int]) -> list[int]:
        return surplus(table(**columns), CONFIG).tolist()

    assert given(running=[2, 1, 2], waiting=[2, 0, 1]) == [1, 0, 0]
    assert given(running=[2, 0, 2], waiting=[1, 0, 4]) == [1, 0, 1]
    assert given(running=[2, 2, 2], waiting=[2, 0, 1]) == [0, 0, 0]
    assert given(running=[2, 0, 2], waiting=[1, 0, 1], foreseen=[0, 16, 0]) == [0, 0, 0]
    assert given(running=[1, 1], waiting=[1, 1]) == [0, 0]  # both lack blocks
    assert given(running=[0, 0]) == [0, 0]


def test_doors_of_one_table_begin_with_different_ranks() -> None:
    loads = table(held=[40, 10, 30, 20])
    for own, expected in ((0, [1, 1, 2, 2, 3]), (1, [3, 3, 0, 0, 1])):
        front = front_of(loads, doors=Doors((0, 1), own))
        add(front, *(ask(str(i)) for i in range(5)))
        assert list(homes_of(front.place()).values()) == expected


def test_doors_at_which_more_wait_than_there_is_room_for_share_it() -> None:
    loads = table(running=[2, 1, 0, 2], held=[40, 10, 0, 20], queued=[3, 3, 0, 0])
    homes = []
    for own in (0, 1):
        front = front_of(loads, doors=Doors((0, 1), own))
        front.publish(loads)
        add(front, *(ask(str(i)) for i in range(4)))
        homes += homes_of(front.place()).values()
    assert sorted(homes) == [1, 2, 2]


@given(
    free=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    queued=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    step=st.integers(0, 5000),
    order=st.randoms(use_true_random=False),
)
def test_shares_of_doors_add_up_to_all_slots_and_none_gets_what_it_does_not_need(
    free: list[int], queued: list[int], step: int, order: object
) -> None:
    free_R, queued_D = np.array(free, np.int64), np.array(queued, np.int64)
    order_R = np.array(order.sample(range(len(free)), len(free)))  # type: ignore[attr-defined]
    shares = [slots_of_door(free_R, order_R, queued_D, d, step) for d in range(len(queued))]
    assert sum(shares).tolist() == free  # type: ignore[union-attr]
    for share_R, waiting in zip(shares, queued, strict=True):
        exact = sum(free) * waiting / sum(queued)
        assert abs(share_R.sum() - exact) < 1


def test_every_door_has_its_turn_where_there_is_less_than_a_slot_for_each() -> None:
    queued_D = np.array([1, 7, 0], np.int64)
    one, order_R = np.array([0, 1]), np.arange(2)
    got = [
        sum(int(slots_of_door(one, order_R, queued_D, d, s).sum()) for s in range(1024))
        for d in range(3)
    ]
    assert got == [128, 896, 0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=5)), max_size=25),
    st.integers(1, 12),
)
def test_a_prefix_is_where_its_blocks_were_sent_last(
    sent: list[tuple[int, list[int]]], most: int
) -> None:
    """Keys stand for chains: the key of a block names all before it."""

    def keys_of(bits: list[int]) -> list[BlockKey]:
        return [BlockKey(bytes(bits[: i + 1])) for i in range(len(bits))]

    index = PrefixIndex(3, most)
    recent: dict[BlockKey, set[int]] = {}  # oldest first
    for rank, bits in sent:
        keys = keys_of(bits)
        expected = [0, 0, 0]
        for r in range(3):
            for key in keys:
                if r not in recent.get(key, ()):
                    break
                expected[r] += 1
        assert index.cached_blocks(keys).tolist() == expected
        index.record(keys, rank)
        for key in reversed(keys):
            recent[key] = recent.pop(key, set()) | {rank}
        while len(recent) > most:
            del recent[next(iter(recent))]
        assert len(index) == len(recent)


@dataclass
class Instance:
    """Ranks with schedulers of their own and doors with fronts, stepped by hand.

    Doors get the table of ranks ``age - 1`` steps after these planned the step; what they send is
    there when the next one is planned.
    """

    ranks: int
    num_blocks: int
    config: SchedulerConfig
    homes: Sequence[HomePolicy]
    age: int = 1
    ahead: int = 1
    prefix_keys: int = 0
    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    finish: dict[RequestId, FinishReason | None] = field(default_factory=dict)
    door_of: dict[RequestId, int] = field(default_factory=dict)
    placed: list[list[RequestId]] = field(default_factory=list)
    step_number: int = 0
    moved: int = 0

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.pools = [BlockPool(self.num_blocks, BLOCK, self.counters) for _ in range(self.ranks)]
        self.schedulers = [
            Scheduler(self.config, pool, self.counters, rank=rank)
            for rank, pool in enumerate(self.pools)
        ]
        self.executors = [NullExecutor(self.num_blocks, BLOCK, VOCAB) for _ in range(self.ranks)]
        idle = RankLoads.idle(np.full(self.ranks, self.num_blocks, np.int64))
        self.tables = deque([idle] * self.age, maxlen=self.age)
        doors = tuple(range(len(self.homes)))
        self.fronts = [
            front_of(
                idle,
                self.config,
                self.num_blocks,
                homes=policy,
                doors=Doors(doors, door),
                ahead=self.ahead,
                prefix_keys=self.prefix_keys,
            )
            for door, policy in enumerate(self.homes)
        ]
        self.placed = [[] for _ in doors]
        self.sent: list[Placement] = []

    @property
    def has_work(self) -> bool:
        return any(reason is None for reason in self.finish.values())

    def add(self, door: int, request: Request) -> None:
        self.fronts[door].add(request)
        self.door_of[request.id] = door
        self.tokens[request.id] = []
        self.finish[request.id] = None
        self.place()

    def abort(self, request_id: RequestId) -> None:
        """As a door does: what waits there ends, what was sent is ended at its home."""
        if self.finish[request_id] is not None:
            return
        front = self.fronts[self.door_of[request_id]]
        home = front.abort(request_id)
        self.finish[request_id] = FinishReason.ABORT
        if home is not None:
            on_its_way = any(p.request.id == request_id for p in self.sent)
            assert on_its_way or self.schedulers[home].abort(request_id, FinishReason.ABORT)
            self.sent = [p for p in self.sent if p.request.id != request_id]
            front.finished(request_id)
            assert front.home_of(request_id) is None

    def place(self) -> None:
        for door, front in enumerate(self.fronts):
            placed = front.place()
            self.sent += placed
            self.placed[door] += [p.request.id for p in placed]

    def step(self) -> None:
        self.step_number += 1
        for placement in self.sent:
            request_id, rank = placement.request.id, self.schedulers[placement.rank]
            assert self.finish[request_id] is None
            assert list(placement.output_ids) == self.tokens[request_id]
            assert not any(other.owns(request_id) for other in self.schedulers)
            rank.add(
                placement.request, History(placement.output_ids, moved=bool(placement.output_ids))
            )
            self.fronts[self.door_of[request_id]].taken(request_id, self.step_number)
        self.sent = []
        plans = [rank.plan(0.0) for rank in self.schedulers]
        self.tables.append(self.loads())
        self.publish(self.tables[0])
        for rank, executor, plan in zip(self.schedulers, self.executors, plans, strict=True):
            if not plan.chunks:
                continue
            for out in rank.apply(executor.run(plan)):
                self.tokens[out.request_id].append(out.token_id)
                if out.finish is not None:
                    self.finish[out.request_id] = out.finish
                    self.fronts[self.door_of[out.request_id]].finished(out.request_id)

    def publish(self, loads: RankLoads) -> None:
        for front in self.fronts:
            front.publish(loads)
        for rank, count in zip(self.schedulers, surplus(loads, self.config), strict=True):
            for seq in rank.withdraw(int(count)):
                self.moved += 1
                request_id = seq.request.id
                front = self.fronts[self.door_of[request_id]]
                assert front.returned(request_id, seq.output_ids)
        self.place()

    def loads(self) -> RankLoads:
        rows = [
            (r.num_running, r.num_waiting, r.num_tokens, r.num_foreseen, r.pool.num_free)
            for r in self.schedulers
        ]
        queued_R = np.zeros(self.ranks, np.int64)
        queued_R[: len(self.fronts)] = [front.num_waiting for front in self.fronts]
        return RankLoads(self.step_number, *np.array(rows, np.int64).T, queued_R)

    def assert_nothing_leaked(self) -> None:
        for pool in self.pools:
            pool.check()
            assert pool.num_free == self.num_blocks
        assert not any(rank.has_work for rank in self.schedulers)
        assert [front.num_waiting for front in self.fronts] == [0] * len(self.fronts)


def alone(request: Request, config: SchedulerConfig) -> list[int]:
    """The tokens of a request on a rank by itself."""
    counters = Counters()
    scheduler = Scheduler(config, BlockPool(64, BLOCK, counters), counters)
    scheduler.add(request)
    outcomes = drive(scheduler, NullExecutor(64, BLOCK, VOCAB))
    return [out.token_id for outcome in outcomes for out in outcome.outs]


@dataclass(frozen=True)
class Arrival:
    step: int
    door: int
    request: Request
    abort_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Requests over time; prompts come from few beginnings, so that prefixes are shared."""
    found = []
    for i in range(draw(st.integers(1, 14))):
        prompt = [draw(st.integers(0, 2))] * draw(st.integers(0, 8))
        prompt += draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
        request = ask(f"r{i}", prompt, draw(st.integers(1, 12)), endless=draw(st.booleans()))
        at = draw(st.integers(0, 12))
        abort_at = draw(st.none() | st.none() | st.integers(at, at + 20))
        found.append(Arrival(at, draw(st.integers(0, 3)), request, abort_at))
    return found


def history(instance: Instance, arrivals: list[Arrival]) -> None:
    last = max(max(a.step, a.abort_at or 0) for a in arrivals)
    for now in range(2000):
        for a in arrivals:
            if a.step == now:
                instance.add(a.door % len(instance.fronts), a.request)
            if a.abort_at == now:
                instance.abort(a.request.id)
        if now > last and not instance.has_work:
            return
        instance.step()
        for pool in instance.pools:
            pool.check()
        most = instance.config.max_num_seqs + instance.ahead
        if len(instance.fronts) == 1:
            assert all(r.num_running + r.num_waiting <= most for r in instance.schedulers)
    raise AssertionError("requests are still there after 2000 steps")


POLICIES: dict[str, Callable[[], HomePolicy]] = {
    "least work": LeastWork,
    "random": lambda: RandomHomes(1),
    "first": lambda: GivenHome(lambda request: 0, LeastWork()),
}


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals(),
    ranks=st.integers(1, 4),
    doors=st.integers(1, 4),
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 4),
    spare=st.integers(0, 20),
    prefix_keys=st.sampled_from([0, 5, 100]),
    policy=st.sampled_from(sorted(POLICIES)),
    age=st.integers(1, 3),
    ahead=st.integers(0, 2),
)
def test_every_request_gets_its_tokens_whatever_doors_see_and_choose(
    arrivals: list[Arrival],
    ranks: int,
    doors: int,
    num_blocks: int,
    max_num_seqs: int,
    spare: int,
    prefix_keys: int,
    policy: str,
    age: int,
    ahead: int,
) -> None:
    config = SchedulerConfig(
        max_model_len=32,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        eos_ids=frozenset({EOS}),
        prefix_cache=prefix_keys > 0,
    )
    homes = [POLICIES[policy]() for _ in range(min(doors, ranks))]
    instance = Instance(ranks, num_blocks, config, homes, age, ahead, prefix_keys)
    history(instance, arrivals)
    instance.assert_nothing_leaked()
    for a in arrivals:
        expected, got = alone(a.request, config), instance.tokens[a.request.id]
        if instance.finish[a.request.id] is FinishReason.ABORT:
            assert got == expected[: len(got)]
        else:
            assert got == expected
    for door, placed in enumerate(instance.placed):
        came = [a.request.id for step in range(13) for a in arrivals if a.step == step]
        first = list(dict.fromkeys(placed))
        assert first == [r for r in came if r in first and instance.door_of[r] == door]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=15),
    answers=st.lists(st.integers(1, 6), min_size=90, max_size=90),
    ranks=st.integers(1, 4),
    ahead=st.integers(0, 2),
)
def test_nobody_queues_beside_a_free_slot_for_more_than_a_step(
    counts: list[int], answers: list[int], ranks: int, ahead: int
) -> None:
    """Where slots are all that is short: of those who wait when a step is planned, as many run in
    the next one as there are slots free."""
    config = SchedulerConfig(64, max_num_seqs=2, max_num_batched_tokens=64)
    instance = Instance(ranks, 64, config, [LeastWork()], ahead=ahead)
    started: set[RequestId] = set()
    waited = free = 0
    for count in (*counts, *[0] * 600):
        for _ in range(count):
            instance.add(0, ask(str(len(instance.tokens)), [1], answers[len(instance.tokens)]))
        known = len(instance.tokens)
        instance.step()
        now = {r for rank in instance.schedulers for r in rank._running} | {
            r for r, reason in instance.finish.items() if reason is not None
        }
        assert len(now - started) >= min(waited, free)
        started |= now
        waited = known - len(started)
        free = int((2 - instance.tables[0].running_R).sum())
    assert not instance.has_work


def test_a_preempted_request_moves_where_a_rank_is_free_and_stays_where_none_is() -> None:
    def run(ranks: int) -> Instance:
        first = GivenHome(lambda request: 0, LeastWork())
        instance = Instance(ranks, 6, CONFIG, [first], ahead=0)
        for name, prompt in (("a", range(8)), ("b", range(20, 28))):
            instance.add(0, ask(name, prompt, 12))
        while instance.has_work:
            instance.step()
        assert instance.tokens == {
            name: alone(ask(name, prompt, 12), CONFIG)
            for name, prompt in (("a", range(8)), ("b", range(20, 28)))
        }
        assert instance.counters.preemptions == 1
        instance.assert_nothing_leaked()
        return instance

    assert run(2).moved == 1
    assert run(1).moved == 0


def test_of_several_tenants_the_one_that_was_served_least_is_next() -> None:
    front = front_of(table(running=[2, 2]), service=ServiceCounters())
    add(front, *(ask(f"flood{i}", most=20, tenant="flood") for i in range(6)))
    add(front, *(ask(f"b{i}", tenant="b") for i in range(3)))
    add(front, ask("urgent", tenant="flood", priority=-1))
    assert front.place() == []
    front.publish(table(2, running=[0, 2]))
    assert [p.request.id for p in front.place()] == ["urgent", "b0"]
    front.made(RequestId("b0"), 20)
    front.publish(table(3, running=[2, 0]))
    assert [p.request.id for p in front.place()] == ["flood0", "flood1"]
    for name in ("urgent", "flood0", "flood1"):
        front.made(RequestId(name), 20)
        front.finished(RequestId(name))
    front.publish(table(4, running=[2, 1]))
    assert [p.request.id for p in front.place()] == ["b1"]
    for name in ("b0", "b1"):
        front.finished(RequestId(name))
    assert front.abort(RequestId("b2")) is None
    front.publish(table(5, running=[2, 1]))
    assert [p.request.id for p in front.place()] == ["flood2"]
