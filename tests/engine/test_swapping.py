"""KV of preempted requests in host memory: what is copied, when it is not, and that none is lost.

Tokens are compared in ``test_scheduler`` (every schedule) and ``test_law1`` (a model's bits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import BlockId, Counters, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import spare_blocks, uncomputed_tokens
from moeserve.engine.null import NullExecutor, NullSwapMemory
from moeserve.engine.policies.swap import LOOK_AGAIN, CopyRate, SwapOrCompute
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.swap_space import SwapRun, SwapSpace
from moeserve.engine.swapping import KvSwap, Swapping

BLOCK = 4


class Recording(NullSwapMemory):
    """Of each call, the runs; ``broken`` memory gives nothing back."""

    def __init__(self, executor: NullExecutor, places: int) -> None:
        super().__init__(executor, places)
        self.outs: list[list[tuple[int, int]]] = []
        self.ins: list[list[tuple[int, int]]] = []
        self.broken = False

    def copy_out(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> None:
        self.outs.append([(run.start, run.stop) for run in runs])
        super().copy_out(blocks, runs, keys)

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        self.ins.append([(run.start, run.stop) for run in runs])
        return not self.broken and super().copy_in(blocks, runs, keys)


class Rank:
    """A scheduler that swaps, stepped by hand."""

    def __init__(self, num_blocks: int, places: int, *, prefix_cache: bool = False) -> None:
        self.counters = Counters()
        self.pool = BlockPool(num_blocks, BLOCK, self.counters)
        self.executor = NullExecutor(num_blocks, BLOCK, 50)
        self.host = Recording(self.executor, places)
        self.said = (0, 0)  # of all steps, how many were swapped out and in
        self.scheduler = Scheduler(
            SchedulerConfig(200, 4, 64, prefix_cache=prefix_cache),
            self.pool,
            self.counters,
            swapping=Swapping(self.host, SwapOrCompute()),
        )

    @property
    def swap(self) -> KvSwap:
        assert self.scheduler.swap is not None
        return self.scheduler.swap

    def add(self, name: str, prompt: Sequence[int], answer: int, priority: int = 0) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        self.scheduler.add(Request(RequestId(name), tuple(prompt), params, priority=priority))

    def step(self) -> list[str]:
        """Whom it preempted."""
        plan = self.scheduler.plan(0.0)
        out, into = self.said
        self.said = (out + plan.choice.swapped_out, into + plan.choice.swapped_in)
        if plan.chunks:
            self.scheduler.apply(self.executor.run(plan))
        self.pool.check()
        self.swap.check()
        return [*plan.preempted]

    def until_preempted(self) -> list[str]:
        for _ in range(500):
            if names := self.step():
                return names
        raise AssertionError("nobody was preempted")

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.swap.space.num_free == self.swap.space.places


def two(places: int) -> Rank:
    """Two that do not fit together to their ends."""
    rank = Rank(12, places)
    rank.add("a", range(10), 24)
    rank.add("b", range(20, 30), 24)
    return rank


def test_what_was_swapped_is_not_computed_again() -> None:
    rank = two(100)
    assert rank.until_preempted() == ["b"]
    seq = rank.scheduler.sequence(RequestId("b"))
    assert seq is not None
    assert (seq.blocks, seq.computed, seq.swapped, seq.uncomputed) == ((), 0, seq.length - 1, 1)
    assert seq.stays
    assert rank.scheduler.withdraw() == []
    assert uncomputed_tokens(rank.scheduler) == 1
    assert spare_blocks(rank.scheduler) == rank.pool.blocks_for(len(seq)) + 2
    rank.finish()
    assert rank.host.ins == rank.host.outs
    counters = rank.counters
    assert (counters.swaps, counters.recomputed_tokens, counters.swap_recomputed) == (1, 0, 0)
    assert counters.swap_in_bytes == counters.swap_out_bytes > 0
    assert counters.swap_copies == 2
    assert rank.said == (1, 1)


def long_one(places: int) -> Rank:
    """A long one that was preempted for an urgent one, and runs again."""
    rank = Rank(22, places)
    rank.add("long", range(40), 44)
    for _ in range(3):
        rank.step()
    rank.add("urgent", range(60, 68), 34, priority=-1)
    assert rank.until_preempted() == ["long"]
    while rank.scheduler.num_waiting:
        rank.step()
    assert rank.host.outs == rank.host.ins == [[(0, 60)]]
    return rank


def test_what_was_copied_before_is_not_copied_again() -> None:
    rank = long_one(200)
    rank.step()
    rank.add("second", range(80, 88), 34, priority=-1)
    assert rank.until_preempted() == ["long"]
    assert rank.host.outs[1:] == [[(60, 71)]]
    rank.finish()
    assert rank.host.ins[1:] == [[(0, 60), (60, 71)]]
    assert rank.counters.swap_spared_bytes == 60
    assert rank.counters.recomputed_tokens == 0


def test_blocks_that_others_hold_are_kept_and_not_copied() -> None:
    rank = Rank(14, 200, prefix_cache=True)
    common = range(16)
    rank.add("a", [*common, 40], 24)
    rank.step()
    rank.add("b", [*common, 41], 24)
    assert rank.until_preempted() == ["b"]
    seq = rank.scheduler.sequence(RequestId("b"))
    assert seq is not None
    assert (len(seq.blocks), seq.computed) == (4, 16)
    assert rank.host.outs[0][0][0] == 16
    rank.finish()
    assert rank.counters.recomputed_tokens == 0


def test_one_that_is_alone_gets_the_blocks_that_others_kept() -> None:
    rank = Rank(11, 200, prefix_cache=True)
    common = range(16)
    rank.add("a", [*common, 40], 20)
    rank.step()
    rank.add("b", [*common, 41], 20)
    assert rank.until_preempted() == ["b"]
    assert rank.scheduler.abort(RequestId("a"), FinishReason.ABORT)
    rank.add("c", range(60, 100), 4, priority=-1)  # all 11 blocks
    rank.step()
    assert rank.scheduler.num_running == 1
    assert rank.host.outs[1] == [(0, 16)]
    seq = rank.scheduler.sequence(RequestId("b"))
    assert seq is not None
    assert (seq.blocks, rank.counters.preemptions) == ((), 1)
    rank.finish()
    assert rank.counters.recomputed_tokens == 0


def test_without_room_it_is_computed_again_and_counted() -> None:
    rank = two(10)
    rank.finish()
    assert rank.host.outs == []
    assert (rank.counters.swaps, rank.counters.swap_recomputed) == (0, 1)
    assert rank.counters.recomputed_tokens > 0


def test_copies_of_those_that_run_make_room_for_others() -> None:
    rank = long_one(64)
    assert rank.swap.space.num_free == 4
    rank.add("patient", range(80, 88), 34, priority=1)
    assert rank.until_preempted() == ["patient"]
    assert rank.swap.space.num_free == 64 - rank.host.outs[1][0][1] > 4
    rank.finish()
    assert (rank.counters.swaps, rank.counters.recomputed_tokens) == (2, 0)


def test_memory_that_gives_back_other_bytes_is_not_believed() -> None:
    rank = two(100)
    rank.until_preempted()
    rank.host.broken = True
    rank.finish()
    assert (rank.counters.swap_recomputed, rank.counters.swap_in_bytes) == (1, 0)
    assert rank.counters.recomputed_tokens > 0


def test_the_copy_of_one_that_leaves_is_free() -> None:
    for leave in ("abort", "detach"):
        rank = two(100)
        rank.until_preempted()
        assert rank.swap.space.num_free < 100
        if leave == "abort":
            rank.scheduler.abort(RequestId("b"), FinishReason.ABORT)
        else:
            seq = rank.scheduler.detach(RequestId("b"))
            assert seq is not None
            assert (seq.swapped, seq.computed, seq.blocks) == (0, 0, ())
        assert rank.swap.space.num_free == 100
        rank.finish()


class Line:
    """A token costs a second."""

    line = (5.0, 1.0)


def test_the_cheaper_way_is_taken_and_the_other_looked_at_once_in_a_while() -> None:
    choice = SwapOrCompute(Line())
    assert choice.copies(10, 10, 1.0)
    assert not choice.copies(11, 10, 1.0)
    assert choice.copies(10, 10, 1.0)
    found = [choice.copies(11, 10, 1.0) for _ in range(2 * LOOK_AGAIN + 2)]
    assert found == 2 * [*[False] * LOOK_AGAIN, True]


def test_the_rate_of_copies_follows_what_they_take() -> None:
    rate = CopyRate()
    rate.note(100, 50.0)
    assert rate.byte_s == 0.5
    for _ in range(100):
        rate.note(100, 10.0)
    assert abs(rate.byte_s - 0.1) < 0.001


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=30))
def test_places_are_taken_once_in_as_few_runs_as_there_can_be(
    turns: list[tuple[bool, int]],
) -> None:
    space, held, free = SwapSpace(64), [], set(range(64))
    for give, n in turns:
        if give and held:
            run = held.pop(n % len(held))
            space.give_back(run)
            free |= set(range(run.at, run.at + run.count))
            continue
        runs = space.take(7, n)
        assert (runs is None) == (n > len(free))
        starts = sorted(p for p in free if p - 1 not in free)
        longest = max((next(i for i in range(65) if s + i not in free) for s in starts), default=0)
        if runs is None:
            continue
        assert (len(runs) == 1) == (longest >= n)
        assert [run.start for run in runs] == [
            7 + sum(r.count for r in runs[:i]) for i in range(len(runs))
        ]
        for run in runs:
            places = set(range(run.at, run.at + run.count))
            assert places <= free
            free -= places
        assert sum(run.count for run in runs) == n
        held += runs
    assert space.num_free == len(free)


Asked = tuple[int, int, int, int, int]  # beginning, own tokens, answer, priority, when it comes


def tokens_of(
    asked: Sequence[Asked], num_blocks: int, places: int, aborts: Mapping[int, int], **options: bool
) -> tuple[dict[RequestId, list[int]], Rank]:
    """Of each request, what it was answered up to its end."""
    rank = Rank(num_blocks, places, **options)
    tokens: dict[RequestId, list[int]] = {}
    for now in range(1000):
        for i, (beginning, own, answer, priority, at) in enumerate(asked):
            if at == now:
                prompt = [beginning] * 8 * beginning + [*range(i, i + own)]
                rank.add(f"r{i}", prompt, answer, priority)
                tokens[RequestId(f"r{i}")] = []
            if aborts.get(i) == now:
                rank.scheduler.abort(RequestId(f"r{i}"), FinishReason.ABORT)
        if now > 20 and not rank.scheduler.has_work:
            break
        plan = rank.scheduler.plan(0.0)
        if plan.chunks:
            for out in rank.scheduler.apply(rank.executor.run(plan)):
                tokens[out.request_id].append(out.token_id)
        rank.pool.check()
        rank.swap.check()
    rank.finish()
    return tokens, rank


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(1, 9),
            st.integers(8, 40),
            st.sampled_from([0, 0, 0, -1, 1]),
            st.integers(0, 20),
        ),
        min_size=3,
        max_size=8,
    ),
    num_blocks=st.integers(17, 26),
    places=st.sampled_from([15, 40, 80, 1000]),
    aborts=st.dictionaries(st.integers(0, 7), st.integers(5, 60), max_size=2),
    prefix_cache=st.booleans(),
)
def test_tokens_are_the_same_however_short_memory_is(
    asked: list[Asked], num_blocks: int, places: int, aborts: dict[int, int], prefix_cache: bool
) -> None:
    """Swapped as often as blocks are missing; the null executor finds a wrong slot at once."""
    tokens, rank = tokens_of(asked, num_blocks, places, aborts, prefix_cache=prefix_cache)
    roomy, _ = tokens_of(asked, 200, 1, {}, prefix_cache=False)
    for name, made in roomy.items():
        got = tokens[name]
        assert got == made[: len(got)]
        assert len(got) == len(made) or int(name[1:]) in aborts
    if places == 1000:
        assert rank.counters.swap_recomputed == 0
