"""Guesses by looked-up tokens, and how many of them a step checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import (
    CacheScope,
    Counters,
    Grammar,
    GrammarKind,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.null import NullExecutor
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.ngrams import ORDERS, SUREST, Guess, NgramDrafts, NgramTable
from moeserve.engine.policies.speculation import (
    GAIN,
    FixedDrafts,
    Speculation,
    take_likeliest,
    worthwhile_drafts,
)
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import NEW, SequenceState
from moeserve.engine.step_cost import DecodeCost, FittedStepCost

VOCAB = 50


def sequence(
    name: str, prompt: Sequence[int], outputs: Sequence[int], *, salt: str = "", greedy: bool = True
) -> SequenceState:
    params = SamplingParams(temperature=0.0 if greedy else 1.0)
    request = Request(RequestId(name), tuple(prompt), params, scope=CacheScope(salt))
    seq = SequenceState.of(request, NEW)
    for token_id in outputs:
        seq.append(token_id)
    return seq


def test_what_followed_the_same_tokens_is_guessed_and_longer_beginnings_count_more() -> None:
    table = NgramTable()
    for before, after in (((1, 2, 3), 4), ((9, 2, 3), 5)):
        table.put(before, after)
    assert table.find((1, 2, 3)) == (4, 0, 3)
    assert table.find((9, 2, 3)) == (5, 0, 3)
    assert table.find((7, 2, 3)) == (5, 0, 2)  # the newer one, where nothing tells them apart
    assert table.find((7, 7)) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_table_is_as_sure_as_a_saturating_counter(follows: list[tuple[int, int]]) -> None:
    """Of one last token, against the counter spelled out."""
    table, known = NgramTable(), {}
    for before, after in follows:
        table.put((before,), after)
        token, sure = known.get(before, (after, -1))
        if token == after:
            known[before] = (token, min(SUREST, sure + 1))
        else:
            known[before] = (token, sure - 1) if sure else (after, 0)
    for before, (token, sure) in known.items():
        assert table.find((before,)) == (token, sure, 1)


@given(st.lists(st.integers(0, 5), max_size=400), st.integers(2, 60))
def test_a_table_is_bounded_and_keeps_what_came_last(token_ids: list[int], most: int) -> None:
    table = NgramTable(most)
    for i, token_id in enumerate(token_ids):
        context = tuple(token_ids[max(0, i - 5) : i])
        table.put(context, token_id)
        assert len(table) <= most + 2 * len(ORDERS)
        if context and most > 2 * len(ORDERS):
            assert table.find(context) is not None


def test_scopes_share_nothing() -> None:
    drafts = NgramDrafts()
    ours, theirs = sequence("a", [1, 2, 3], [4, 5]), sequence("b", [1, 2], [3], salt="other")
    drafts.learn([ours, theirs])
    again = sequence("c", [1, 2], [3])
    drafts.learn([again])
    assert drafts.guess(again, 2).token_ids == (4, 5)
    drafts.learn([theirs])
    assert drafts.guess(theirs, 2) == ((), ())


def test_chances_are_those_that_were_seen_by_kind() -> None:
    drafts = NgramDrafts()
    before = drafts.chance(True, 5, SUREST)
    for i in range(30):
        drafts.learn([sequence(f"s{i}", [7], [1, 2, 3, 4, 5, 6] * 4)])
    assert drafts.chance(True, 5, SUREST) > 0.9 > before
    assert drafts.chance(False, 5, SUREST) == before


def test_an_answer_that_goes_on_is_read_once_and_one_that_begins_again_anew() -> None:
    drafts = NgramDrafts()
    seq = sequence("a", [1, 2], [3])
    drafts.learn([seq])
    for token_id in (1, 2, 3, 1):
        seq.append(token_id)
        drafts.learn([seq])
    assert drafts.guess(seq, 3).token_ids == (2, 3, 1)
    other = sequence("a", [4, 5], [4])
    drafts.learn([other])
    assert drafts.guess(other, 1).token_ids == (5,)


@given(
    st.integers(1, 6),
    st.lists(st.floats(0.05, 1), max_size=8).map(lambda c: sorted(c, reverse=True)),
    st.floats(0, 5),
    st.floats(0.01, 2),
)
def test_on_a_straight_line_the_number_of_drafts_is_the_best_one(
    generating: int, chances: list[float], step_s: float, token_s: float
) -> None:
    def seconds(tokens: int) -> float:
        return step_s + token_s * tokens

    rates = [
        (generating + made) / seconds(generating + count) / (1 if count else 1 / GAIN)
        for count, made in enumerate(itertools.accumulate(chances, initial=0.0))
    ]
    found = worthwhile_drafts(seconds, generating, chances)
    assert rates[found] == pytest.approx(max(rates))


@given(
    st.lists(st.lists(st.floats(0.05, 1), max_size=4), min_size=1, max_size=5), st.integers(1, 9)
)
def test_the_likeliest_drafts_are_taken(shares: list[list[float]], count: int) -> None:
    guesses = []
    for of_one in shares:
        chances = tuple(itertools.accumulate(of_one, lambda a, b: a * b))
        guesses.append(Guess(tuple(range(len(chances))), chances))
    ranked = sorted((c for g in guesses for c in g.chances), reverse=True)
    if len(ranked) < count:
        return
    taken = take_likeliest(guesses, ranked[count - 1], count)
    assert sum(map(len, taken)) <= count
    assert all(t == g.token_ids[: len(t)] for t, g in zip(taken, guesses, strict=True))
    got = [c for t, g in zip(taken, guesses, strict=True) for c in g.chances[: len(t)]]
    assert sorted(got, reverse=True) == ranked[: len(got)]
    assert len(got) == count


def test_steps_cost_what_they_took_and_what_lies_between() -> None:
    cost = DecodeCost()
    assert not cost.known
    cost.note(2, 1.0)
    assert cost.seconds(1) == cost.seconds(2) == 1.0
    assert 1.0 < cost.seconds(3) < cost.seconds(8) < 3.0  # worth a try
    cost.note(6, 5.0)
    assert cost.seconds(4) == pytest.approx(3.0)
    for _ in range(200):
        cost.note(6, 1.5)
    assert cost.seconds(6) == pytest.approx(1.5, rel=0.01)
    cost.note(6, 100.0)  # the machine did something else
    assert cost.seconds(6) < 1.6


def test_what_did_not_come_for_long_is_forgotten() -> None:
    cost = DecodeCost()
    cost.note(8, 100.0)
    for _ in range(5000):
        cost.note(1, 1.0)
    assert cost.seconds(8) < 3.0


def repeating(count: int) -> list[Request]:
    """The same prompt again and again, so that answers repeat each other."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    return [Request(RequestId(f"r{i}"), (1, 2, 3), params) for i in range(count)]


def run(requests: Sequence[Request], drafter: Drafter | None) -> tuple[list[list[int]], Counters]:
    """One after the other."""
    counters, config = Counters(), SchedulerConfig(64, 1, 32, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(16, 4, counters), counters, drafter=drafter)
    executor = NullExecutor(16, 4, VOCAB)
    tokens = []
    for request in requests:
        scheduler.add(request)
        tokens.append([o.token_id for step in drive(scheduler, executor) for o in step.outs])
    return tokens, counters


def flat() -> DecodeCost:
    cost = DecodeCost()
    cost.note(1, 1.0)
    cost.note(16, 1.0)
    return cost


def steep() -> DecodeCost:
    cost = DecodeCost()
    for tokens in range(1, 17):
        cost.note(tokens, float(tokens * tokens))
    return cost


@pytest.mark.parametrize("make", [flat, steep])
def test_answers_that_repeat_take_fewer_steps_where_tokens_beside_others_cost_little(
    make: Callable[[], DecodeCost],
) -> None:
    plain, counted = run(repeating(6), None)
    drafter = Speculation(NgramDrafts(), make(), FittedStepCost())
    guessed, fewer = run(repeating(6), drafter)
    assert guessed == plain
    if make is flat:
        assert fewer.steps < counted.steps * 0.5
        assert fewer.accepted_tokens > 0.7 * fewer.drafted_tokens > 0
    else:
        assert (fewer.steps, fewer.drafted_tokens) == (counted.steps, 0)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_fixed_number_of_drafts_changes_no_token(count: int) -> None:
    plain, _ = run(repeating(4), None)
    guessed, counted = run(repeating(4), FixedDrafts(NgramDrafts(), count))
    assert guessed == plain
    assert (counted.drafted_tokens > 0) == (count > 0)


def test_a_grammar_has_its_answer_token_by_token() -> None:
    drafter = Speculation(NgramDrafts(), flat(), FittedStepCost())
    free = sequence("a", [1, 2, 3, 1, 2], [3])
    grammar = Grammar(GrammarKind.REGEX, "a*")
    request = Request(RequestId("b"), (1, 2, 3, 1, 2), SamplingParams(grammar=grammar))
    bound = SequenceState.of(request, NEW)
    bound.append(3)
    drafts = drafter.propose([free, bound], 0)
    assert drafts[0]
    assert not drafts[1]


def test_beside_prompts_a_step_costs_what_such_steps_cost() -> None:
    steps = FittedStepCost()
    drafter = Speculation(NgramDrafts(), flat(), steps)
    seq = sequence("a", [1, 2, 3, 1, 2], [3])
    assert drafter.propose([seq], 8) == ()  # nothing is known of them yet
    steps.note(1, 1.0)
    steps.note(64, 1.0)
    assert drafter.propose([seq], 8)[0]
