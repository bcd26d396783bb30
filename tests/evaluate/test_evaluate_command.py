"""``moeserve evaluate`` from end to end: what it prints, draws and refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeserve import cli

Folder = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]

ESTIMATE = {"value", "error"}
DIVERGENCE: dict[str, Any] = {
    "tokens": None,
    "perplexity": {"reference": ESTIMATE, "tested": ESTIMATE, "ratio": ESTIMATE},
    "kl": {"mean": ESTIMATE, "quantiles": {"0.01", "0.5", "0.9", "0.99", "0.999"}, "max": None},
    "top1_agreement": ESTIMATE,
    "delta_p": {"mean": ESTIMATE, "rms": None},
}
MARKS = {"right", "share", "interval"}
EXAM: dict[str, Any] = {
    "kind": None,
    "problems": None,
    "reference": MARKS,
    "tested": MARKS,
    "only_reference": None,
    "only_tested": None,
    "p_value": None,
    "within_noise": None,
}
RUN = {"model", "dtype", "quantization", "quantize_attention", "kv_dtype"}
REPORT: dict[str, Any] = {
    "format": None,
    "reference": RUN,
    "tested": RUN,
    "window": None,
    "seed": None,
    **DIVERGENCE,
    "texts": [{"text": None, **DIVERGENCE}],
    "routing": {
        "tokens": None,
        "equal": None,
        "overlap": None,
        "layers": [{"layer", "equal", "overlap"}],
    },
    "arithmetic": [EXAM],
}


def require_shape(found: Any, shape: Any, where: str = "report") -> None:
    """Exactly these keys, and numbers, text or truth values at the leaves."""
    if isinstance(shape, list):
        assert found, where
        for i, item in enumerate(found):
            require_shape(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, set | dict):
        assert isinstance(found, dict), where
        assert set(found) == set(shape), where
        for key in shape:
            require_shape(found[key], shape[key] if isinstance(shape, dict) else None, key)
    else:
        assert isinstance(found, str | int | float | list), where
        assert not isinstance(found, float) or math.isfinite(found), where


def evaluate(capsys: Capture, *args: str, status: int = 0) -> str:
    assert cli.main(["evaluate", "--threads", "1", *args]) == status
    shown = capsys.readouterr()
    return shown.out if status == 0 else shown.err


def test_the_demo_model_in_float32_lies_near_bfloat16(capsys: Capture) -> None:
    few = ["--tokens", "128", "--window", "64", "--problems", "8"]
    report = json.loads(evaluate(capsys, "--model", "demo", "--dtype", "float32", *few, "--json"))
    require_shape(report, REPORT)
    assert report["format"] == "moeserve.evaluation.v1"
    assert report["tokens"] == 128
    assert report["window"] == 64
    assert report["tested"]["dtype"] == "float32"
    assert report["reference"]["dtype"] == "auto"
    assert 0 < report["kl"]["mean"]["value"] < 0.05
    assert report["top1_agreement"]["value"] > 0.9
    assert abs(report["perplexity"]["ratio"]["value"] - 1) < 0.05
    assert report["routing"]["tokens"] == 4 * 64
    assert [layer["layer"] for layer in report["routing"]["layers"]] == list(range(1, 8))
    assert report["arithmetic"][0]["problems"] == 8


def test_a_cache_of_eight_bits_changes_a_little(capsys: Capture) -> None:
    few = ["--tokens", "128", "--window", "64", "--problems", "0", "--json"]
    report = json.loads(evaluate(capsys, "--kv-dtype", "int8", *few))
    assert report["tested"]["kv_dtype"] == "int8"
    assert 0 < report["kl"]["mean"]["value"] < 0.05
    assert report["top1_agreement"]["value"] > 0.9


@pytest.mark.parametrize(
    ("quantization", "kl", "agreement"), [("int8", (1e-4, 0.02), 0.9), ("int4", (2e-3, 0.1), 0.8)]
)
def test_fewer_bits_lie_farther_from_the_original(
    quantization: str, kl: tuple[float, float], agreement: float, capsys: Capture
) -> None:
    few = ["--tokens", "512", "--window", "128", "--problems", "0", "--json"]
    report = json.loads(evaluate(capsys, "--quantization", quantization, *few))
    assert report["tested"]["quantization"] == quantization
    assert report["reference"]["quantization"] == "none"
    assert kl[0] < report["kl"]["mean"]["value"] < kl[1]
    assert report["top1_agreement"]["value"] > agreement
    assert report["routing"]["layers"][-1]["equal"] < 1


def test_one_run_against_its_like_differs_in_nothing(
    tiny_checkpoint: Folder, capsys: Capture
) -> None:
    folder = str(tiny_checkpoint("deepseek_v3"))
    few = ["--tokens", "40", "--window", "20", "--problems", "4", "--json"]
    report = json.loads(evaluate(capsys, "--model", folder, "--against", folder, *few))
    assert report["kl"]["max"] == report["delta_p"]["rms"] == 0
    assert report["top1_agreement"] == {"value": 1.0, "error": 0.0}
    assert report["perplexity"]["ratio"] == {"value": 1.0, "error": 0.0}
    assert report["routing"]["equal"] == report["routing"]["overlap"] == 1


def test_files_are_reported_one_by_one_and_drawn(
    tiny_checkpoint: Folder, tmp_path: Path, capsys: Capture
) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for i, file in enumerate(files):
        file.write_text("the hat is on the other hen " * (10 + i))
    picture = tmp_path / "picture.png"
    args = ["--text", *map(str, files), "--tokens", "32", "--window", "16", "--problems", "0"]
    shown = evaluate(
        capsys, "--model", str(tiny_checkpoint("qwen3_moe")), *args, "--plot", str(picture)
    )
    assert "one.txt" in shown
    assert "two.txt" in shown
    assert "routing of" in shown
    assert "arithmetic  none: --problems is 0" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_a_tokenizer_writes_text_and_asks_no_sums(
    tiny_checkpoint: Folder, tmp_path: Path, capsys: Capture
) -> None:
    for file in tiny_checkpoint("qwen3_moe").iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    args = ["--model", str(tmp_path), "--tokens", "8", "--window", "16"]
    assert json.loads(evaluate(capsys, *args, "--json"))["arithmetic"] is None
    text = tmp_path / "some.txt"
    text.write_text("the hat")
    said = evaluate(capsys, *args, "--text", str(text), status=2)
    assert "tokenizer.json" in said
    assert "leave --text out" in said


def test_a_picture_without_matplotlib_names_the_extra(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "moeserve[figures]" in evaluate(capsys, "--plot", "x.png", status=2)


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["--tokens", "0"], 2, "--tokens=0: must be at least 1"),
        (["--window", "3"], 2, "--window=3: must be at least 4"),
        (["--window", "513"], 2, "--window=513: the checkpoint was made for 512 positions"),
        (["--problems", "-1"], 2, "--problems=-1: must be at least 0"),
        (["--threads", "0"], 2, "--threads=0: must be at least 1"),
        (["--text", "/nowhere.txt"], 2, "--text /nowhere.txt: no such file"),
        (["--plot", "/nowhere/x.png"], 2, "there is no folder /nowhere"),
        (["--against", "/nowhere"], 1, "model '/nowhere': no such folder"),
        (["--against", "demo"], 2, "has 4096 tokens"),
    ],
)
def test_bad_arguments_are_named_in_one_line(
    args: list[str], status: int, says: str, tiny_checkpoint: Folder, capsys: Capture
) -> None:
    said = evaluate(capsys, "--model", str(tiny_checkpoint("qwen3_moe")), *args, status=status)
    assert says in said
    assert len(said.splitlines()) == 1


def test_models_that_split_text_differently_are_not_compared(
    tiny_checkpoint: Folder, tmp_path: Path, capsys: Capture
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = evaluate(capsys, "--model", str(folder), "--against", str(tmp_path), status=2)
    assert "splits text otherwise" in said
