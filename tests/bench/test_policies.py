"""The bench of the scheduler's policies, on very little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "policies.py"


def rows_of(*words: str) -> Any:
    done = subprocess.run(
        [sys.executable, BENCH, *words, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_admission_is_shown_for_drawn_and_recorded_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("Timestamp,Request tokens,Response tokens\n" + "0,30,20\n" * 40)
    rows = rows_of("admission", "--requests", "40", "--lengths", str(trace))
    assert [row["lengths"] for row in rows[::3]] == ["lognormal", "short, long, short", "trace"]
    assert [row["preemptions"] for row in rows if row["policy"] == "longest answers fit"] == [0] * 3


def test_targets_are_shown_beside_chunks_of_each_size(tmp_path: Path) -> None:
    rows = rows_of("targets", "--requests", "6", "--out", str(tmp_path / "found.json"))
    assert len(rows) == 3 * (4 + 4)
    assert rows == json.loads((tmp_path / "found.json").read_text())
    assert {row["budgets"] for row in rows if row["policy"].startswith("chunks")} == {1}


@pytest.mark.long
def test_speculation_is_shown_by_domain_and_number_of_drafts() -> None:
    """Within a bound of seconds, of which less than nothing is left from the first: one round."""
    found = rows_of(
        *("speculation", "--domains", "sums", "--source", "draft", "--draft-model", "demo"),
        *("--requests", "3", "--batch", "2", "--seconds", "0.1"),
    )
    rows = found["rows"]
    assert len(rows) == 6
    assert all(row["drafted"] == 0 for row in rows if row["schedule"] in ("off", "0"))
    assert {row["accepted"] / row["drafted"] for row in rows if row["schedule"] == "5"} == {1.0}
    assert [one["batch"] for one in found["verdicts"]] == [2, None]


def test_what_swapping_saves_is_shown() -> None:
    rows = rows_of("swap", "--requests", "60")
    assert len(rows) == 2 * 2 * 3
    given_up = [row for row in rows if row["lengths"] == "short, long, short"]
    again, by_blocks, runs = given_up[:3]
    assert again["preemptions"] > 0 == again["swaps"]
    assert by_blocks["swaps"] > 0 == by_blocks["recomputed_tokens"]
    assert by_blocks["calls"] == by_blocks["block_calls"]
    assert runs["swaps"] > 0 == runs["recomputed_tokens"]
    assert 5 * runs["calls"] <= runs["block_calls"]


def test_service_between_tenants_is_shown() -> None:
    by_arrival, *fair = rows_of("fairness", "--requests", "40")
    assert by_arrival["service"]["chat"] == 0
    for row in fair:
        assert max(row["service"].values()) <= 1.5 * min(row["service"].values())


@pytest.mark.long
def test_layered_prefill_is_shown_beside_chunks() -> None:
    words = ("--prompt", "120", "--step", "32", "--batch", "2", "--rounds", "1")
    chunk, layer, auto = rows_of("layered", *words)
    assert layer["loads"] < 0.7 * chunk["loads"]
    assert layer["largest"] <= chunk["largest"]
    assert layer["steps"] <= chunk["steps"]
    assert auto["loads"] == min(layer["loads"], chunk["loads"])
    counted, predicted = (layer[name] / chunk[name] for name in ("loads", "predicted"))
    assert abs(counted - predicted) < 0.03
