"""Every bound holds exactly: one step inside is taken, one outside is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import SamplingParams
from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.limits import BOUNDS, ModelLimits, sampling_params

MODEL = ModelLimits(vocab_size=100, max_len=64)
SAMPLING = [name for name in BOUNDS if name not in ("n", "max_tokens", "min_tokens")]


@pytest.mark.parametrize("name", BOUNDS)
def test_the_edges_of_every_number(name: str) -> None:
    bound = BOUNDS[name]
    step = 1 if bound.integer else 1e-9
    low = bound.low + step if bound.above else bound.low
    for inside in (low, bound.high, bound.high - step):
        assert bound.check(name, int(inside) if bound.integer else inside) == inside
    for outside in (bound.low if bound.above else bound.low - step, bound.high + step):
        with pytest.raises(InvalidRequestError, match=f"^{name}="):
            bound.check(name, int(outside) if bound.integer else outside)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True, [1]], ids=str)
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        BOUNDS[name].check(name, value)
    assert caught.value.param == name


@given(st.sampled_from(SAMPLING), st.floats() | st.integers())
def test_a_number_is_taken_exactly_if_it_lies_in_bounds(name: str, value: float) -> None:
    bound = BOUNDS[name]
    kind_fits = isinstance(value, int) or not bound.integer
    if kind_fits and bound.low <= value <= bound.high and not (bound.above and value == bound.low):
        assert getattr(sampling_params({name: value}, MODEL), name) == value
        return
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params({name: value}, MODEL)
    assert caught.value.param == name
    assert len(caught.value.message) < 200


def test_nothing_given_is_the_default() -> None:
    assert sampling_params({}, MODEL) == SamplingParams()


def test_answers_longer_than_the_model_are_refused() -> None:
    assert sampling_params({"max_tokens": 64}, MODEL).max_tokens == 64
    with pytest.raises(InvalidRequestError, match=r"max_tokens=65.*64"):
        sampling_params({"max_tokens": 65}, MODEL)


def test_min_tokens_may_equal_but_not_exceed_max_tokens() -> None:
    assert sampling_params({"max_tokens": 5, "min_tokens": 5}, MODEL).min_tokens == 5
    with pytest.raises(InvalidRequestError, match="min_tokens=6 is more than max_tokens=5"):
        sampling_params({"max_tokens": 5, "min_tokens": 6}, MODEL)


@pytest.mark.parametrize("count", [15, 16, 17])
def test_the_number_of_stop_strings(count: int) -> None:
    stop = [f"stop {i}" for i in range(count)]
    if count <= limits.MAX_STOP:
        assert sampling_params({"stop": stop}, MODEL).stop == tuple(stop)
    else:
        with pytest.raises(InvalidRequestError, match="17 strings, at most 16"):
            sampling_params({"stop": stop}, MODEL)


@pytest.mark.parametrize(("size", "letter"), [(255, "x"), (256, "x"), (256, "é"), (258, "é")])
def test_the_bytes_of_a_stop_string(size: int, letter: str) -> None:
    text = letter * (size // len(letter.encode()))
    if size <= limits.MAX_STOP_BYTES:
        assert sampling_params({"stop": text}, MODEL).stop == (text,)
    else:
        with pytest.raises(InvalidRequestError, match="258 bytes"):
            sampling_params({"stop": text}, MODEL)


@pytest.mark.parametrize(("name", "most"), [("stop_token_ids", 64), ("logit_bias", 1024)])
def test_the_number_of_token_ids(name: str, most: int) -> None:
    model = ModelLimits(vocab_size=5000, max_len=64)
    for count in (most - 1, most):
        value: Any = dict.fromkeys(range(count), 1.0) if name == "logit_bias" else [*range(count)]
        assert len(getattr(sampling_params({name: value}, model), name)) == count
    value = dict.fromkeys(range(most + 1), 1.0) if name == "logit_bias" else [*range(most + 1)]
    with pytest.raises(InvalidRequestError, match=f"{most + 1} .*at most {most}"):
        sampling_params({name: value}, model)


@given(st.integers())
def test_token_ids_lie_in_the_vocabulary(token: int) -> None:
    if 0 <= token < 100:
        assert limits.token_ids([token], MODEL) == (token,)
    else:
        with pytest.raises(InvalidRequestError, match="no token id"):
            limits.token_ids([token], MODEL)


def test_logit_bias_takes_json_keys_and_refuses_an_id_twice() -> None:
    params = sampling_params({"logit_bias": {"7": -100, "3": 100.0}}, MODEL)
    assert params.logit_bias == ((3, 100.0), (7, -100.0))
    with pytest.raises(InvalidRequestError, match="given twice"):
        sampling_params({"logit_bias": {"7": 1, "07": 2}}, MODEL)


@pytest.mark.parametrize("length", [62, 63, 64, 65])
def test_prompts_leave_room_for_an_answer(length: int) -> None:
    if length < 64:
        assert limits.room_for_answer(length, MODEL) == 64 - length
    else:
        with pytest.raises(InvalidRequestError, match=f"{length} tokens.* holds 64 .*at most 63"):
            limits.room_for_answer(length, MODEL)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_bytes_of_a_prompt(extra: int) -> None:
    text = "x" * (limits.MAX_PROMPT_BYTES + extra)
    if extra <= 0:
        assert limits.prompt_text(text) is text
    else:
        with pytest.raises(InvalidRequestError, match="4194305 bytes"):
            limits.prompt_text(text)


@pytest.mark.parametrize("length", [0, 127, 128, 129])
def test_the_length_of_a_request_id(length: int) -> None:
    if length <= 128:
        assert limits.request_id("r" * length) == "r" * length
    else:
        with pytest.raises(InvalidRequestError, match="at most 128"):
            limits.request_id("r" * length)


@given(st.text())
def test_request_ids_are_printable_and_have_no_spaces(text: str) -> None:
    if text.isascii() and text.isprintable() and " " not in text and len(text) <= 128:
        assert limits.request_id(text) == text
    else:
        with pytest.raises(InvalidRequestError, match="request_id="):
            limits.request_id(text)
