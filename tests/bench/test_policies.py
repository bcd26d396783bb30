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
    found = rows_of(
        "speculation", "--requests", "3", "--rounds", "1", "--batch", "2", "--answer", "12"
    )
    rows = found["rows"]
    assert len(rows) == 3 * 6
    assert all(row["drafted"] == 0 for row in rows if row["schedule"] in ("off", "0"))
    assert any(row["accepted"] for row in rows if row["schedule"] == "5")
