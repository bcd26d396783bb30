"""The comparison with peers: absent ones are rows, samples are kept, nothing stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ["--rounds", "1", "--prefill", "8", "--batch", "2", "--prompt", "4", "--tokens", "3"]
ONE = ["--threads", "1", "--streams", "2"]
Tiny = Callable[[str], Path]


def compare(model: Path, home: Path, *words: str) -> dict[str, Any]:
    file = home / "peers.json"
    done = subprocess.run(
        [
            sys.executable, str(BENCH / "peers" / "run.py"), "--model", str(model),
            "--home", str(home), "--json", str(file), *SMALL, *ONE, *words,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def test_every_absent_peer_is_a_row_that_says_how_to_have_it(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    peers = ["--only", "llama.cpp", "vLLM", "transformers"]
    rows = compare(tiny_checkpoint("qwen3_moe"), tmp_path, *peers)["rows"]
    assert {row["peer"] for row in rows} == {
        "llama.cpp Q8_0",
        "llama.cpp Q4_K_M",
        "llama.cpp bf16",
        "vLLM bf16 compiled",
        "vLLM bf16 eager",
        "transformers bf16",
    }
    assert {"prefill", "decode", "ready", "memory", "serve tok/s"} <= {r["what"] for r in rows}
    for row in rows:
        assert row["median"] is None
        assert row["note"].startswith("absent: ")


def test_ours_is_measured_alone_and_through_its_server_and_not_twice(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    ours = ["--only", "moeserve bf16"]
    told = compare(tiny_checkpoint("qwen3_moe"), tmp_path, *ours)
    found = {(row["what"], row.get("batch") or row.get("tokens")): row for row in told["rows"]}
    for what in (("prefill", 8), ("decode", 2), ("serve tok/s", 2), ("serve ttft p99", 2)):
        assert found[what]["median"] > 0, found[what]
    assert found["decode", 2]["roofline"] > 0
    assert found["memory", None]["median"] > 1
    again = compare(tiny_checkpoint("qwen3_moe"), tmp_path, *ours)
    assert again["samples"] == told["samples"]


def test_a_peer_that_nobody_knows_is_refused() -> None:
    for script, words in (
        ("run.py", ["--model", "demo", "--only", "gpt"]),
        ("install.py", ["gpt"]),
    ):
        done = subprocess.run(
            [sys.executable, str(BENCH / "peers" / script), *words],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 1
        assert "expected some of" in done.stderr


@pytest.mark.parametrize("script", ["run.py", "install.py"])
def test_a_script_explains_itself(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "peers" / script), "--help"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "example: python bench/peers/" in done.stdout
