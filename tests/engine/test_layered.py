"""Prompts that go through the layers in groups: the same tokens, and no larger steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeserve.core import (
    BlockId,
    Chunk,
    Counters,
    FinishReason,
    LayerGroup,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.foresight import NextStep
from moeserve.engine.layer_states import LayerStates, as_shown
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Admission, Drafter
from moeserve.engine.policies.layered import (
    MOST_GROUPS,
    LayeredPrefill,
    PrefillChoice,
    most_kept,
)
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.prefill_choice import FewerLoads, RoutedLayers
from moeserve.engine.policies.throughput import ThroughputAdmission
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History, SequenceState
from moeserve.engine.step_cost import FittedStepCost
from moeserve.errors import InternalError

BLOCK, VOCAB, LAYERS = 4, 50, 6
Guessers = Callable[..., Drafter]


def request(name: str, prompt: Sequence[int], answer: int = 6, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True, **params)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling)


@dataclass
class House:
    """A scheduler and a null executor; ``plans`` are the steps so far."""

    budget: int = 16
    layers: int | None = LAYERS
    num_blocks: int = 64
    seqs: int = 4
    drafter: Drafter | None = None
    admission: Admission | None = None
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.pool = BlockPool(self.num_blocks, BLOCK, self.counters)
        layered = None if self.layers is None else LayeredPrefill(self.layers, self.counters)
        config = SchedulerConfig(200, self.seqs, self.budget)
        self.scheduler = Scheduler(
            config, self.pool, self.counters, self.admission, self.drafter, layered=layered
        )
        self.executor = NullExecutor(self.num_blocks, BLOCK, VOCAB)
        self.tokens: dict[RequestId, list[int]] = {}

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        self.plans.append(plan)
        if plan.chunks:
            for out in self.scheduler.apply(self.executor.run(plan)):
                self.tokens.setdefault(out.request_id, []).append(out.token_id)
        return plan

    def run(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                self.pool.check()
                assert self.pool.num_free == self.pool.num_blocks
                return
            self.step()
        raise AssertionError("still running")


def groups(plan: StepPlan) -> list[tuple[str, int, int, LayerGroup | None]]:
    return [(c.request.id, c.start, len(c.token_ids), c.layers) for c in plan.chunks]


def rows_by_layer(plan: StepPlan) -> list[int]:
    """How many tokens run in each layer."""
    everywhere = sum(len(c.token_ids) for c in plan.chunks if c.layers is None)
    rows = [everywhere] * LAYERS
    for chunk in plan.chunks:
        if chunk.layers is not None:
            for layer in range(chunk.layers.start, chunk.layers.stop):
                rows[layer] += len(chunk.token_ids)
    return rows


def test_a_prompt_goes_through_every_layer_once_beside_the_newest_tokens() -> None:
    house = House()
    house.scheduler.add(request("a", [1, 2], 9))
    house.step()
    house.scheduler.add(request("long", range(40)))
    plans = [house.step() for _ in range(4)]
    assert [plan.choice.group for plan in plans] == [(0, 2), (2, 4), (4, 6), None]
    assert [plan.choice.groups for plan in plans] == [3, 3, 3, 1]
    found = [groups(plan) for plan in plans]
    newest = [("a", 2 + i, 1, None) for i in range(4)]
    long = [("long", 0, 40, LayerGroup(at, at + 2, LAYERS)) for at in (0, 2, 4)]
    assert found == [
        *([one, group] for one, group in zip(newest, long, strict=False)),
        [("a", 5, 1, None), ("long", 40, 1, None)],
    ]
    assert (house.counters.layered_steps, house.counters.layered_tokens) == (3, 40)
    assert house.counters.computed_tokens == 2 + 4 + 40 + 1


def test_what_fits_into_a_step_runs_in_all_layers_and_later_prompts_join_a_batch() -> None:
    house = House()
    for name, length in (("short", 4), ("long", 30), ("joins", 9)):
        house.scheduler.add(request(name, range(length)))
    assert groups(house.step()) == [
        ("short", 0, 4, None),
        ("long", 0, 30, LayerGroup(0, 2, LAYERS)),
        ("joins", 0, 6, LayerGroup(0, 2, LAYERS)),
    ]
    assert groups(house.step())[1:] == [
        ("long", 0, 30, LayerGroup(2, 4, LAYERS)),
        ("joins", 0, 6, LayerGroup(2, 4, LAYERS)),
    ]
    house.scheduler.abort(RequestId("long"), FinishReason.ABORT)
    # Fewer tokens may take more layers at once, which end here.
    assert groups(house.step())[1:] == [("joins", 0, 6, LayerGroup(4, 6, LAYERS))]
    assert groups(house.step())[1:] == [("joins", 6, 3, None)]


def test_what_is_longer_than_all_groups_goes_in_parts() -> None:
    house = House(budget=8)
    house.scheduler.add(request("long", range(110), 1))
    house.run()
    sizes = [(c.start, len(c.token_ids)) for plan in house.plans for c in plan.chunks]
    assert sizes == [(0, 48)] * 6 + [(48, 48)] * 6 + [(96, 14)] * 2
    assert min(LAYERS, MOST_GROUPS) == 6


def test_no_block_is_found_before_its_tokens_are_through_all_layers() -> None:
    house = House(seqs=1)
    house.scheduler.add(request("long", range(40), 1))
    cached, foreseen = [], []
    while house.scheduler.has_work:
        house.step()
        cached.append(house.pool.num_cached)
        foreseen.append(house.scheduler.foresee())
    assert cached == [0, 0, 10]
    assert foreseen == [NextStep(16, False), NextStep(16, False), NextStep()]
    house.scheduler.add(request("again", [*range(40), 3], 1))
    assert groups(house.step()) == [("again", 40, 1, None)]


def test_who_gives_up_its_blocks_half_way_begins_again() -> None:
    house = House(budget=8, num_blocks=12)
    house.scheduler.add(request("a", range(3), 20))
    house.step()
    house.scheduler.add(request("long", range(60, 100), 1))
    preempted = [(i, p) for i in range(8) for p in house.step().preempted]
    assert preempted == [(5, "long")]
    house.run()
    layers = [c.layers for plan in house.plans for c in plan.chunks if c.request.id == "long"]
    borders = [layer and (layer.start, layer.stop) for layer in layers]
    assert borders[:5] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert borders[5:] == [(0, 2), (2, 4), (4, 6), (0, 3), (3, 6)]  # 24 tokens, then 16
    assert house.counters.preemptions == 1


def test_prompts_that_are_scored_run_in_all_layers() -> None:
    house = House()
    house.scheduler.add(request("scored", range(40), prompt_logprobs=0))
    house.run()
    assert house.counters.layered_steps == 0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "scored", "step", "step", "step", "abort", "detach"]),
        st.integers(1, 70),
    ),
    max_size=30,
)


@given(
    actions=ACTIONS,
    budget=st.integers(4, 24),
    num_blocks=st.integers(22, 48),
    drafts=st.sampled_from([None, 0, 1]),
    admission=st.sampled_from(["plain", "past", "throughput"]),
)
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_chunks_whatever_comes_between(
    actions: list[tuple[str, int]],
    budget: int,
    num_blocks: int,
    drafts: int | None,
    admission: str,
    guessers: Guessers,
) -> None:
    """Preempted, cancelled, taken away and come again: the null executor sees whether anything is
    read before it is there, and no step is larger than one in chunks may be."""
    drafter = None if drafts is None else guessers(VOCAB, 2, errs=drafts)
    starts = {"past": PastFuture(200), "throughput": ThroughputAdmission(FittedStepCost(), 200)}
    house = House(budget, LAYERS, num_blocks, 4, drafter, starts.get(admission))
    asked: dict[RequestId, Request] = {}
    left: set[RequestId] = set()
    for number, (action, size) in enumerate(actions):
        if action in ("come", "scored"):
            scored = {"prompt_logprobs": 0} if action == "scored" else {}
            prompt = [*range(size // 2), *(number + i for i in range(size - size // 2))]
            one = request(f"r{number}", prompt, 1 + size % 12, seed=number, **scored)
            asked[one.id] = one
            house.scheduler.add(one)
        elif action == "step":
            house.step()
        elif asked:
            name = [*asked][size % len(asked)]
            left.add(name)
            if action == "abort":
                house.scheduler.abort(name, FinishReason.ABORT)
            elif (seq := house.scheduler.detach(name)) is not None:
                house.scheduler.kv.free(seq)
    house.run()
    for plan in house.plans:
        rows, last = rows_by_layer(plan), plan.chunks[-1].layers if plan.chunks else None
        one_layer = last is not None and last.stop - last.start == 1  # less there is not
        assert one_layer or sum(rows) <= budget * LAYERS
        assert max(rows) <= budget + most_kept(budget, "layer")
    plain = House(200, None, seqs=4)
    for one in asked.values():
        plain.scheduler.add(one)
        plain.run()
    for name in asked:
        made, whole = house.tokens.get(name, []), plain.tokens[name]
        assert made == (whole[: len(made)] if name in left else whole)


def choice(tokens: int, budget: int, beside: int) -> PrefillChoice:
    """How a prompt would go in groups."""
    seen: list[PrefillChoice] = []

    def keep(one: PrefillChoice) -> bool:
        seen.append(one)
        return False

    seq = SequenceState.of(request("x", range(tokens)), History())
    LayeredPrefill(24, Counters(), keep).part(seq, budget, beside)
    return seen[0]


@given(
    tokens=st.integers(2, 5000),
    budget=st.integers(1, 2000),
    beside=st.integers(0, 64),
    experts=st.sampled_from([8, 64, 256]),
)
def test_groups_take_no_more_steps_and_load_no_more_experts_than_chunks(
    tokens: int, budget: int, beside: int, experts: int
) -> None:
    """By chance, that is; equal is possible where every step uses all experts anyway. 24 layers
    divide well."""
    assume(tokens > budget)
    one = choice(tokens, budget, beside)
    assert one.together * one.layers <= budget * 24
    rest = max(0, tokens - one.together)
    assert one.groups - (-rest // budget) <= -(-tokens // budget)
    loads = FewerLoads(24, [RoutedLayers(22, experts, 4)])
    assert loads.in_groups(one) <= loads.in_chunks(one) * (1 + 1e-9)
    assert not FewerLoads(24, [])(one)


def test_a_prompt_alone_loads_every_expert_once_in_groups() -> None:
    loads = FewerLoads(24, [RoutedLayers(24, 64, 8)])
    one = choice(2048, 512, 0)
    assert (one.groups, one.layers, one.together) == (4, 6, 2048)
    assert round(loads.in_chunks(one)) == 4 * 24 * 64
    assert round(loads.in_groups(one)) == 24 * 64
    assert loads(one)


def grouped(name: str, start: int, stop: int, layers: LayerGroup) -> Chunk:
    asked = Request(RequestId(name), tuple(range(stop)), SamplingParams())
    return Chunk(asked, tuple(range(start, stop)), start, (BlockId(0),), 0, layers=layers)


def test_states_are_kept_between_two_groups_and_by_request() -> None:
    """The rows of each request, wherever they stand in the next step."""
    first, then = LayerGroup(0, 2, 4), LayerGroup(2, 4, 4)
    a, b = grouped("a", 0, 2, first), grouped("b", 3, 6, first)
    whole, states = grouped("w", 0, 1, first)._replace(layers=None), LayerStates()
    assert states.begin([]) is states.begin([whole]) is None
    group = states.begin([whole, a, b])
    assert group is not None
    assert (group.start, group.stop, group.last, group.rows) == (0, 2, False, 5)
    assert group.states_PH is None
    group.states_PH, group.routed = torch.arange(10.0).view(5, 2), {1: torch.arange(5)[:, None]}
    states.end([whole, a, b], group)
    assert states.num_rows == 5
    states.forget([RequestId("a"), RequestId("nobody")])
    after = states.begin([b._replace(layers=then)])
    assert after is not None
    assert after.last
    assert after.states_PH is not None
    assert after.states_PH.tolist() == [[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]
    assert after.routed[1].flatten().tolist() == [2, 3, 4]
    after.states_PH = None
    states.end([b._replace(layers=then)], after)
    assert states.num_rows == 0
    for wrong in (a._replace(layers=then), b._replace(layers=then)):
        with pytest.raises(InternalError, match="are not kept before layer 2"):
            states.begin([wrong])
    assert as_shown(StepPlan((whole, a))).chunks == (whole,)
    last = b._replace(layers=then)
    assert as_shown(StepPlan((whole, last))).chunks == (whole, last._replace(layers=None))
