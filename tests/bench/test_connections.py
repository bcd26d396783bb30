"""bench/connections.py over real sockets: idle ones stay open while others are served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "connections.py"


def test_idle_connections_stay_beside_those_that_are_served() -> None:
    small = "--idle 60 --active 20 --tokens 8 --rounds 1 --json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *small.split()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["kind"], r["idle"]) for r in found["rounds"]] == [
        ("http", 0), ("http", 60), ("grpc", 0), ("grpc", 60),
    ]  # fmt: skip
    assert set(found["ratio_of_medians"]) == {"http", "grpc"}
