"""Blocks that come and go beside the steps: whoever takes, looks, keeps or hands on, tokens stay
the same, what is computed does not change, and every reference comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeserve.core import (
    CacheScope,
    Counters,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
    TokenOut,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import spare_blocks, uncomputed_tokens
from moeserve.engine.null import NullExecutor, draw, extend
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import HeldKv, History, SequenceState
from moeserve.errors import InvalidRequestError

BLOCK, VOCAB, EOS = 4, 30, 7
SCOPE = CacheScope()
OURS = b"written by whoever borrowed the block"


@dataclass(frozen=True)
class Guess(Drafter):
    """Two drafts, every third of which is wrong."""

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [self.guess(seq.request, seq.output_ids) for seq in seqs]

    def guess(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        history, made = [*request.prompt_ids, *output_ids], []
        digest = digest_of(history)
        for _ in range(2):
            token = draw(digest, request.params.seed, VOCAB)
            token = (token + (len(history) % 3 == 0)) % VOCAB
            history.append(token)
            made.append(token)
            digest = extend(digest, token)
        return made


def digest_of(tokens: Sequence[int]) -> bytes:
    digest = b""
    for token in tokens:
        digest = extend(digest, token)
    return digest


@dataclass
class Rank:
    """A scheduler and a null executor; a step is planned, and runs later."""

    num_blocks: int = 12
    max_num_seqs: int = 3
    drafter: Drafter | None = None
    prefix_cache: bool = True
    plan: StepPlan | None = None
    preempted: list[RequestId] = field(default_factory=list)
    scores: dict[RequestId, list[Logprobs]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.pool = BlockPool(self.num_blocks, BLOCK, self.counters)
        config = SchedulerConfig(
            40, self.max_num_seqs, 8, eos_ids=frozenset({EOS}), prefix_cache=self.prefix_cache
        )
        self.scheduler = Scheduler(config, self.pool, self.counters, drafter=self.drafter)
        self.executor = NullExecutor(self.num_blocks, BLOCK, VOCAB)
        self.kv = self.scheduler.kv

    def begin(self, now: float = 0.0) -> bool:
        """Plan a step; False if there is nothing to run."""
        assert self.plan is None
        plan = self.scheduler.plan(now)
        self.preempted += plan.preempted
        self.plan = plan if plan.chunks else None
        return self.plan is not None

    def end(self) -> list[TokenOut]:
        """Run what was planned."""
        assert self.plan is not None
        plan, self.plan = self.plan, None
        result = self.executor.run(plan)
        for scored in result.scored:
            self.scores.setdefault(scored.request_id, []).extend(scored.logprobs)
        return self.scheduler.apply(result)

    def step(self) -> list[TokenOut]:
        return self.end() if self.begin() else []

    def borrow(self, tokens: Sequence[int]) -> HeldKv | None:
        avoid = self.scheduler.blocks_in_use()
        return self.kv.borrow(tokens, SCOPE, spare=spare_blocks(self.scheduler), avoid=avoid)

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        self.pool.release(held.blocks, forget=forget)
        self.scheduler.look_again()

    def write(self, held: HeldKv, tokens: Sequence[int], start: int, stop: int) -> None:
        """What another rank has computed of positions ``start .. stop - 1``."""
        digest = digest_of(tokens[:start])
        for position in range(start, stop):
            digest = extend(digest, tokens[position])
            self.executor._slots[slot(held, position)] = digest

    def holds(self, held: HeldKv, tokens: Sequence[int]) -> bool:
        """Whether the computed positions are those of the tokens."""
        digest = b""
        for position in range(held.computed):
            digest = extend(digest, tokens[position])
            if self.executor._slots[slot(held, position)] != digest:
                return False
        return True

    def bring(self, tokens: Sequence[int], computed: int) -> HeldKv:
        """KV of so many tokens, which another rank has computed."""
        held = self.borrow(tokens)
        assert held is not None
        self.write(held, tokens, held.computed, computed)
        return HeldKv(held.blocks, max(held.computed, computed))

    def run(self) -> dict[RequestId, list[int]]:
        """Until no work is left."""
        made: dict[RequestId, list[int]] = {}
        for _ in range(500):
            if not self.scheduler.has_work:
                return made
            for out in self.step():
                made.setdefault(out.request_id, []).append(out.token_id)
        raise AssertionError("no end")

    def assert_nothing_is_held(self) -> None:
        self.pool.check()
        assert self.pool.num_references() == 0
        assert self.pool.num_free == self.pool.num_blocks
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.num_tokens == 0


def own_slots(held: HeldKv) -> list[int]:
    """Those that were borrowed to be written to."""
    return [slot(held, at) for at in range(held.computed, len(held.blocks) * BLOCK)]


def slot(held: HeldKv, position: int) -> int:
    return held.blocks[position // BLOCK] * BLOCK + position % BLOCK


def ask(name: str, prompt: Sequence[int], max_tokens: int = 6, **params: object) -> Request:
    chosen = {"max_tokens": max_tokens, "ignore_eos": True, **params}
    return Request(RequestId(name), tuple(prompt), SamplingParams(**chosen))  # type: ignore[arg-type]


def alone(request: Request) -> list[int]:
    """The answer of a request when nobody else is there."""
    rank = Rank(32)
    rank.scheduler.add(request)
    return rank.run()[request.id]


@dataclass
class Parcel:
    """A request between two ranks, with the KV that it left at one of them."""

    request: Request
    output_ids: tuple[int, ...]
    held: HeldKv
    source: Rank

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.request.prompt_ids + self.output_ids


@dataclass
class Look:
    """References to what was computed of a request when somebody looked."""

    held: HeldKv
    tokens: tuple[int, ...]
    rank: Rank


class LendingMachine(RuleBasedStateMachine):
    """Two ranks, requests that run at one and go on at the other, and steps in between."""

    @initialize(
        blocks=st.integers(11, 16),
        drafts=st.booleans(),
        prefix_cache=st.booleans(),
        max_num_seqs=st.integers(1, 4),
    )
    def start(self, blocks: int, drafts: bool, prefix_cache: bool, max_num_seqs: int) -> None:
        drafter = Guess() if drafts else None
        self.ranks = [Rank(blocks, max_num_seqs, drafter, prefix_cache) for _ in range(2)]
        self.whole: dict[RequestId, Request] = {}
        self.kept: set[RequestId] = set()  # those that were asked to end early and keep
        self.made: dict[RequestId, list[int]] = {}
        self.over: set[RequestId] = set()
        self.parcels: list[Parcel] = []
        self.looks: list[Look] = []
        self.borrowed: list[tuple[Rank, HeldKv]] = []

    def running(self) -> list[tuple[Rank, RequestId]]:
        return [(rank, seq.request.id) for rank in self.ranks for seq in rank.scheduler.sequences]

    @rule(
        at=st.integers(0, 1),
        beginning=st.integers(0, 2),
        more=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        max_tokens=st.integers(2, 10),
        keep=st.integers(0, 2),
        ends=st.booleans(),
    )
    def arrive(
        self, at: int, beginning: int, more: list[int], max_tokens: int, keep: int, ends: bool
    ) -> None:
        if len(self.running()) + len(self.parcels) >= 9:
            return
        name = f"r{len(self.whole)}"
        prompt = [*[beginning] * 6, *more]
        request = ask(name, prompt, max_tokens, seed=len(more), ignore_eos=not ends)
        self.whole[request.id] = request
        self.made[request.id] = []
        if keep:
            self.kept.add(request.id)
            request = replace(request, params=replace(request.params, max_tokens=keep))
        self.ranks[at].scheduler.add(request, History(keep=keep > 0))

    @rule(at=st.integers(0, 1))
    def plan(self, at: int) -> None:
        if self.ranks[at].plan is None:
            self.ranks[at].begin()

    @rule(at=st.integers(0, 1))
    def run_planned(self, at: int) -> None:
        if self.ranks[at].plan is not None:
            self.take(self.ranks[at], self.ranks[at].end())

    @rule(at=st.integers(0, 1), count=st.integers(1, 5))
    def steps(self, at: int, count: int) -> None:
        for _ in range(count):
            self.plan(at)
            self.run_planned(at)

    def take(self, rank: Rank, outs: Sequence[TokenOut]) -> None:
        for out in outs:
            self.made[out.request_id].append(out.token_id)
            if out.finish is None:
                continue
            kept = rank.kv.take_kept(out.request_id)
            assert (kept is not None) is (out.request_id in self.kept)
            self.kept.discard(out.request_id)
            request, made = self.whole[out.request_id], tuple(self.made[out.request_id])
            whole = out.finish is FinishReason.STOP or len(made) == request.params.max_tokens
            if whole:
                self.over.add(out.request_id)
                if kept is not None:
                    self.looks.append(Look(kept, request.prompt_ids + made, rank))
            else:
                assert kept is not None, "it has ended early, so it was to be kept"
                assert kept.computed == len(request.prompt_ids) + len(made) - 1
                self.parcels.append(Parcel(request, made, kept, rank))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR]))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        rank, request_id = data.draw(st.sampled_from(self.running()))
        assert rank.scheduler.abort(request_id, reason)
        assert not rank.kv.keeps(request_id)
        self.kept.discard(request_id)
        self.over.add(request_id)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        rank, request_id = data.draw(st.sampled_from(self.running()))
        seq = rank.scheduler.sequence(request_id)
        assert seq is not None
        self.looks.append(Look(rank.kv.look(seq), seq.tokens(0, seq.computed), rank))

    @precondition(lambda self: self.looks)
    @rule(data=st.data(), forget=st.booleans())
    def look_away(self, data: st.DataObject, forget: bool) -> None:
        seen = self.looks.pop(data.draw(st.integers(0, len(self.looks) - 1)))
        seen.rank.give_back(seen.held, forget=forget)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        rank, request_id = data.draw(st.sampled_from(self.running()))
        seq = rank.scheduler.detach(request_id)
        assert seq is not None
        assert seq.output_ids == self.made[request_id]
        assert not rank.scheduler.owns(request_id)
        self.kept.discard(request_id)
        held = HeldKv(seq.blocks, seq.computed)
        request = self.whole[request_id]
        self.parcels.append(Parcel(request, tuple(seq.output_ids), held, rank))

    @precondition(lambda self: self.parcels)
    @rule(data=st.data(), lost=st.integers(0, 9), publish=st.booleans())
    def hand_over(self, data: st.DataObject, lost: int, publish: bool) -> None:
        """To the other rank, which may get less than there is."""
        parcel = data.draw(st.sampled_from(self.parcels))
        target = self.ranks[parcel.source is self.ranks[0]]
        borrowed = target.borrow(parcel.tokens)
        if borrowed is None:
            return
        computed = max(borrowed.computed, parcel.held.computed - lost)
        target.write(borrowed, parcel.tokens, borrowed.computed, computed)
        kv = HeldKv(borrowed.blocks, computed)
        if publish:
            target.kv.publish_held(kv, parcel.tokens, SCOPE)
        parcel.source.give_back(parcel.held)
        self.resume(target, parcel, kv)

    @precondition(lambda self: self.parcels)
    @rule(data=st.data())
    def come_home(self, data: st.DataObject) -> None:
        """Back to where it was, with the same blocks."""
        parcel = data.draw(st.sampled_from(self.parcels))
        if parcel.held.computed < len(parcel.tokens):
            self.resume(parcel.source, parcel, parcel.held)

    @precondition(lambda self: self.parcels)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Its KV does not arrive."""
        parcel = data.draw(st.sampled_from(self.parcels))
        parcel.source.give_back(parcel.held)
        self.resume(self.ranks[parcel.source is self.ranks[0]], parcel, None)

    def resume(self, rank: Rank, parcel: Parcel, kv: HeldKv | None) -> None:
        self.parcels.remove(parcel)
        reached = 0 if kv is None else kv.computed
        history = History(parcel.output_ids, reached, moved=True, kv=kv)
        rank.scheduler.add(parcel.request, history)

    @rule(at=st.integers(0, 1), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14))
    def borrow(self, at: int, tokens: list[int]) -> None:
        held = self.ranks[at].borrow(tokens)
        if held is not None:
            assert self.ranks[at].holds(held, tokens)
            for own in own_slots(held):
                self.ranks[at].executor._slots[own] = OURS
            self.borrowed.append((self.ranks[at], held))

    @precondition(lambda self: self.borrowed)
    @rule(data=st.data())
    def return_borrowed(self, data: st.DataObject) -> None:
        rank, held = self.borrowed.pop(data.draw(st.integers(0, len(self.borrowed) - 1)))
        rank.give_back(held)

    @invariant()
    def what_is_computed_stays(self) -> None:
        for rank in getattr(self, "ranks", ()):
            rank.pool.check()
            assert uncomputed_tokens(rank.scheduler) >= 0
        for seen in getattr(self, "looks", ()):
            assert seen.rank.holds(seen.held, seen.tokens)
        for parcel in getattr(self, "parcels", ()):
            assert parcel.source.holds(parcel.held, parcel.tokens)
        for rank, held in getattr(self, "borrowed", ()):
            found = {rank.executor._slots[at] for at in own_slots(held)}
            assert found <= {OURS}, "a step wrote to what was lent"

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        for rank, held in self.borrowed:
            rank.give_back(held)
        for seen in self.looks:
            seen.rank.give_back(seen.held)
        self.looks.clear()
        for _ in range(400):
            for parcel in tuple(self.parcels):
                parcel.source.give_back(parcel.held)
                self.resume(parcel.source, parcel, None)
            for at, rank in enumerate(self.ranks):
                if rank.plan is None and rank.scheduler.has_work:
                    assert rank.begin(), "work is left and nothing is planned"
                self.run_planned(at)
            for seen in self.looks:
                seen.rank.give_back(seen.held)
            self.looks.clear()
            if not self.running() and not self.parcels:
                break
        for rank in self.ranks:
            rank.assert_nothing_is_held()
        for request_id, request in self.whole.items():
            expected, made = alone(request), self.made[request_id]
            assert made == expected[: len(made)]
            assert request_id in self.over


TestLending = LendingMachine.TestCase
TestLending.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_request_with_its_kv_computes_what_is_missing() -> None:
    rank = Rank()
    request = ask("a", range(10))
    first = alone(request)[:1]
    kv = rank.bring((*request.prompt_ids, *first), 10)
    rank.scheduler.add(request, History(tuple(first), 10, moved=True, kv=kv))
    assert uncomputed_tokens(rank.scheduler) == 0  # it only goes on
    assert rank.begin()
    assert rank.plan is not None
    assert [(c.start, len(c.token_ids), c.samples) for c in rank.plan.chunks] == [(10, 1, 1)]
    rank.end()
    rank.run()
    assert rank.counters.computed_tokens == 5
    assert rank.counters.recomputed_tokens == 0
    assert (rank.counters.prefix_queried_tokens, rank.counters.prompt_tokens) == (0, 0)
    rank.assert_nothing_is_held()


@pytest.mark.parametrize("computed", [0, 1, 3, 4, 7, 8, 9])
def test_whatever_is_missing_is_computed(computed: int) -> None:
    rank, request = Rank(), ask("a", range(10))
    rank.scheduler.add(request, History(kv=rank.bring(request.prompt_ids, computed)))
    assert rank.run()[request.id] == alone(request)
    assert rank.counters.computed_tokens == 10 - computed + 5
    rank.assert_nothing_is_held()


@pytest.mark.parametrize(("computed", "blocks"), [(10, 3), (11, 3), (5, 1), (-1, 3)])
def test_kv_that_does_not_fit_stays_the_callers(computed: int, blocks: int) -> None:
    rank = Rank()
    held = rank.borrow(range(10))
    assert held is not None
    kv = HeldKv(held.blocks[:blocks], computed)
    with pytest.raises(InvalidRequestError, match="are said to be computed of a request of 10"):
        rank.scheduler.add(ask("a", range(10)), History(kv=kv))
    assert not rank.scheduler.has_work
    rank.give_back(held)
    rank.assert_nothing_is_held()


def test_a_prompt_is_scored_once_whoever_computed_how_much() -> None:
    """KV behind what was scored is computed anew, in other blocks than those that came."""
    request = ask("a", range(11), prompt_logprobs=0)
    whole = Rank()
    whole.scheduler.add(request)
    whole.run()
    for reached, start in ((0, 0), (3, 0), (6, 4), (10, 10)):
        rank = Rank()
        kv = rank.bring(request.prompt_ids, 10)
        rank.scheduler.add(request, History(reached=reached, moved=True, kv=kv))
        assert rank.begin()
        assert rank.plan is not None
        assert rank.plan.chunks[0].start == start
        rank.end()
        rank.run()
        assert rank.scores.get(request.id, []) == whole.scores[request.id][reached:]
        rank.assert_nothing_is_held()


def test_what_ends_well_is_kept_until_it_is_taken_once() -> None:
    rank = Rank()
    rank.scheduler.add(ask("a", range(9), 3), History(keep=True))
    rank.run()
    with pytest.raises(InvalidRequestError, match="in use"):
        rank.scheduler.add(ask("a", range(9)))
    held = rank.kv.take_kept(RequestId("a"))
    assert held is not None
    assert (held.computed, len(held.blocks)) == (11, 3)
    assert rank.pool.num_references() == 3
    assert rank.kv.take_kept(RequestId("a")) is None
    rank.give_back(held)
    rank.assert_nothing_is_held()


@pytest.mark.parametrize("reason", [r for r in FinishReason if r not in ("stop", "length")])
def test_what_ends_badly_is_not_kept(reason: FinishReason) -> None:
    rank = Rank()
    rank.scheduler.add(ask("a", range(9)), History(keep=True))
    rank.step()
    rank.scheduler.abort(RequestId("a"), reason)
    assert rank.kv.take_kept(RequestId("a")) is None
    rank.assert_nothing_is_held()


def test_what_nobody_takes_is_released_in_the_end() -> None:
    rank = Rank()
    rank.scheduler.add(ask("a", range(9), 2), History(keep=True))
    rank.run()
    rank.kv.release_kept()
    rank.assert_nothing_is_held()


def test_drafted_blocks_are_not_kept() -> None:
    rank = Rank(drafter=Guess())
    rank.scheduler.add(ask("a", range(10), 4), History(keep=True))
    rank.run()
    held = rank.kv.take_kept(RequestId("a"))
    assert held is not None
    assert len(held.blocks) == rank.pool.blocks_for(held.computed) == rank.pool.num_references()
    rank.give_back(held)
    rank.assert_nothing_is_held()


def test_what_a_step_works_on_is_not_lent() -> None:
    """A request that leaves while its step runs has blocks that the step still writes to."""
    rank = Rank(num_blocks=3, prefix_cache=False)
    rank.scheduler.add(ask("a", range(8), 2))
    assert rank.begin()
    seq = rank.scheduler.detach(RequestId("a"))
    assert seq is not None
    rank.give_back(HeldKv(seq.blocks, seq.computed))
    assert rank.pool.num_free == 3
    assert rank.borrow(range(5)) is None
    lent = rank.borrow([1])
    assert lent is not None
    assert lent.blocks[0] not in seq.blocks
    rank.give_back(lent)
    assert rank.end() == []
    lent = rank.borrow(range(9))
    assert lent is not None
    rank.give_back(lent)
    rank.assert_nothing_is_held()


def test_running_requests_and_the_first_that_waits_keep_their_room() -> None:
    rank = Rank(num_blocks=10, max_num_seqs=1)
    rank.scheduler.add(ask("a", range(8)))
    rank.step()
    assert rank.borrow(range(100, 100 + 8 * BLOCK)) is None  # 8 are free, and one is for "a"
    held = rank.borrow(range(100, 100 + 7 * BLOCK))
    assert held is not None
    rank.give_back(held)
    rank.scheduler.add(ask("b", range(50, 58)))  # two blocks
    assert rank.borrow(range(100, 100 + 6 * BLOCK)) is None
    held = rank.borrow(range(100, 100 + 5 * BLOCK))
    assert held is not None
    rank.give_back(held)
    rank.run()
    rank.assert_nothing_is_held()


def test_of_a_borrowed_beginning_what_is_cached_is_shared() -> None:
    rank = Rank()
    rank.scheduler.add(ask("a", range(8), 2))
    rank.run()
    held = rank.borrow(range(8))
    assert held is not None
    assert held.computed == 4  # the last token is left to compute
    assert rank.holds(held, range(8))
    other = rank.kv.borrow(range(8), CacheScope("another"), spare=0, avoid=())
    assert other is not None
    assert other.computed == 0
    rank.give_back(held)
    rank.give_back(other)
    rank.assert_nothing_is_held()


def test_those_that_wait_with_kv_give_way_when_nobody_runs() -> None:
    """Else the first would wait for them, and they for the first."""
    rank = Rank(num_blocks=5)
    first, other = (ask(name, [i] * 9, 5) for i, name in enumerate("ab"))
    kv = rank.bring(other.prompt_ids, 8)
    rank.scheduler.add(first, History((alone(first)[0],)))  # needs 3, and 2 are free
    rank.scheduler.add(other, History(kv=kv))
    made = rank.run()
    assert rank.counters.preemptions == 1
    assert made[first.id] == alone(first)[1:]
    assert made[other.id] == alone(other)
    rank.assert_nothing_is_held()


def test_who_finds_no_room_beside_lent_blocks_starts_when_they_come_back() -> None:
    rank = Rank(num_blocks=5)
    lent = rank.borrow(range(100, 112))
    assert lent is not None
    rank.scheduler.add(ask("a", range(9)))
    assert not rank.begin()
    assert rank.scheduler.foresee().tokens == 0
    rank.give_back(lent)
    assert rank.scheduler.foresee().tokens == 8
    assert rank.begin()
    rank.end()
    rank.run()
    rank.assert_nothing_is_held()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_request_that_runs_alone_waits_for_lent_blocks(prefix_cache: bool) -> None:
    """It gives up its own, and starts again when there is room; whoever runs it is told, though the
    step in which it was preempted was never run."""
    rank = Rank(num_blocks=4, max_num_seqs=1, prefix_cache=prefix_cache)
    request = ask("a", range(4), 12)
    rank.scheduler.add(request)
    made = [out.token_id for out in rank.step()]
    lent = rank.borrow(range(100, 108))
    assert lent is not None
    while rank.begin():
        made += [out.token_id for out in rank.end()]
    assert rank.preempted == [request.id]
    rank.give_back(lent)
    assert made + rank.run()[request.id] == alone(request)
    rank.assert_nothing_is_held()


def test_who_came_with_kv_goes_before_who_never_ran_and_stays() -> None:
    rank = Rank(max_num_seqs=1)
    rank.scheduler.add(ask("running", [1] * 4, 2))
    rank.step()
    for name in ("new", "newer"):
        rank.scheduler.add(ask(name, [2] * 4))
    for i, name in enumerate(("one", "two")):
        prompt = [3 + i] * 6
        rank.scheduler.add(ask(name, prompt), History(kv=rank.bring(prompt, 5)))
    rank.scheduler.add(ask("kept", [8] * 4), History(keep=True))
    rank.scheduler.add(ask("moved", [9] * 4), History((1,), 4, moved=True))
    waiting = [seq.request.id for seq in rank.scheduler.sequences][1:]
    assert waiting == ["moved", "one", "two", "new", "newer", "kept"]
    withdrawn = [seq.request.id for seq in rank.scheduler.withdraw()]
    assert withdrawn == ["moved", "new", "newer"]
    rank.run()
    rank.kv.release_kept()
    rank.assert_nothing_is_held()
