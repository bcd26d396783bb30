"""When requests are due and what they ask for: rates, shapes and shared beginnings hold for any."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving import plan
from moeserve.bench.serving.arrivals import arrival_times
from moeserve.bench.serving.plan import Lengths, PlannedRequest, TokenSpan
from moeserve.bench.serving.prompts import WORDS, PromptSource, form_of_prompts
from moeserve.errors import ConfigError

RATES = st.floats(0.01, 1e4)
SPANS = st.lists(st.builds(TokenSpan, st.integers(0, 5), st.integers(1, 40)), min_size=1)


@given(
    count=st.integers(1, 200),
    rate=RATES,
    burstiness=st.floats(0.05, 20),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["poisson", "gamma", "constant"]),
)
def test_arrivals_ascend_to_the_time_that_the_rate_says(
    count: int, rate: float, burstiness: float, seed: int, kind: str
) -> None:
    burstiness = burstiness if kind == "gamma" else 1.0
    at_S = arrival_times(count, rate, kind=kind, burstiness=burstiness, seed=seed)
    assert len(at_S) == count
    assert at_S == sorted(at_S)
    assert at_S[0] >= 0
    assert at_S[-1] == pytest.approx(count / rate)
    assert at_S == arrival_times(count, rate, kind=kind, burstiness=burstiness, seed=seed)


@pytest.mark.parametrize(("burstiness", "expected"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_vary_as_the_burstiness_says(burstiness: float, expected: float) -> None:
    """The coefficient of variation of a gamma distribution is one over the root of its shape."""
    at_S = arrival_times(20_000, 5.0, kind="gamma", burstiness=burstiness)
    gaps_S = np.diff(at_S)
    assert gaps_S.std() / gaps_S.mean() == pytest.approx(expected, rel=0.05)


def test_constant_and_infinite_rates() -> None:
    assert arrival_times(3, 2.0, kind="constant") == [0.5, 1.0, 1.5]
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"count": 0}, "0 requests"),
        ({"rate": 0.0}, "--request-rate=0.0"),
        ({"rate": math.nan}, "--request-rate=nan"),
        ({"kind": "sometimes"}, "poisson, gamma, constant"),
        ({"kind": "gamma", "burstiness": -1.0}, "--burstiness=-1.0"),
        ({"burstiness": 2.0}, "is of --arrivals gamma"),
    ],
)
def test_arrivals_that_cannot_be_are_refused(wrong: dict[str, float | str], says: str) -> None:
    asked = {"count": 3, "rate": 1.0} | wrong
    with pytest.raises(ConfigError, match=says):
        arrival_times(asked.pop("count"), asked.pop("rate"), **asked)  # type: ignore[arg-type]


@given(
    count=st.integers(1, 50),
    mean=st.integers(1, 1000),
    spread=st.floats(0, 0.99),
    prefix=st.integers(0, 50),
    seed=st.integers(0, 9),
)
def test_drawn_lengths_are_around_what_was_asked(
    count: int, mean: int, spread: float, prefix: int, seed: int
) -> None:
    requests = plan.drawn([0.0] * count, Lengths(mean, 2 * mean, spread, prefix), seed)
    least, most = max(1, int(mean * (1 - spread))), int(mean * (1 + spread))
    for request in requests:
        assert prefix + least <= (request.input_tokens or 0) <= prefix + most
        assert max(1, int(2 * mean * (1 - spread))) <= request.output_tokens <= 4 * mean
    keys = [request.spans[-1].key for request in requests]
    assert len(set(keys)) == count, "prompts share nothing but the common beginning"


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    source = PromptSource(3, 1000)
    one, other = (
        source.token_ids(request) for request in plan.drawn([0, 0], Lengths(64, 1, 0.0, 32), 0)
    )
    assert one[:32] == other[:32]
    assert one[32:] != other[32:]
    assert len(one) == len(other) == 96


def tokens_of(spans: Sequence[TokenSpan], seed: int = 0, vocab: int = 100) -> list[int]:
    return PromptSource(seed, vocab).token_ids(PlannedRequest(0, 1, spans=tuple(spans)))


@given(spans=SPANS, seed=st.integers(0, 9), vocab=st.integers(2, 200_000))
def test_equal_spans_hold_equal_tokens(spans: list[TokenSpan], seed: int, vocab: int) -> None:
    ids = tokens_of(spans, seed, vocab)
    assert len(ids) == sum(span.tokens for span in spans)
    assert all(0 <= token < vocab for token in ids)
    ends = list(itertools.accumulate(span.tokens for span in spans))
    parts: dict[int, list[int]] = {}
    for span, end in zip(spans, ends, strict=True):
        part = ids[end - span.tokens : end]
        known = parts.setdefault(span.key, part)
        shorter = min(len(known), len(part))
        assert known[:shorter] == part[:shorter], "a shorter span begins like a longer one"


@given(spans=SPANS, scale=st.floats(0.05, 3), most=st.integers(1, 200), output=st.integers(1, 99))
def test_fitted_prompts_still_begin_alike(
    spans: list[TokenSpan], scale: float, most: int, output: int
) -> None:
    longer = PlannedRequest(0, output, spans=(*spans, TokenSpan(9, 7)))
    pair = [PlannedRequest(0, output, spans=tuple(spans)), longer]
    one, other = plan.fitted(pair, scale=scale, most_input=most, most_output=50)
    assert 1 <= (one.input_tokens or 0) <= (other.input_tokens or 0) <= most
    assert 1 <= one.output_tokens == other.output_tokens <= 50
    both = tokens_of(one.spans), tokens_of(other.spans)
    assert both[0] == both[1][: len(both[0])]


def test_a_replay_starts_at_its_first_request_and_is_as_fast_as_asked() -> None:
    requests = [PlannedRequest(at, 1, text=str(at)) for at in (30.0, 10.0, 20.0)]
    assert [(r.at_s, r.text) for r in plan.replayed(requests, 4.0)] == [
        (0.0, "10.0"),
        (2.5, "20.0"),
        (5.0, "30.0"),
    ]


def test_warm_up_draws_what_no_prompt_of_the_run_holds() -> None:
    requests = plan.drawn([1.0, 2.0], Lengths(16, 4, 0.0, 8), 0)
    before = plan.warmup(requests, 3)
    assert [r.at_s for r in before] == [0.0] * 3
    assert [r.input_tokens for r in before] == [24] * 3
    keys = {span.key for r in requests for span in r.spans}
    assert not keys & {span.key for r in before for span in r.spans}


def test_texts_have_a_word_for_each_token() -> None:
    source = PromptSource(0, 5000)
    (request,) = plan.drawn([0.0], Lengths(40, 1), 0)
    said = source.text(request).split(" ")
    assert said == [WORDS[token % len(WORDS)] for token in source.token_ids(request)]
    assert len(set(WORDS)) == len(WORDS)


TEXT, IDS = PlannedRequest(0, 1, text="Once"), PlannedRequest(0, 1, token_ids=(5, 6))
DRAWN = PlannedRequest(0, 1, spans=(TokenSpan(0, 2),))


@pytest.mark.parametrize(
    ("requests", "asked", "chat", "form"),
    [
        ([DRAWN], None, False, "ids"),
        ([DRAWN], None, True, "text"),
        ([DRAWN, TEXT], None, False, "text"),
        ([DRAWN, IDS], None, False, "ids"),
        ([DRAWN], "text", False, "text"),
        ([TEXT], "ids", False, "has prompts of text"),
        ([IDS], "text", False, "cannot be sent as text"),
        ([IDS], None, True, "which chat needs"),
        ([IDS, TEXT], None, False, "cannot be sent as text"),
        ([DRAWN], "pictures", False, "--prompts='pictures'"),
    ],
)
def test_the_form_of_prompts_is_known_before_any_is_sent(
    requests: list[PlannedRequest], asked: str | None, chat: bool, form: str
) -> None:
    if form in ("ids", "text"):
        assert form_of_prompts(requests, asked, chat=chat) == form
    else:
        with pytest.raises(ConfigError, match=form):
            form_of_prompts(requests, asked, chat=chat)


def test_a_prompt_is_sent_in_the_form_it_has() -> None:
    source = PromptSource(0, 100)
    text = PlannedRequest(0, 1, text="Once")
    ids = PlannedRequest(0, 1, token_ids=(5, 6))
    assert (source.text(text), source.token_ids(ids)) == ("Once", [5, 6])
    with pytest.raises(ConfigError, match="--prompts text"):
        source.token_ids(text)
    with pytest.raises(ConfigError, match="--prompts ids"):
        source.text(ids)
    with pytest.raises(ConfigError, match="has a prompt"):
        PlannedRequest(0, 1, text="Once", token_ids=(1,))
    with pytest.raises(ConfigError, match="0 output tokens"):
        PlannedRequest(0, 0, text="Once")
