"""The input of a batch: hostile lines are refused one by one, and never more than one is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import DataLossError
from moeserve.gateway.batch.lines import (
    MOST_LINE_BYTES,
    Asked,
    Refused,
    asked_of,
    custom_id_of,
    read_lines,
)

if TYPE_CHECKING:
    from conftest import Lines

WHOLE: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "x"},
}


def test_lines_are_counted_from_1_and_empty_ones_are_none(batch_of: Lines) -> None:
    path = batch_of("one", "", "  ", "two\r", "three")
    lines = list(read_lines(path))
    assert [(one.number, one.raw) for one in lines] == [(1, b"one"), (4, b"two"), (5, b"three")]


def test_the_last_line_needs_no_end(batch_of: Lines) -> None:
    path = batch_of("one", "two")
    whole = list(read_lines(path))
    path.write_bytes(path.read_bytes()[:-1])
    assert list(read_lines(path)) == whole


def test_equal_lines_have_one_digest_and_each_its_own(batch_of: Lines) -> None:
    first, second, other = read_lines(batch_of("same", "same", "other"))
    assert first.digest == second.digest != other.digest
    assert len({first.digest, first.own_digest, second.own_digest, other.own_digest}) == 4


def test_a_line_of_any_length_is_one_line_and_is_not_kept(batch_of: Lines) -> None:
    long, longer = b"x" * (MOST_LINE_BYTES + 1), b"x" * (3 * MOST_LINE_BYTES)
    lines = list(read_lines(batch_of(b"a", long, longer, b"y" * MOST_LINE_BYTES, b"b")))
    assert [one.raw is None for one in lines] == [False, True, True, False, False]
    assert lines[1].digest != lines[2].digest
    assert lines[-1].raw == b"b"


def test_a_folder_is_no_input(tmp_path: Any) -> None:
    with pytest.raises(DataLossError, match="cannot be read behind line 0: Is a directory"):
        list(read_lines(tmp_path))


def test_a_line_asks_for_its_body_at_its_url() -> None:
    assert asked_of(WHOLE) == Asked("/v1/completions", b'{"prompt": "x"}', 1)
    assert custom_id_of(WHOLE) == "a"


@pytest.mark.parametrize(
    ("body", "sequences"),
    [
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"n": 4}, 4),
        ({"n": 10**9}, 1),
        ({"n": True, "prompt": []}, 1),
        ({"prompt": ["a"] * 10**4}, 64),
    ],
)
def test_what_the_engine_will_have_of_a_line(body: dict[str, Any], sequences: int) -> None:
    asked = asked_of({**WHOLE, "body": body})
    assert isinstance(asked, Asked)
    assert asked.sequences == sequences


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "GET"}, "invalid_method"),
        ({"method": None}, "invalid_method"),
        ({"url": "/v1/models"}, "invalid_url"),
        ({"url": "http://169.254.169.254/v1/completions"}, "invalid_url"),
        ({"url": ["/v1/completions"]}, "invalid_url"),
        ({"body": None}, "invalid_body"),
        ({"body": [1]}, "invalid_body"),
        ({"body": {"stream": True}}, "invalid_body"),
        ({"priority": 1}, "unknown_key"),
    ],
)
def test_what_is_no_request_is_refused(change: dict[str, Any], code: str) -> None:
    refused = asked_of({**WHOLE, **change})
    assert isinstance(refused, Refused)
    assert refused.code == code
    assert "\n" not in refused.message


@pytest.mark.parametrize("name", [None, "", 7, ["a"], "x" * 513])
def test_a_request_has_a_name_of_bounded_length(name: object) -> None:
    refused = custom_id_of({**WHOLE, "custom_id": name})
    assert isinstance(refused, Refused)
    assert refused.code == "invalid_custom_id"
    assert len(refused.message) < 250


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*WHOLE, "more"]), json_values))
def test_whatever_a_line_says_it_asks_or_is_refused(change: dict[str, Any]) -> None:
    fields = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    custom_id, asked = custom_id_of(fields), asked_of(fields)
    assert isinstance(custom_id, str | Refused)
    assert isinstance(asked, Refused) or json.loads(asked.body) == fields["body"]
