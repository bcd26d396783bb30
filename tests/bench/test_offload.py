"""Benches of weights read from disk: what they count, and what they say of who is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[2] / "bench"
SMALL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
}


def run(script: str, *words: str | Path) -> str:
    command = [sys.executable, str(BENCH / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = [word for key, size in SMALL.items() for word in ("--set", f"{key}={size}")]
    home = tmp_path_factory.mktemp("packed")
    return Path(run("models/make_packed.py", "qwen3-moe-1.2b", "--dir", home, *changes).strip())


def test_staggered_requests_read_fewer_weights_for_a_token(packed: Path) -> None:
    """Tokens of all schedules are equal, which the bench itself asks for."""
    shape = ["--requests", "60", "--prompt", "16", "--answer", "48", "--kv-tokens", "640"]
    found = json.loads(run("overlap.py", "--model", packed, "--share", "0.1", *shape, "--json"))
    rows: dict[str, Any] = {row["schedule"]: row for row in found["rows"]}
    assert rows["throughput"]["factor"] > 1.1
    for row in rows.values():
        assert row["read_bytes_per_token"] > 0
    more, fewer = rows["alternating"], rows["throughput"]
    assert fewer["read_bytes_per_token"] < more["read_bytes_per_token"]


def test_a_share_of_experts_is_read_and_none_where_all_fit(packed: Path) -> None:
    words = ("--shares", "0.1", "1", "--prediction", "off", "--tokens", "16", "--prompt", "32")
    some, whole = json.loads(run("offload.py", packed, *words))
    assert (some["slots"], whole["slots"]) == (32, 64)
    assert some["hit_rate"] < whole["hit_rate"]
    assert some["bytes_per_token"] > whole["bytes_per_token"]


def test_a_peer_that_is_absent_is_a_row_that_says_so(packed: Path, tmp_path: Path) -> None:
    words = ("--memory", "1GiB", "--batch", "1", "--only", "llama", "transformers")
    shown = run("constrained/peers.py", packed, "--model", packed, "--home", tmp_path, *words)
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [row["name"] for row in rows] == ["llama.cpp Q8_0", "transformers bf16"]
    assert all(row["problem"].startswith("absent: no ") for row in rows)


def test_a_longer_memory_keeps_what_a_request_used_before(tmp_path: Path) -> None:
    """Two sequences that take turns, each with two experts of its own in every layer, and room for
    all four: nothing is missed. With room for two, a memory that forgets at once misses least."""
    file = tmp_path / "routing.npz"
    ids = np.repeat([0, 2], 100)[:, None, None] + np.arange(2)[None, None] + np.zeros((1, 3, 1))
    np.savez(file, topk_ids=ids.astype(np.int16), seq_lens=np.array([100, 100]))
    sizes = ("--batch", "1", "--half-life", "1", "64", "--steps", "400", "--json", tmp_path / "j")
    run("residency.py", file, *sizes, "--share", "0.5", "1")
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    at = {(row["share"], row["half_life"]): row["missed"] for row in rows}
    assert at[1.0, 1.0] == at[1.0, 64.0] == 0.0
    assert 0 < at[0.5, 1.0] <= at[0.5, 64.0]
