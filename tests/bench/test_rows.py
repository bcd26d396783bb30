"""A row says what was measured, how near it is to the roofline, and why there is nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moeserve.bench.rows import Row, cell, notes, number, plot, summarise, table
from moeserve.errors import ConfigError

DECODE = Row("decode", "ours", "tok/s", 2, batch=4, roofline=400.0)
LATENCY = Row("moe_ffn", "ours", "us", 1, tokens=16, roofline=80.0)


@given(st.lists(st.floats(0.001, 1e9), min_size=1))
def test_the_median_lies_between_least_and_most(samples: list[float]) -> None:
    row = summarise(DECODE, samples)
    assert row.median is not None
    assert min(samples) == row.min <= row.median <= row.max == max(samples)  # type: ignore[operator]


def test_the_roofline_is_above_rates_and_below_times() -> None:
    assert summarise(DECODE, [200.0]).of_roofline == 0.5
    assert summarise(LATENCY, [160.0]).of_roofline == 0.5
    assert DECODE.of_roofline is None


def test_a_row_names_its_batch_or_its_tokens_never_both() -> None:
    keys = {"what", "peer", "threads", "median", "min", "max", "roofline", "unit", "note"}
    assert DECODE.to_json().keys() == keys | {"batch"}
    assert LATENCY.to_json().keys() == keys | {"tokens"}
    assert DECODE.to_json()["median"] is None


def test_a_table_has_a_line_for_each_peer_and_threads() -> None:
    absent = Row("decode", "theirs", "tok/s", 2, batch=4, note="absent: not installed")
    rows = [summarise(DECODE, [100.0, 300.0]), absent]
    made = table("decode", rows)
    assert made.row_count == 2
    screen = io.StringIO()
    Console(file=screen, width=100).print(made)
    assert "200 50%" in screen.getvalue()
    assert "100-300" in screen.getvalue()
    assert cell(absent) == "-"
    assert notes([absent, absent]) == ["theirs: absent: not installed"]


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (12345.6, "12,346"), (99.96, "100"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits_or_all_before_the_point(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_a_plot_is_a_picture_of_what_was_measured(tmp_path: Path) -> None:
    plot([summarise(DECODE, [100.0, 300.0]), summarise(LATENCY, [90.0])], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nothing was measured"):
        plot([DECODE], tmp_path / "b.png")
