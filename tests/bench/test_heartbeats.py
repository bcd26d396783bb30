"""bench/heartbeats.py: every member is there, and its beats are counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "heartbeats.py"

pytestmark = pytest.mark.long


def test_a_row_for_each_number_of_members(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *"--members 3 --seconds 1.5 --json".split(), str(out)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text(encoding="utf-8"))
    assert row["members"] == 3
    assert row["beats_per_s"] > 0
    assert row["core"] > 0
