"""Every bound holds exactly: one step inside is taken, one outside is refused.

The bounds stand here a second time, as numbers, so that a change of one is a change of two files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.core import SamplingParams
from moeserve.errors import (
    ContextLengthError,
    ExhaustedError,
    InvalidRequestError,
    MoeserveError,
)
from moeserve.gateway import limits
from moeserve.gateway.limits import BOUNDS, Bound, ModelLimits, sampling_params

MODEL = ModelLimits(vocab_size=100, max_len=64)
# What needs another model than MODEL, or another field beside it, is tested on its own.
SAMPLING = [name for name in BOUNDS if name not in ("n", "max_tokens", "min_tokens")]

INTEGERS = {
    "n": (1, 16),
    "max_tokens": (1, 2147483647),
    "min_tokens": (0, 2147483647),
    "top_k": (0, 2147483647),
    "seed": (0, 9223372036854775807),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
NUMBERS = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
ABOVE = {"top_p": (0.0, 1.0)}


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def beyond(value: float) -> float:
    return math.nextafter(value, math.inf)


def refused(
    check: Callable[[], object],
    says: str = "",
    *,
    param: str | None = None,
    kind: type[MoeserveError] = InvalidRequestError,
) -> MoeserveError:
    """The error of ours that ``check`` raises; fails with ``says`` where there is none."""
    with pytest.raises(kind) as caught:
        pytest.fail(f"{says}: {check()!r} was taken")
    error = caught.value
    assert type(error) is kind, error
    assert says in error.message, error.message
    assert param is None or error.param == param, error.param
    assert len(error.message) < 300, error.message
    return error


too_long = functools.partial(refused, kind=ContextLengthError)


def test_the_edges_of_every_number() -> None:
    assert BOUNDS.keys() == {*INTEGERS, *NUMBERS, *ABOVE}
    for name, (low, high) in INTEGERS.items():
        for inside in (low, low + 1, high - 1, high):
            taken = BOUNDS[name].check(name, inside)
            assert (taken, type(taken)) == (inside, int), name
        for outside in (low - 1, high + 1, -(10**30), 10**30):
            refused(lambda n=name, v=outside: BOUNDS[n].check(n, v), f"{name}=", param=name)
    for name, (low, high) in {**NUMBERS, **ABOVE}.items():
        lowest = beyond(low) if name in ABOVE else low
        for inside in (lowest, beyond(lowest), below(high), high):
            taken = BOUNDS[name].check(name, inside)
            assert (taken, type(taken)) == (inside, float), name
        for outside in (below(lowest), beyond(high), low - 1, high + 1):
            refused(lambda n=name, v=outside: BOUNDS[n].check(n, v), f"{name}=", param=name)


def test_whole_numbers_are_numbers_and_not_the_other_way() -> None:
    for name, (low, high) in {**NUMBERS, **ABOVE}.items():
        whole = math.floor(high) if name in ABOVE else math.ceil(low)
        taken = BOUNDS[name].check(name, whole)
        assert (taken, type(taken)) == (whole, float), name
    for name, (low, _) in INTEGERS.items():
        refused(lambda n=name, v=float(low): BOUNDS[n].check(n, v), "expected an integer")


def test_what_is_no_number_is_refused() -> None:
    for name in BOUNDS:
        for value in (math.nan, math.inf, -math.inf, "1", None, True, False, [1], {}, b"1", 1j):
            refused(lambda n=name, v=value: BOUNDS[n].check(n, v), f"{name}=", param=name)


def test_a_bound_says_what_it_expects() -> None:
    assert str(BOUNDS["n"]) == "an integer from 1 up to 16"
    assert str(BOUNDS["seed"]) == "an integer from 0 up to 9223372036854775807"
    assert str(BOUNDS["top_p"]) == "a number above 0 and up to 1"
    assert str(BOUNDS["presence_penalty"]) == "a number from -2 up to 2"
    error = refused(lambda: Bound(0, 2).check("heat", 2.5))
    assert error.message == "heat=2.5: expected a number from 0 up to 2"


@given(st.sampled_from(SAMPLING), st.floats() | st.integers())
def test_a_number_is_taken_exactly_if_it_lies_in_bounds(name: str, value: float) -> None:
    bound = BOUNDS[name]
    kind_fits = isinstance(value, int) or not bound.integer
    if kind_fits and bound.low <= value <= bound.high and not (bound.above and value == bound.low):
        assert getattr(sampling_params({name: value}, MODEL), name) == value
        return
    error = refused(lambda: sampling_params({name: value}, MODEL), param=name)
    assert len(error.message) < 200


def test_nothing_given_is_the_default_and_nothing_unknown_is_taken() -> None:
    assert sampling_params({}, MODEL) == SamplingParams()
    refused(lambda: sampling_params({"heat": 1}, MODEL), "heat: unknown", param="heat")


def test_switches_are_true_or_false() -> None:
    for name in ("ignore_eos", "include_stop", "skip_special_tokens", "only_prompt"):
        for value in (True, False):
            assert getattr(sampling_params({name: value}, MODEL), name) is value
        for other in (0, 1, "true", None, [], 1.0):
            refused(
                lambda n=name, v=other: sampling_params({n: v}, MODEL),
                "expected true or false",
                param=name,
            )


def test_answers_longer_than_the_model_are_refused() -> None:
    for inside in (1, 63, 64):
        assert sampling_params({"max_tokens": inside}, MODEL).max_tokens == inside
    says = "max_tokens=65: the model holds 64 tokens of prompt and answer together"
    too_long(lambda: sampling_params({"max_tokens": 65}, MODEL), says, param="max_tokens")


def test_min_tokens_may_equal_but_not_exceed_max_tokens() -> None:
    assert sampling_params({"max_tokens": 5, "min_tokens": 4}, MODEL).min_tokens == 4
    assert sampling_params({"max_tokens": 5, "min_tokens": 5}, MODEL).min_tokens == 5
    refused(
        lambda: sampling_params({"max_tokens": 5, "min_tokens": 6}, MODEL),
        "min_tokens=6 is more than max_tokens=5",
        param="min_tokens",
    )
    # Alone it is compared with what the prompt leaves of the answer, later.
    assert sampling_params({"min_tokens": 1000}, MODEL).min_tokens == 1000


def stop(value: object) -> tuple[str, ...]:
    return sampling_params({"stop": value}, MODEL).stop


def test_the_number_and_the_kinds_of_stop_strings() -> None:
    for count in (0, 1, 15, 16):
        strings = [f"stop {i}" for i in range(count)]
        assert stop(strings) == stop(tuple(strings)) == tuple(strings)
    refused(lambda: stop([f"{i}" for i in range(17)]), "17 strings, at most 16", param="stop")
    refused(lambda: stop(["x"] * 17), "17 strings", param="stop")
    assert stop("one") == ("one",)
    assert stop(["b", "a", "b"]) == ("b", "a")
    for other in (5, None, ["a", 5], {"a": 1}, [["a"]], b"a"):
        refused(lambda v=other: stop(v), "expected a string or a list", param="stop")


def test_the_bytes_of_a_stop_string() -> None:
    for inside in ("x", "é", "x" * 255, "x" * 256, "é" * 128):
        assert stop(inside) == (inside,)
    for outside, size in (("", 0), ("x" * 257, 257), ("é" * 129, 258)):
        refused(
            lambda v=outside: stop(["ok", v]), f"has {size} bytes, expected 1 to 256", param="stop"
        )
    refused(lambda: stop("\ud800"), "lone surrogate at character 0", param="stop")


def test_the_number_of_token_ids() -> None:
    model = ModelLimits(vocab_size=5000, max_len=64)
    for name, most in (("stop_token_ids", 64), ("logit_bias", 1024)):

        def given_ids(count: int, name: str = name) -> Any:
            biases = dict.fromkeys(range(count), 1.0)
            value = biases if name == "logit_bias" else [*biases]
            return getattr(sampling_params({name: value}, model), name)

        for count in (0, 1, most - 1, most):
            assert len(given_ids(count)) == count, name
        refused(lambda f=given_ids, n=most + 1: f(n), f"at most {most}", param=name)
    assert len(limits.token_ids([1] * 100_000, model)) == 100_000
    refused(lambda: limits.token_ids([1] * 3, model, "ids", 2), "ids: 3 ids, at most 2")


def test_token_ids_lie_in_the_vocabulary() -> None:
    for inside in ([], (), [0], [1], [98], [99], (0, 99, 0)):
        assert limits.token_ids(inside, MODEL) == tuple(inside)
    says = "is no token id; ids are integers from 0 to 99"
    for outside in (-1, 100, 101, 10**50, 1.0, True, False, "1", None, [1], math.nan):
        error = refused(lambda v=outside: limits.token_ids([5, v], MODEL), says, param="prompt")
        assert error.message.startswith("prompt: ")
    for other in (5, "12", None, {1: 2}, {1}, iter([1])):
        refused(lambda v=other: limits.token_ids(v, MODEL), "expected a list of token ids")


def bias(value: object, model: ModelLimits = MODEL) -> tuple[tuple[int, float], ...]:
    return sampling_params({"logit_bias": value}, model).logit_bias


def test_logit_bias_is_bounded_on_both_sides() -> None:
    for inside in (-100, -100.0, below(100.0), 0, 100):
        assert bias({7: inside}) == ((7, inside),)
    for outside in (below(-100.0), beyond(100.0), -101, 101, math.nan, math.inf, "1", True, None):
        refused(lambda v=outside: bias({7: v}), "expected a number from -100 up to 100")
    for other in ([], "7", 7, None, [(7, 1.0)]):
        refused(lambda v=other: bias(v), "expected {token id: bias}", param="logit_bias")


def test_logit_bias_takes_json_keys_and_refuses_an_id_twice() -> None:
    assert bias({"7": -100, "3": 100.0}) == ((3, 100.0), (7, -100.0))
    assert bias({"0": 1, 99: 1}) == ((0, 1.0), (99, 1.0))
    assert bias({"00000000007": 1}) == ((7, 1.0),)  # eleven digits
    for key in ("000000000007", "100", "-1", "+7", " 7", "7.0", "", "٣", "x", 7.0, True, None):
        refused(lambda k=key: bias({k: 1}), "logit_bias: ", param="logit_bias")
    for twice in ({"7": 1, "07": 2}, {7: 1, "7": 2}):
        refused(lambda v=twice: bias(v), "a token id is given twice", param="logit_bias")


def test_prompts_leave_room_for_an_answer() -> None:
    for length in (1, 2, 62, 63):
        assert limits.room_for_answer(length, MODEL) == 64 - length
    for length in (64, 65, 10**6):
        says = (
            f"the prompt has {length} tokens, but the model holds 64 of prompt and answer "
            "together: send at most 63"
        )
        too_long(lambda n=length: limits.room_for_answer(n, MODEL), says, param="prompt")
    for length in (0, -1):
        refused(lambda n=length: limits.room_for_answer(n, MODEL), "the prompt is empty")


def test_prompt_and_answer_fit_together_to_the_last_token() -> None:
    for prompt, answer in ((1, 63), (1, 1), (63, 1), (40, 24), (40, 23)):
        limits.require_fits(prompt, answer, MODEL)
    for prompt, answer in ((1, 64), (63, 2), (40, 25)):
        says = (
            f"the prompt has {prompt} tokens and max_tokens={answer}, together more than the 64 "
            f"that the model holds: ask for at most {64 - prompt}"
        )
        too_long(
            lambda p=prompt, a=answer: limits.require_fits(p, a, MODEL), says, param="max_tokens"
        )
    too_long(lambda: limits.require_fits(64, 1, MODEL), "send at most 63", param="prompt")


def test_what_more_kv_memory_would_hold_is_exhausted_not_invalid() -> None:
    """``max_len`` is 64 for want of memory; the model itself holds 80."""
    model = ModelLimits(vocab_size=100, max_len=64, context=80)
    says = "out of KV memory"
    for inside in (64, 79):
        refused(lambda n=inside: limits.room_for_answer(n, model), says, kind=ExhaustedError)
    too_long(lambda: limits.room_for_answer(80, model), "the prompt has 80 tokens")
    for answer in (25, 39, 40):
        error = refused(
            lambda a=answer: limits.require_fits(40, a, model),
            says,
            kind=ExhaustedError,
            param="max_tokens",
        )
        assert "or serve with more --kv-memory (the model itself allows 80 tokens)" in error.message
    too_long(lambda: limits.require_fits(40, 41, model), "max_tokens=41")
    for most in (65, 80):
        refused(
            lambda n=most: sampling_params({"max_tokens": n}, model),
            says,
            kind=ExhaustedError,
            param="max_tokens",
        )
    too_long(lambda: sampling_params({"max_tokens": 81}, model), "max_tokens=81")


def test_the_bytes_of_a_prompt() -> None:
    for size in (1, 4194303, 4194304):
        text = "x" * size
        assert limits.prompt_text(text) is text
    says = "prompt has 4194305 bytes, at most 4194304"
    refused(lambda: limits.prompt_text("x" * 4194305), says, param="prompt")
    refused(lambda: limits.prompt_text("é" * 2097153), "4194306 bytes", param="prompt")
    refused(lambda: limits.prompt_text("", "text"), "the prompt is empty", param="text")
    refused(lambda: limits.prompt_text("a\udfff", "text"), "surrogate at character 1", param="text")


def test_the_bytes_of_a_label() -> None:
    for text in ("", "x" * 7, "x" * 8, "é" * 4):
        assert limits.label("salt", text, 8) is text
    for text, size in (("x" * 9, 9), ("é" * 4 + "x", 9)):
        says = f"salt has {size} bytes, at most 8"
        refused(lambda t=text: limits.label("salt", t, 8), says, param="salt")
    refused(lambda: limits.label("salt", "\ud800", 8), "not valid Unicode", param="salt")


def test_the_length_and_the_letters_of_a_request_id() -> None:
    for inside in ("", "r", "r" * 127, "r" * 128, "!", "~", "req-1/2"):
        assert limits.request_id(inside) == inside
    for outside in ("r" * 129, " ", "a b", "\x7f", "\x1f", "é", "\n", "\x00"):
        refused(lambda v=outside: limits.request_id(v), "expected at most 128", param="request_id")


@given(st.text())
def test_request_ids_are_printable_and_have_no_spaces(text: str) -> None:
    if text.isascii() and text.isprintable() and " " not in text and len(text) <= 128:
        assert limits.request_id(text) == text
    else:
        refused(lambda: limits.request_id(text), "request_id=")


def shown(value: object) -> str:
    """What an error says of a value."""
    message = refused(lambda: sampling_params({"ignore_eos": value}, MODEL)).message
    return message.removeprefix("ignore_eos=").removesuffix(": expected true or false")


def test_an_error_shows_what_was_sent_and_never_grows_with_it() -> None:
    table: Iterable[tuple[object, str]] = (
        ("é", "'\\xe9'"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (2**128 - 1, str(2**128 - 1)),
        (-(2**128 - 1), str(-(2**128 - 1))),
        (2**128, "an integer of more than 128 bits"),
        ("x" * 58, "'" + "x" * 58 + "'"),
        ("x" * 59, "'" + "x" * 56 + "..."),
        ([1] * 10**6, "a list"),
        ({"a": 1}, "a dict"),
        (None, "None"),
    )
    for value, expected in table:
        assert shown(value) == expected
    assert len(shown("x" * 58)) == len(shown("x" * 59)) == 60


def test_how_much_a_request_may_hold() -> None:
    """Bounds that the doors and the service apply."""
    assert limits.MAX_MESSAGE_BYTES == 67108864
    assert limits.MAX_BODY_BYTES == 16777216
    assert limits.MAX_PROMPTS == 64
    assert limits.MAX_MESSAGES == 1024
    assert limits.MAX_SALT_BYTES == 128
    assert limits.MAX_DOMAIN_BYTES == 64


def allowed(value: object) -> tuple[int, ...]:
    return sampling_params({"allowed_token_ids": value}, MODEL).allowed_token_ids


def test_allowed_tokens_are_some_of_the_vocabulary() -> None:
    assert allowed([0, 99, 0]) == (0, 99, 0)
    assert len(allowed([1] * 16384)) == 16384
    name = "allowed_token_ids"
    refused(lambda: allowed([1] * 16385), "16385 ids, at most 16384", param=name)
    refused(lambda: allowed([]), "expected at least one token id", param=name)
    for outside in ([100], [-1], [1.0], ["1"], [True], "1", None):
        refused(lambda v=outside: allowed(v), name, param=name)


def test_bad_words_are_few_short_texts_that_show() -> None:
    for inside in ([], ["x" * 256], ["é" * 128, " a"], [f"{i}" for i in range(64)]):
        assert limits.bad_words(inside) == tuple(inside)
    assert limits.bad_words(["a", "b", "a"]) == ("a", "b")
    for outside in (["x" * 257], [""], ["  "], ["\ud800"], [f"{i}" for i in range(65)]):
        refused(lambda v=outside: limits.bad_words(v), "bad_words: ", param="bad_words")
    for other in ("word", [1], None, {"a": 1}):
        refused(lambda v=other: limits.bad_words(v), "expected a list of strings")


def test_some_token_can_always_be_chosen() -> None:
    def require(eos: tuple[int, ...] = (0,), **fields: Any) -> None:
        limits.require_choice(SamplingParams(**fields), eos, ModelLimits(4, 64))

    require()
    require(allowed_token_ids=(1,), bad_token_ids=((2,), (1, 2)))
    require(allowed_token_ids=(0, 1), bad_token_ids=((2, 0),))
    require(bad_token_ids=((1,), (2,), (3,)))
    require(allowed_token_ids=(0,), min_tokens=2, ignore_eos=True)
    for fields in (
        {"allowed_token_ids": (1, 2), "bad_token_ids": ((1,), (3, 2))},
        {"allowed_token_ids": (0,), "min_tokens": 1},
        {"allowed_token_ids": (0, 3), "min_tokens": 1, "stop_token_ids": (3,)},
    ):
        refused(lambda f=fields: require(**f), "no token is left", param="allowed_token_ids")
    all_bad = {"bad_token_ids": ((0,), (1,), (2,), (3,))}
    refused(lambda: require(**all_bad), "no token is left", param="bad_words")
    refused(lambda: require(min_tokens=1, bad_token_ids=((1,), (2,), (3,))), param="bad_words")


def test_no_answer_can_be_asked_for_where_the_prompt_is() -> None:
    taken = sampling_params({"max_tokens": 0, "prompt_logprobs": 0}, MODEL)
    assert (taken.max_tokens, taken.only_prompt) == (1, True)
    for given_fields in ({"max_tokens": 0}, {"max_tokens": False, "prompt_logprobs": 0}):
        refused(lambda f=given_fields: sampling_params(f, MODEL), param="max_tokens")
    assert not sampling_params({"max_tokens": 1, "prompt_logprobs": 0}, MODEL).only_prompt


def test_log_probabilities_of_prompts_are_bounded_together() -> None:
    for count, tokens in ((0, 131072), (1, 65536), (20, 6241)):
        params = SamplingParams(prompt_logprobs=count)
        limits.require_scorable(params, tokens)
        refused(lambda p=params, n=tokens: limits.require_scorable(p, n + 1), "at most 131072")
    limits.require_scorable(SamplingParams(), 10**9)


def test_how_much_of_a_prompt_can_be_kept() -> None:
    for inside in (-1, 1, 2, 2147483647):
        assert limits.truncation(inside) == inside
    for outside in (0, -2, 2147483648, 1.0, "1", True, None):
        refused(lambda v=outside: limits.truncation(v), param="truncate_prompt_tokens")
