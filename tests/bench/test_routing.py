"""bench/routing.py: what it replays follows from its speeds, and what it prints is there."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "routing.py"


def run(*words: str, out: Path) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--json", str(out)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(out.read_text(encoding="utf-8"))
    return rows


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twenty requests far apart, of 8,000 tokens in 16 pages, of which 4 are always the same, with
    answers of 101 tokens."""
    rows = [
        {
            "timestamp": 100_000 * i,
            "input_length": 8192,
            "output_length": 101,
            "hash_ids": [0, 1, 2, 3, *range(100 * (i + 1), 100 * (i + 1) + 12)],
        }
        for i in range(20)
    ]
    file = tmp_path / "mooncake" / "conversation_trace.jsonl.gz"
    file.parent.mkdir()
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def test_a_cluster_without_queues_takes_what_the_speeds_say(trace: Path, tmp_path: Path) -> None:
    words = f"replay --data {trace} --trace mooncake --members 1 --load 0.01".split()
    rows = run(*words, out=tmp_path / "out.json")
    assert len(rows) == 8
    for row in rows:
        assert row["requests"] == 20
        assert row["goodput"] == 1.0
        # All but the first find a quarter of the prompt; 8,000 tokens are computed in a second.
        assert row["computed"] == pytest.approx((16 + 19 * 12) / (20 * 16))
        assert row["ttft_p50"] == pytest.approx(6144 / 8000)
        # The KV's way, 70 kB a token at 10 GB/s, and a step of 12.4 ms for each of 101 tokens.
        assert row["tpot_p50"] == pytest.approx((8192 * 7e-6 + 101 * 0.0124) / 100)


def test_the_cost_of_decisions_is_a_row_for_each(tmp_path: Path) -> None:
    words = "cost --members 10 1000 --times 50 --policy locality_free freeness".split()
    rows = run(*words, out=tmp_path / "out.json")
    assert [(r["policy"], r["members"]) for r in rows] == [
        (policy, members)
        for policy in ("locality_free", "freeness")
        for members in (10, 10, 1000, 1000)
    ]
    assert all(0 < float(str(r["least"])) <= float(str(r["median"])) for r in rows)
