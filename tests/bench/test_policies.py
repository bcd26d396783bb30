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


@pytest.mark.long
def test_speculation_is_shown_by_domain_and_number_of_drafts() -> None:
    found = rows_of(
        "speculation", "--requests", "3", "--rounds", "1", "--batch", "2", "--answer", "12"
    )
    rows = found["rows"]
    assert len(rows) == 3 * 6
    assert all(row["drafted"] == 0 for row in rows if row["schedule"] in ("off", "0"))
    assert any(row["accepted"] for row in rows if row["schedule"] == "5")


@pytest.mark.long
def test_layered_prefill_is_shown_beside_chunks() -> None:
    words = ("--prompt", "120", "--step", "32", "--batch", "2", "--rounds", "1")
    chunk, layer, auto = rows_of("layered", *words)
    assert layer["loads"] < 0.7 * chunk["loads"]
    assert layer["largest"] <= chunk["largest"]
    assert layer["steps"] <= chunk["steps"]
    assert auto["loads"] == min(layer["loads"], chunk["loads"])
