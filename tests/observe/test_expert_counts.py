"""Choices of experts are counted once for each step that ended."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import StepPlan
from moeserve.observe.expert_counts import ExpertCounts

LAYERS, EXPERTS = (1, 4), 5
choices = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2), min_size=1, max_size=6
)
steps = st.lists(st.tuples(choices, choices, st.booleans()), max_size=8)


@settings(deadline=None)
@given(steps)
def test_counts_are_those_of_the_steps_that_ended(
    taken: list[tuple[list[list[int]], list[list[int]], bool]],
) -> None:
    counts, wanted_LE = ExpertCounts(LAYERS, EXPERTS), np.zeros((2, EXPERTS), np.int64)
    for first, second, ends in taken:
        counts.begin(StepPlan(()))
        for layer, ids in zip(LAYERS, (first, second), strict=True):
            counts.record(layer, np.array(ids))
        if not ends:
            continue  # the step failed
        counts.end()
        for l, ids in enumerate((first, second)):
            for expert in np.array(ids).ravel():
                wanted_LE[l, expert] += 1
    assert np.array_equal(counts.loads(), wanted_LE)


def test_what_is_given_is_a_copy() -> None:
    counts = ExpertCounts(LAYERS, EXPERTS)
    counts.loads()[:] = 7
    assert not counts.loads().any()
