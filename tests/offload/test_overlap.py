"""Computing and reading at once: by the same as one follows both from begin to end."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.offload.model.overlap import Beside

SECONDS = st.floats(0.0, 10.0)
LEFT = st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)).map(lambda both: Beside.of(*both))


def followed(beside: Beside, computing: float, reading: float) -> float:
    """Both at their speed beside each other until one has ended, then the other at its own."""
    both = min(computing / beside.computing, reading / beside.reading)
    return both + max(computing - both * beside.computing, reading - both * beside.reading)


@given(LEFT, SECONDS, SECONDS)
def test_what_both_take_is_what_following_them_says(
    beside: Beside, computing: float, reading: float
) -> None:
    took = beside.seconds(computing, reading)
    assert took == pytest.approx(followed(beside, computing, reading))
    assert max(computing, reading) - 1e-9 <= took <= computing + reading + 1e-9


@given(LEFT, SECONDS, SECONDS)
def test_computing_by_itself_is_found_again(
    beside: Beside, computing: float, reading: float
) -> None:
    """From how long it took beside the reading, which was over before or not."""
    slowed = min(computing / beside.computing, reading / beside.reading)
    took = slowed + max(0.0, computing - slowed * beside.computing)
    assert beside.computed(took, reading) == pytest.approx(computing, abs=1e-9)


def test_where_reading_varies_the_mean_counts() -> None:
    beside, draw = Beside(0.6, 0.8), np.random.default_rng(1)
    readings = draw.normal(2.0, 0.5, 20_000)
    mean = fmean(followed(beside, 1.5, reading) for reading in readings)
    assert beside.seconds(1.5, 2.0, 0.5) == pytest.approx(mean, rel=5e-3)


def test_what_takes_nothing_from_the_other_takes_the_longer_of_both() -> None:
    assert Beside().seconds(2.0, 3.0) == 3.0
    assert Beside().computed(2.0, 3.0) == 2.0


def test_both_in_turn_is_the_least_that_is_left() -> None:
    assert Beside.of(0.3, 0.1) == Beside(0.3, 0.7)
    assert Beside.of(0.1, 1.4) == Beside(0.2, 1.0)
    for computing, reading in ((0.5, 0.4), (0.1, 1.0), (1.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="calibrate again"):
            Beside(computing, reading)
