"""The sampler: each filter equals its slow definition, and a row knows nothing of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeserve.core import RequestId, SamplingParams
from moeserve.errors import InternalError, InvalidRequestError
from moeserve.kernels.cpu.ops import CpuOps
from moeserve.kernels.cpu.ops import best_of_rows as native_best
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.reference.sampling import (
    adjust_logits,
    best_of_rows,
    draw_token,
    logprobs_of,
    sample_row,
    top_k,
    top_p,
    uniform,
)
from moeserve.kernels.sampling import SamplingRow, allowing, sampling_row

V = 24
Row = NDArray[np.float32]
GREEDY = SamplingParams(temperature=0)

# Few distinct values, so that ties are common.
rows = st.lists(
    st.integers(-6, 6).map(lambda x: x / 2) | st.floats(-20, 20, width=32), min_size=V, max_size=V
).map(lambda values: np.asarray(values, np.float32))


def row(
    params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3), outputs: tuple[int, ...] = ()
) -> SamplingRow:
    return sampling_row(RequestId("r"), params, prompt, outputs)


def token(logits: Row, params: SamplingParams, **history: tuple[int, ...]) -> int:
    return sample_row(logits, row(params, **history), frozenset({0})).token_id


def weights(logits: Row) -> NDArray[np.float64]:
    return np.exp(logits.astype(np.float64) - logits.max())


@given(rows)
def test_greedy_takes_the_best_and_of_equals_the_lowest(logits: Row) -> None:
    best = max(range(V), key=lambda i: (logits[i], -i))
    assert token(logits, GREEDY) == best


@given(rows, st.integers(1, V + 2))
def test_the_k_greatest_are_found_and_of_equals_the_first(logits: Row, k: int) -> None:
    order = sorted(range(V), key=lambda i: (-logits[i], i))
    assert top_k(logits, k).tolist() == sorted(order[:k])


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 20, 78, 79, 300]), st.booleans())
def test_the_k_greatest_of_a_large_vocabulary_are_the_same(
    seed: int, k: int, has_ties: bool
) -> None:
    values = np.random.Generator(np.random.Philox(seed)).normal(0, 3, 10_003)
    values = values.round(1 if has_ties else 9)
    order = np.argsort(-values, kind="stable")[:k]
    assert top_k(values, k).tolist() == sorted(order.tolist())


def most_likely(weight: NDArray[np.float64], p: float) -> list[int]:
    """By sorting everything: the fewest heaviest whose share reaches p."""
    order = sorted(range(len(weight)), key=lambda i: (-weight[i], i))
    reached = np.cumsum(weight[order])
    return sorted(order[: 1 + sum(r < p * weight.sum() for r in reached[:-1])])


@settings(max_examples=200)
@given(rows, st.floats(0.01, 0.99), st.integers(1, V))
def test_top_p_keeps_the_fewest_that_reach_p(logits: Row, p: float, count: int) -> None:
    weight = weights(logits)[:count]
    assert top_p(weight, p).tolist() == most_likely(weight, p)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.05, 3.0))
def test_top_p_of_a_large_vocabulary_is_the_same(seed: int, p: float, spread: float) -> None:
    logits = np.random.Generator(np.random.Philox(seed)).normal(0, spread, 5000)
    weight = weights(logits.round(1).astype(np.float32))
    assert top_p(weight, p).tolist() == most_likely(weight, p)


@settings(max_examples=300)
@given(
    rows,
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0, 1, 3, V]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_a_draw_is_what_the_filters_leave_by_their_definition(
    logits: Row, u: float, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    weight = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    ids = [i for i in range(V) if weight[i] >= min_p]
    if top_k:
        ids = sorted(sorted(ids, key=lambda i: (-logits[i], i))[:top_k])
    if top_p < 1:
        ids = [ids[j] for j in most_likely(weight[ids], top_p)]
    reached = np.cumsum(weight[ids])
    expected = ids[sum(r <= u * reached[-1] for r in reached[:-1])]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert draw_token(logits.astype(np.float64), params, u) == expected


def test_what_has_no_weight_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf])
    assert {draw_token(logits, SamplingParams(), u) for u in (0.0, 0.5, 1 - 2**-53, 1.0)} == {1}


@given(rows, st.floats(0, 1, exclude_max=True), st.floats(0.1, 3))
def test_a_draw_is_the_quantile_of_the_distribution(
    logits: Row, u: float, temperature: float
) -> None:
    share = np.exp(logits.astype(np.float64) / temperature)
    cumulative = np.cumsum(share / share.sum())
    chosen = draw_token(logits.astype(np.float64), SamplingParams(temperature=temperature), u)
    assert cumulative[chosen] >= u - 1e-9
    assert chosen == 0 or cumulative[chosen - 1] <= u + 1e-9


def test_frequencies_match_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    params = SamplingParams(temperature=1.0, seed=11)
    count = 20_000
    drawn = [draw_token(logits.astype(np.float64), params, uniform(11, p)) for p in range(count)]
    share = np.bincount(drawn, minlength=4) / count
    assert np.abs(share - [0.5, 0.3, 0.15, 0.05]).max() < 4 * np.sqrt(0.25 / count)


def test_the_generator_depends_on_seed_and_position_alone() -> None:
    assert uniform(3, 9) == uniform(3, 9)
    drawn = {uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(drawn) == 1600
    assert uniform(0, 0) == 0.011546754286331562
    assert all(0 <= u < 1 for u in drawn)
    assert abs(np.mean(list(drawn)) - 0.5) < 0.03


def test_the_same_seed_draws_anew_at_every_position() -> None:
    flat = np.zeros(V, np.float32)
    params = SamplingParams(seed=5)
    made = [token(flat, params, prompt=tuple(range(n))) for n in range(1, 60)]
    assert len(set(made)) > V // 2
    assert made == [token(flat, params, prompt=tuple(range(n))) for n in range(1, 60)]
    other = replace(params, seed=6)
    assert made != [token(flat, other, prompt=tuple(range(n))) for n in range(1, 60)]


def test_a_position_reached_by_outputs_draws_like_one_reached_by_prompt() -> None:
    flat, params = np.zeros(V, np.float32), SamplingParams(seed=5)
    assert token(flat, params, prompt=(1,), outputs=(2, 3)) == token(flat, params, prompt=(1, 2, 3))


@given(
    rows,
    st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, V - 1), max_size=8),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, V - 1), st.floats(-50, 50), max_size=4),
)
def test_penalties_and_bias_follow_their_definition(
    logits: Row,
    prompt: list[int],
    outputs: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
    )
    expected = []
    for i, logit in enumerate(logits.tolist()):
        if i in prompt or i in outputs:
            logit = logit / repetition if logit > 0 else logit * repetition
        if i in outputs:
            logit -= presence + frequency * outputs.count(i)
        expected.append(logit + bias.get(i, 0.0))
    got = adjust_logits(logits, params, prompt, outputs, ())
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


def test_min_tokens_bans_what_would_end_the_request() -> None:
    logits = np.zeros(V, np.float32)
    logits[[0, 4, 9]] = [3, 2, 1]
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(4,))
    assert token(logits, params) == 9
    assert token(logits, params, outputs=(9, 9)) == 0
    assert token(logits, replace(params, ignore_eos=True)) == 0


some_ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)


@given(rows, some_ids, some_ids, st.booleans(), st.integers(0, 9))
def test_nothing_but_what_is_allowed_is_chosen(
    logits: Row, allowed: list[int], biased: list[int], greedy: bool, seed: int
) -> None:
    bias = tuple((i, 5.0) for i in sorted(set(biased)))
    params = SamplingParams(temperature=0.0 if greedy else 1.0, seed=seed, logit_bias=bias)
    chosen = token(logits, replace(params, allowed_token_ids=tuple(allowed)))
    assert chosen in allowed
    if greedy:
        bent = logits.astype(np.float64)
        bent[sorted(set(biased))] += 5.0
        assert chosen == max(allowed, key=lambda i: (bent[i], -i))


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=5).map(tuple),
    st.integers(0, 1000),
)
def test_an_answer_has_no_bad_sequence_in_it_and_is_bent_nowhere_else(
    bad: tuple[tuple[int, ...], ...], seed: int
) -> None:
    """Tokens 0 to 3 are likely, so that sequences of them are met."""
    draws = np.random.Generator(np.random.Philox(seed)).normal(0, 1, (20, V)).astype(np.float32)
    draws[:, :4] += 4
    params = replace(GREEDY, bad_token_ids=bad)
    made: list[int] = []
    for logits in draws:
        ends = {b[-1] for b in bad if tuple([*made, b[-1]][-len(b) :]) == b}
        made.append(token(logits, params, prompt=(0, 1, 2, 3), outputs=tuple(made)))
        assert made[-1] == max(set(range(V)) - ends, key=lambda i: (logits[i], -i))
    for b in bad:
        assert not any(tuple(made[i : i + len(b)]) == b for i in range(len(made)))


@given(rows, st.integers(1, 5), st.integers(0, 5))
def test_a_known_token_is_scored_and_not_chosen(logits: Row, known: int, count: int) -> None:
    asked = SamplingParams(prompt_logprobs=count, temperature=0.7, allowed_token_ids=(3,))
    prompt = (7, 1, 4, 9, 2, 11)
    found = sample_row(logits, row(asked, prompt)._replace(known=known), frozenset())
    assert found.token_id == prompt[known]
    assert found.logprobs == logprobs_of(logits, prompt[known], count)


@given(rows, st.integers(0, V - 1), st.integers(0, 20))
def test_logprobs_are_the_models_own(logits: Row, chosen: int, count: int) -> None:
    share = np.exp(logits.astype(np.float64))
    expected = np.log(share / share.sum())
    found = logprobs_of(logits, chosen, count)
    assert found.chosen == pytest.approx(expected[chosen], abs=1e-9)
    order = sorted(range(V), key=lambda i: (-logits[i], i))[:count]
    assert [i for i, _ in found.top] == order
    assert [p for _, p in found.top] == pytest.approx(expected[order].tolist(), abs=1e-9)


def test_logprobs_ignore_temperature_and_penalties() -> None:
    logits = np.arange(V, dtype=np.float32)
    plain = sample_row(logits, row(replace(GREEDY, logprobs=2)), frozenset())
    bent = sample_row(
        logits,
        row(SamplingParams(temperature=0.1, top_k=1, logit_bias=((3, 1.0),), logprobs=2)),
        frozenset(),
    )
    assert plain.logprobs == bent.logprobs
    assert sample_row(logits, row(GREEDY), frozenset()).logprobs is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams()])
def test_logits_that_are_not_numbers_name_the_request(bad: float, params: SamplingParams) -> None:
    logits = np.zeros(V, np.float32)
    logits[5] = bad
    with pytest.raises(InternalError, match=r"request r: the logits after position 2 .* token 5"):
        token(logits, params)


def test_a_vocabulary_of_banned_tokens_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="request r: no token is allowed"):
        token(np.zeros(1, np.float32), replace(GREEDY, min_tokens=1), prompt=(0,))


@settings(max_examples=50)
@given(
    rows,
    st.integers(0, 8),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-6, 0.7, 1.0, 2.0]),
        top_k=st.integers(0, V),
        top_p=st.floats(0.01, 1.0),
        min_p=st.floats(0.0, 1.0),
        presence_penalty=st.floats(-2, 2),
        seed=st.integers(0, 2**63),
        logprobs=st.none() | st.integers(0, 5),
    ),
)
def test_the_rows_beside_and_the_place_in_memory_do_not_matter(
    logits: Row, before: int, params: SamplingParams
) -> None:
    alone = sample_row(logits, row(params, outputs=(4, 4)), frozenset())
    batch = np.full((before + 2, V), 9, np.float32)
    batch[before] = logits
    assert sample_row(batch[before], row(params, outputs=(4, 4)), frozenset()) == alone


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps()], ids=lambda ops: ops.name)
def test_an_op_table_samples_each_row_and_one_that_fails_alone_says_why(
    ops: ReferenceOps | CpuOps, caplog: pytest.LogCaptureFixture
) -> None:
    logits_RV = torch.zeros(4, V)
    logits_RV[0, 7], logits_RV[1, 3] = 1, torch.nan
    odd = replace(GREEDY, logit_bias=((V + 5, 1.0),))
    rows = [row(GREEDY), row(GREEDY), row(odd), row(SamplingParams(seed=2))]
    first, bad, strange, drawn = ops.sample(logits_RV, rows, frozenset())
    assert (first.token_id, first.failure) == (7, "")
    assert bad.failure == "request r: the logits after position 2 hold nan at token 3"
    assert strange.failure == "request r: sampling failed"
    assert "request r cannot be sampled" in caplog.text
    assert drawn == sample_row(np.zeros(V, np.float32), rows[3], frozenset())
    assert ops.sample(logits_RV[:0], [], frozenset()) == []


@given(
    st.integers(1, 5),
    st.sampled_from([1, 31, 32, 33, 1023, 1024, 1025, 2500]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2499), st.integers(0, 9)), max_size=4),
    st.integers(0, 2**31),
)
def test_the_best_of_rows_is_found_natively_as_by_numpy(
    count: int, size: int, odd: list[tuple[int, int, int]], seed: int
) -> None:
    """Among ties, zeros of both signs, and values that are no numbers or not finite."""
    generator = np.random.default_rng(seed)
    logits_RV = generator.integers(-3, 3, (count, size)).astype(np.float32)
    strange = (np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0, 2.0, 2.5, 3e38, -3e38)
    for r, i, which in odd:
        logits_RV[r % count, i % size] = strange[which]
    found = best_of_rows(torch.from_numpy(logits_RV))
    assert native_best(torch.from_numpy(logits_RV)) == found
    for row_V, best in zip(logits_RV, found, strict=True):
        top = row_V.max()
        assert best == (int(np.flatnonzero(row_V == top)[0]) if np.isfinite(top) else -1)


# What a row may ask for beside the token of its greatest logit.
KINDS = (
    {},
    {"logprobs": 2},
    {"min_tokens": 5, "stop_token_ids": (3,)},
    {"repetition_penalty": 2.0},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.5},
    {"logit_bias": ((4, 9.0),)},
    {"temperature": 1.0, "seed": 3},
)
# What may leave nothing of the tokens that are allowed.
OWN_KINDS = ({"allowed_token_ids": (5, 2, 9)}, {"bad_token_ids": ((1,), (2, 2, 3))})


def greedy(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, **fields})


kinds = st.sampled_from(KINDS).map(greedy)
all_kinds = st.sampled_from((*KINDS, *OWN_KINDS)).map(greedy)


@given(st.lists(st.tuples(rows, all_kinds, st.booleans()), min_size=1, max_size=6))
def test_rows_together_are_the_rows_alone(drawn: list[tuple[Row, SamplingParams, bool]]) -> None:
    asked = [row(params, prompt=(0, 1), outputs=(2, 2)) for _, params, _ in drawn]
    logits_RV = np.stack([np.where(broken, np.nan, x) for x, _, broken in drawn])
    eos = frozenset({0})
    found = ReferenceOps().sample(torch.from_numpy(logits_RV), asked, eos)
    unknown = [one._replace(takes_best=False) for one in asked]
    assert ReferenceOps().sample(torch.from_numpy(logits_RV), unknown, eos) == found
    for (logits, _, broken), one, got in zip(drawn, asked, found, strict=True):
        if broken:
            assert "hold nan" in got.failure
        else:
            assert got == sample_row(logits, one, eos)


allowed_tokens = st.sets(st.integers(0, V - 1), min_size=1)


def bits(allowed: set[int]) -> NDArray[np.uint8]:
    return np.packbits([i in allowed for i in range(V)], bitorder="little")


def only(logits: Row, allowed: set[int]) -> Row:
    """Without what is not allowed."""
    return np.where([i in allowed for i in range(V)], logits, -np.inf).astype(np.float32)


@given(st.lists(st.tuples(rows, kinds, st.none() | allowed_tokens), min_size=1, max_size=6))
def test_what_is_not_allowed_is_as_if_its_logit_were_infinitely_small(
    drawn: list[tuple[Row, SamplingParams, set[int] | None]],
) -> None:
    asked = [
        row(params)._replace(allowed_B=None if allowed is None else bits(allowed))
        for _, params, allowed in drawn
    ]
    logits_RV = np.stack([logits for logits, _, _ in drawn])
    found = ReferenceOps().sample(torch.from_numpy(logits_RV), asked, frozenset({0}))
    for (logits, params, allowed), got in zip(drawn, found, strict=True):
        if allowed is None:
            assert got == sample_row(logits, row(params), frozenset({0}))
            continue
        # Where only tokens are allowed that would end it too early, they may.
        if allowed <= {0, *params.stop_token_ids}:
            params = replace(params, min_tokens=0)
        masked = sample_row(only(logits, allowed), row(params), frozenset({0}))
        assert got.token_id == masked.token_id
        assert got.token_id in allowed
        if params.logprobs is not None:  # they are the model's own
            assert got.logprobs == logprobs_of(logits, got.token_id, params.logprobs)


def test_a_row_that_allows_less_is_otherwise_the_same() -> None:
    one, mask = row(replace(GREEDY, seed=3), outputs=(4,)), bits({1})
    assert allowing(one, mask)[:-1] == one[:-1]
    assert allowing(one, mask).allowed_B is mask


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=1.0)])
@pytest.mark.parametrize("many", [False, True])
def test_a_row_that_allows_nothing_or_holds_no_numbers_fails_alone(
    params: SamplingParams, many: bool
) -> None:
    logits = np.zeros(V, np.float32)
    none = row(params)._replace(allowed_B=bits(set()))
    broken = row(params)._replace(allowed_B=bits({1}))
    given = [(logits, none), (np.where(np.arange(V) == 2, np.nan, logits), broken)]
    if not many:
        found = [
            ReferenceOps().sample(torch.from_numpy(x[None]), [r], frozenset())[0] for x, r in given
        ]
    else:
        together = np.stack([x for x, _ in given]).astype(np.float32)
        found = ReferenceOps().sample(
            torch.from_numpy(together), [r for _, r in given], frozenset()
        )
    assert "no token is allowed" in found[0].failure
    assert "hold nan" in found[1].failure
    assert [row.asked for row in found[:2]] == [True, False]


@pytest.mark.parametrize("fields", KINDS)
def test_a_row_is_known_to_take_the_best_only_if_it_asks_for_nothing_else(
    fields: dict[str, object],
) -> None:
    assert row(replace(GREEDY, **fields)).takes_best == (fields == {})  # type: ignore[arg-type]
    assert not SamplingRow(RequestId("r"), GREEDY, (1,), ()).takes_best


def test_of_many_equal_weights_just_as_many_are_kept_as_reach_the_share() -> None:
    assert top_p(np.ones(3000), 0.5).tolist() == list(range(1500))


def test_a_seed_counts_by_its_64_bits() -> None:
    assert uniform(-1, 3) == uniform(2**64 - 1, 3) != uniform(2**64 - 2, 3)


def test_a_repetition_penalty_of_two_halves_what_was_seen() -> None:
    logits = np.zeros(V, np.float32)
    logits[4:6] = 3, 2
    assert token(logits, replace(GREEDY, repetition_penalty=2.0), prompt=(4,)) == 5
