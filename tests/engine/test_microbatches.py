"""The number of microbatches follows what was measured, and trying costs little."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.engine.ranks.microbatches import (
    KEPT,
    PERIOD,
    SOONEST,
    TRIES,
    FixedMicrobatches,
    MeasuredMicrobatches,
    Samples,
    Settled,
    StepKind,
    StepShape,
    Warmup,
)

DECODE = StepShape(16, True)


def run(
    chooser: MeasuredMicrobatches,
    cost: dict[int, float],
    steps: int,
    *,
    shape: StepShape = DECODE,
    share: float = 0.3,
    noise: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """The choices of so many steps that cost what ``cost`` says, now and then three times that."""
    rng = random.Random(seed)
    chosen = []
    for _ in range(steps):
        count = chooser.choose(shape)
        seconds = cost[count] * rng.uniform(1 - noise, 1 + noise)
        seconds *= 3 if noise and rng.random() < 0.02 else 1
        chooser.learn(shape, count, seconds, share * seconds)
        chosen.append(count)
    return chosen


def test_a_fixed_number_learns_nothing() -> None:
    fixed = FixedMicrobatches(2)
    fixed.learn(DECODE, 2, 1.0, 0.5)
    assert fixed.choose(DECODE) == 2


def test_the_ladder_is_climbed_only_while_it_pays() -> None:
    chosen = run(MeasuredMicrobatches(), {1: 1.0, 2: 0.7, 4: 0.9}, 100)
    assert chosen[:3] == [1, 1, 1]
    assert set(chosen[30:]) == {2}
    assert run(MeasuredMicrobatches(), {1: 1.0, 2: 0.8, 4: 0.6}, 100)[-1] == 4
    assert 4 not in run(MeasuredMicrobatches(), {1: 1.0, 2: 1.2, 4: 0.1}, 500)


def test_nothing_is_tried_where_nobody_waits() -> None:
    assert set(run(MeasuredMicrobatches(), {1: 1.0}, 500, share=0.02)) == {1}


def test_a_step_is_not_cut_into_more_pieces_than_its_busiest_rank_has_tokens() -> None:
    assert set(run(MeasuredMicrobatches(), {1: 1.0}, 200, shape=StepShape(1, True))) == {1}
    assert set(run(MeasuredMicrobatches(), {1: 1.0, 2: 0.5}, 200, shape=StepShape(3, True))) == {
        1,
        2,
    }


def test_kinds_of_steps_are_told_apart() -> None:
    chooser = MeasuredMicrobatches()
    run(chooser, {1: 1.0, 2: 0.5, 4: 0.6}, 60, shape=StepShape(256, False))
    run(chooser, {1: 1.0, 2: 2.0}, 60, shape=StepShape(8, True))
    assert chooser.choose(StepShape(300, False)) == 2
    assert chooser.choose(StepShape(9, True)) == 1
    assert chooser.choose(StepShape(300, True)) == 1


def test_a_change_of_the_network_is_followed_soon() -> None:
    """The link becomes slow, then fast again: a few dozen steps each time, not a whole period."""
    chooser = MeasuredMicrobatches()
    fast, slow = {1: 1.0, 2: 1.2, 4: 1.5}, {1: 4.0, 2: 2.5, 4: 3.0}
    assert run(chooser, fast, 150)[-1] == 1
    assert run(chooser, slow, 80)[-1] == 2
    run(chooser, slow, 150)
    assert run(chooser, fast, 150, share=0.1)[-1] == 1


@settings(max_examples=150, deadline=None)
@given(
    two=st.floats(0.6, 2.0),
    four=st.floats(0.75, 1.8),
    tokens=st.integers(4, 4096),
    noise=st.sampled_from([0.0, 0.02, 0.05]),
    seed=st.integers(0, 99),
)
def test_choosing_costs_less_than_a_twentieth_of_the_best(
    two: float, four: float, tokens: int, noise: float, seed: int
) -> None:
    """Of 500 steps, whose times are noisy; the ladder leads to the best from where two pays."""
    cost = {1: 1.0, 2: two, 4: two * four}
    if two > 0.95:
        cost[4] = max(cost[4], 1.0)
    shape = StepShape(tokens, False)
    chosen = run(MeasuredMicrobatches(), cost, 500, shape=shape, noise=noise, seed=seed)
    assert sum(cost[c] for c in chosen) <= 1.05 * 500 * min(cost.values())


def step(kind: StepKind, seconds: float, share: float = 0.3) -> str:
    """One step at so many seconds per token: the state that the machine is in afterwards."""
    kind.record(kind.count, seconds, share)
    return type(kind.state).__name__


def compare(kind: StepKind, in_use: float, rival: float, turns: int) -> str:
    """So many steps of the rival, one of the number in use between two; the last one decides."""
    for _ in range(turns - 1):
        assert step(kind, rival) == "Comparing"
        assert step(kind, in_use) == "Comparing"
    return step(kind, rival)


def test_every_transition_of_the_machine() -> None:
    kind = StepKind(most=4)
    assert isinstance(kind.state, Warmup)
    assert [step(kind, 1.0, 0.0) for _ in range(TRIES + 5)] == ["Warmup"] * (TRIES + 5), (
        "at 1, where nobody waits, there is neither a number above worth a try nor one below"
    )
    while step(kind, 1.0) == "Warmup":
        pass
    assert (kind.best.count, kind.count) == (1, 2)
    assert compare(kind, 1.0, 0.8, TRIES) == "Warmup", "the larger one is clearly faster"
    assert (kind.best.count, kind.upward) == (2, True)
    assert [step(kind, 0.8) for _ in range(TRIES)] == ["Warmup"] * (TRIES - 1) + ["Comparing"]
    assert kind.count == 4
    assert compare(kind, 0.8, 1.0, TRIES) == "Settled", "the rival is clearly slower"
    assert isinstance(kind.state, Settled)
    assert (kind.best.count, kind.upward) == (2, False)
    assert (kind.state.seconds, kind.state.pause) == (0.8, 2 * PERIOD)
    assert {step(kind, 0.8) for _ in range(2 * PERIOD - 1)} == {"Settled"}
    assert step(kind, 0.8) == "Comparing", "the pause is over; it looks downward"
    assert kind.count == 1
    assert compare(kind, 0.8, 0.79, KEPT) == "Settled", "too little to win, and tried enough"
    assert isinstance(kind.state, Settled)
    assert (kind.best.count, kind.upward, kind.state.pause) == (2, True, PERIOD)
    assert {step(kind, 1.6) for _ in range(SOONEST - 1)} == {"Settled"}
    assert step(kind, 1.6) == "Comparing", "times have drifted; it looks upward first"
    assert kind.count == 4
    assert compare(kind, 1.6, 2.0, TRIES) == "Settled"
    assert isinstance(kind.state, Settled)
    assert (kind.state.pause, kind.upward) == (SOONEST, False), "after a drift it looks again soon"
    assert [step(kind, 1.6) for _ in range(SOONEST)][-1] == "Comparing"
    assert kind.count == 1
    assert compare(kind, 1.6, 1.0, TRIES) == "Settled", "the smaller one is clearly faster"
    assert (kind.best.count, kind.upward) == (1, True)
    late = StepKind(most=2, best=Samples(2))
    assert [step(late, 1.0) for _ in range(TRIES)] == ["Warmup"] * (TRIES - 1) + ["Settled"], (
        "there is none above, and the one below has just been beaten"
    )


def test_a_step_of_a_number_that_is_no_longer_tried_changes_nothing() -> None:
    kind = StepKind(most=4)
    kind.record(2, 1.0, 0.5)
    assert kind == StepKind(most=4)
