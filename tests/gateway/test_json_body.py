"""A body parsed elsewhere is the body: nothing is lost, and what is too much is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError
from moeserve.gateway import json_body
from moeserve.gateway.json_body import MOST_DEPTH, MOST_VALUES, pack, parse_json, takes_long, unpack

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
long_lists = st.lists(st.integers(-(2**70), 2**70) | st.booleans(), min_size=64, max_size=80)
small_lists = st.lists(st.integers(-(2**31), 2**33), min_size=64, max_size=80)
long_texts = st.text(min_size=1).map(lambda text: text * 5000)
values = st.recursive(
    scalars | long_lists | small_lists | long_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=5))
def test_a_packed_body_is_the_same(body: dict[str, Any]) -> None:
    found = unpack(pack(body, most_ints=1 << 20))
    # As text, for 1, 1.0 and True are equal; order counts too.
    assert json.dumps(found, allow_nan=True) == json.dumps(body, allow_nan=True)


def test_values_are_counted_and_integers_apart() -> None:
    ids = list(range(1000))
    assert unpack(pack({"prompt": [ids] * 100}, most_ints=100_000)) == {"prompt": [ids] * 100}
    with pytest.raises(InvalidRequestError, match="more than 99999 integers"):
        pack({"prompt": [ids] * 100}, most_ints=99_999)
    with pytest.raises(InvalidRequestError, match=f"more than {MOST_VALUES} values"):
        pack({"metadata": [[]] * MOST_VALUES}, most_ints=1)


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = []
        for _ in range(depth - 2):
            value = {"a": value}
        return {"top": value}

    assert unpack(pack(nested(MOST_DEPTH), most_ints=1)) == nested(MOST_DEPTH)
    with pytest.raises(InvalidRequestError, match="'top': nested more than"):
        pack(nested(MOST_DEPTH + 2), most_ints=1)


@pytest.mark.parametrize(
    ("raw", "long"),
    [
        (b"[" * 1000, False),
        (b"[" * 1001, True),
        (b"a" * 5000, False),
        (b"\\n" * 1500, True),
        (b"a" * 10001, True),
    ],
)
def test_what_takes_long_is_judged_by_marks_and_size(raw: bytes, long: bool) -> None:
    assert takes_long(raw, small=1000, large=10000, marks=1000) is long


def test_the_process_answers_as_this_one_does() -> None:
    raw = json.dumps({"a": list(range(99)), "b": None, "c": "é" * 9999}).encode()
    _, packed = json_body._parse({"most_ints": 99}, raw)
    assert unpack(packed) == parse_json(raw)
    with pytest.raises(InvalidRequestError, match="not JSON"):
        json_body._parse({"most_ints": 99}, b"{")
