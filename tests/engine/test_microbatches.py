"""The number of microbatches follows what was measured, and trying costs little."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.engine.ranks.microbatches import FixedMicrobatches, MeasuredMicrobatches, StepShape

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
