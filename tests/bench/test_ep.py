"""bench/ep.py over two hosts of the test bed: what it counts is what the cost model predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeserve.testbed.network import refusal

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "ep.py"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    file = tmp_path_factory.mktemp("ep") / "ep.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(file)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, object]]] = json.loads(file.read_text())
    return found


def test_copies_and_bytes_are_the_predicted_ones(raw: dict[str, list[dict[str, float]]]) -> None:
    assert {str(row["variant"]) for row in raw["travel"]} >= {"bf16 wire", "plan: solved"}
    for row in raw["travel"]:
        assert row["copies"] == pytest.approx(row["predicted_copies"], rel=0.02), row
        assert row["sent_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.03), row
        # Frames have headers, and streams acknowledgements.
        assert row["sent_bytes"] < row["link_bytes"] < 2 * row["sent_bytes"], row


def test_less_travels_with_bytes_and_single_copies(raw: dict[str, list[dict[str, float]]]) -> None:
    sent = {str(row["variant"]): row["sent_bytes"] for row in raw["travel"]}
    base = sent["int8 wire, one copy a rank"]
    assert base < sent["bf16 wire"] < sent["fp32 wire"]
    assert base < sent["a copy for every expert"]


def test_every_number_of_microbatches_is_measured_at_every_rate(
    raw: dict[str, list[dict[str, object]]],
) -> None:
    assert [row["rate"] for row in raw["overlap"]] == ["unlimited", "100mbit"]
    for row in raw["overlap"]:
        speeds = row["tokens_per_s"]
        assert isinstance(speeds, dict)
        assert list(speeds) == ["1", "2", "4", "auto"]
