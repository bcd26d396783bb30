"""bench/grammars.py: what the shipped model answers to drawn schemas is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "grammars.py"


def test_every_finished_answer_has_the_form_that_was_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "schemas", "--count", "32", "--seed", "7"],
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == report["refused"] == 0, done.stderr
    assert report["finished"] + report["cut"] == report["schemas"] == 32
    assert report["finished"] >= 16
    assert report["masks"] == report["tokens"]
    assert report["workers"] == 1
