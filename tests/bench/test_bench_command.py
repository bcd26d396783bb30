"""``moeserve bench``: rows with the promised keys, beside a roofline measured in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeserve import cli
from moeserve.bench import kernel
from moeserve.bench.kernel import Contender, MoeLayer, measure, ours, read_contenders, routing
from moeserve.errors import ConfigError

pytestmark = pytest.mark.long

KEYS = {"what", "peer", "unit", "threads", "median", "min", "max", "roofline", "note"}
SMALL = ["--rounds", "2", "--threads", "1", "--json"]
LAYER = MoeLayer(experts=4, per_token=2, hidden=64, inner=32)


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert cli.main(["bench", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [machine["threads"] for machine in told["machine"]] == [1]
    assert all(machine["read"]["best"] > 0 for machine in told["machine"])
    return list(told["rows"])


def test_prefill_has_a_row_for_each_length(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "prefill", "--tokens", "4,8", *SMALL)
    assert [row["tokens"] for row in rows] == [4, 8]
    for row in rows:
        assert row.keys() == KEYS | {"tokens"}
        assert (row["what"], row["peer"], row["unit"]) == ("prefill", "moeserve bf16", "tok/s")
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["roofline"] > 0


def test_decode_has_a_row_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "decode", "--batch", "1,2", "--prompt", "4", "--tokens", "3", *SMALL)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() == KEYS | {"batch"}
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["roofline"] > 0


def test_a_bench_draws_and_prints_for_people(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["bench", "prefill", "--tokens", "4", "--rounds", "1", "--threads", "1"]
    assert cli.main([*words, "--plot", str(tmp_path / "p.svg")]) == 0
    assert "moeserve bf16" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_the_kernel_is_measured_in_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--layer", "4,2,64,32", "--tokens", "1,3", "--kinds", "bf16", "--alone", *SMALL]
    rows = rows_of(capsys, "kernel", *words)
    assert [(row["peer"], row["tokens"]) for row in rows] == [
        ("moeserve bf16", 1),
        ("moeserve bf16", 3),
    ]
    assert all(row["note"] == "" and 0 < row["min"] <= row["median"] for row in rows)


def test_an_absent_implementation_is_a_row_that_says_so(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "bench" / "peers" / "contenders.py"
    with (tmp_path / "list.json").open("w") as file:
        command = [sys.executable, str(script), "--home", str(tmp_path)]
        subprocess.run(command, stdout=file, timeout=60, check=True)
    report = measure(
        read_contenders(tmp_path / "list.json"),
        layer=LAYER,
        tokens=[1],
        threads=[1],
        rounds=1,
        seconds=0.0,
    )
    assert [row.peer for row in report.rows] == ["ggml Q8_0", "ggml Q4_0", "kt-kernel int8"]
    for row in report.rows:
        assert row.median is None
        assert row.note.startswith("absent: python bench/peers/install.py")
        assert row.roofline is not None


def test_one_that_fails_leaves_the_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "START_S", 100.0)
    broken = Contender("broken", "int8", ("false",))
    shy = Contender("shy", "int8", ("true",), most_threads=0)
    report = measure(
        [broken, shy, ours("bf16")], layer=LAYER, tokens=[2], threads=[1], rounds=1, seconds=0.0
    )
    failed, left_out, measured = report.rows
    assert failed.note.startswith("failed: broken ended")
    assert left_out.note == "not run: it is faster with 0 threads"
    assert measured.median is not None


@pytest.mark.parametrize("text", ["", "{}", '[{"peer": "x"}]', '[{"peer": "x", "kind": 1}]'])
def test_a_list_of_contenders_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--contenders=.*expected a list of {peer, precision"):
        read_contenders(tmp_path / "list.json")


def test_routing_is_drawn_once_for_all() -> None:
    ids = routing(LAYER, 50)
    assert ids == routing(LAYER, 50)
    assert all(len(set(chosen)) == 2 and set(chosen) <= set(range(4)) for chosen in ids)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["prefill", "--tokens", "many"], "--tokens='many': expected integers"),
        (["prefill", "--tokens", "0"], "every one must be at least 1"),
        (["decode", "--tokens", "1,2"], "decode takes one number"),
        (["decode", "--rounds", "0"], "--rounds=0"),
        (["kernel", "--layer", "4,8,16,16"], "expected experts,per token"),
        (["kernel", "--kinds", "int3"], "expected some of int8,int4,bf16"),
        (["prefill", "--threads", "100000"], "this process may use"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == 2
    assert problem in capsys.readouterr().err
