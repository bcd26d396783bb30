"""Answers as JSON are what the library writes, whatever they hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.gateway.openai.rendering import SLICE, render

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
values = st.recursive(
    leaves | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def whole(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@settings(max_examples=30, deadline=None)
@given(values, st.sampled_from([0, 1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE]))
def test_pieces_join_to_what_the_library_writes(value: Any, times: int) -> None:
    for shaped in (value, [value] * times, {"a": [{"b": {"c": [value] * times}}], "d": value}):
        assert render(shaped) == whole(shaped)


def test_numbers_that_json_has_not_are_refused() -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            render({"a": [0.0] * SLICE + [wrong]})
