"""Routing agreement, and marks on sums with their intervals and tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.evaluate.arithmetic import (
    KINDS,
    ArithmeticProblem,
    Exam,
    Marks,
    draw_problems,
    is_right,
    mark,
)
from moeserve.evaluate.routing import RoutingNotes, RoutingTally


def test_the_order_of_experts_does_not_count_but_each_expert_does() -> None:
    one, other = RoutingNotes(), RoutingNotes()
    one.record(3, np.array([[1, 2], [3, 4]], np.int32))
    other.record(3, np.array([[2, 1], [4, 5]], np.int32))
    tally = RoutingTally()
    tally.add(one.take(), other.take())
    (layer,) = tally.layers()
    assert (layer.layer, layer.equal, layer.overlap) == (3, 0.5, 0.75)
    assert tally.tokens == 2


def test_notes_are_copies_that_are_taken_once() -> None:
    notes = RoutingNotes()
    ids = np.array([[7, 1]], np.int32)
    notes.record(0, ids)
    ids[:] = 0
    assert notes.take()[0].tolist() == [[1, 7]]
    assert notes.take() == {}


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=8))
def test_agreement_adds_up_over_chunks(rows: list[list[int]]) -> None:
    ids_TC = np.sort(np.array(rows)[:, :3], axis=1)
    other_TC = np.sort(np.array(rows)[::-1, :3], axis=1)
    whole, parts = RoutingTally(), RoutingTally()
    whole.add({1: ids_TC}, {1: other_TC})
    for t in range(len(rows)):
        parts.add({1: ids_TC[t : t + 1]}, {1: other_TC[t : t + 1]})
    (one,), (other,) = whole.layers(), parts.layers()
    assert one.equal == other.equal
    assert one.overlap == pytest.approx(other.overlap)
    sets = [len(set(a) & set(b)) for a, b in zip(ids_TC, other_TC, strict=True)]
    assert one.equal == sum(n == 3 for n in sets) / len(sets)
    assert one.overlap == pytest.approx(sum(sets) / 3 / len(sets))


def test_layers_that_only_one_run_has_are_left_out() -> None:
    tally = RoutingTally()
    ids = np.zeros((2, 1), np.int64)
    tally.add({0: ids, 1: ids, 2: ids}, {1: ids, 2: np.zeros((2, 2), np.int64)})
    assert [layer.layer for layer in tally.layers()] == [1]


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    """Solving |p - share| = z sqrt(p (1 - p) / n) for p."""
    for right, n in itertools.product((0, 1, 20, 50), (50, 400)):
        marks = Marks(right, n)
        for end in marks.interval:
            distance = abs(end - marks.share)
            assert distance == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-7)


@given(st.integers(1, 300), st.data())
def test_wilsons_interval_holds_the_share_and_stays_within_bounds(
    n: int, data: st.DataObject
) -> None:
    marks = Marks(data.draw(st.integers(0, n)), n)
    low, high = marks.interval
    assert 0 <= low <= marks.share <= high <= 1
    assert low < high


def exam(only_reference: int, only_tested: int) -> Exam:
    both = 100
    return Exam(
        "all",
        Marks(both + only_reference, 1000),
        Marks(both + only_tested, 1000),
        only_reference,
        only_tested,
    )


@pytest.mark.parametrize(
    ("only_reference", "only_tested", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (3, 3, 1.0), (8, 1, 20 / 512)],
)
def test_the_sign_test_counts_coin_throws(only_reference: int, only_tested: int, p: float) -> None:
    assert exam(only_reference, only_tested).p_value == pytest.approx(p)
    assert exam(only_tested, only_reference).p_value == pytest.approx(p)
    assert exam(only_reference, only_tested).within_noise == (p >= 0.05)


def test_thousands_of_problems_are_no_trouble() -> None:
    assert exam(3000, 2000).p_value == pytest.approx(0, abs=1e-40)
    assert exam(2500, 2500).p_value == 1


def test_marks_pair_what_both_runs_said() -> None:
    problems = [
        ArithmeticProblem("a", "1 + 1 =", 2),
        ArithmeticProblem("b", "2 + 2 =", 4),
        ArithmeticProblem("b", "3 + 3 =", 6),
    ]
    both = mark(problems, [True, True, False], [True, False, True])
    assert (both.reference.right, both.tested.right) == (2, 2)
    assert (both.only_reference, both.only_tested) == (1, 1)
    assert mark(problems, [True, True, False], [True, False, True], "a").reference == Marks(1, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 46\n", True),
        ("46", True),
        (" 46. Next", True),
        (" 460", False),
        (" -46", False),
        (" 4 6", False),
        ("", False),
        (" so 46", False),
    ],
)
def test_an_answer_is_right_when_its_first_number_is(text: str, right: bool) -> None:
    assert is_right(ArithmeticProblem("sum", "12 + 34 =", 46), text) == right


@given(st.integers(0, 10), st.integers(1, 60))
def test_problems_are_different_balanced_and_repeat_with_their_seed(seed: int, count: int) -> None:
    problems = draw_problems(count, seed)
    assert problems == draw_problems(count, seed)
    assert len({p.prompt for p in problems}) == count
    for kind, _, _ in KINDS:
        assert abs(sum(p.kind == kind for p in problems) - count / len(KINDS)) < 1
    for problem in problems:
        a, sign, b, _ = problem.prompt.split()
        assert problem.answer == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
