"""``moeserve quantize --packed``, and serving what it wrote, from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moeserve.cli import main
from moeserve.models.packed.layout import read_packed_header


def run(*words: str) -> str:
    command = [sys.executable, "-m", "moeserve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_packs_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["quantize", "--model", "demo", "--out", str(out), "--packed", "--scheme", "int8"]
    assert main([*words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["folder"] == str(out)
    assert done["bytes_after"] < done["bytes_before"]
    assert read_packed_header(out).options.quantization == "int8"
    assert main(["quantize", "--model", str(out), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"] > done["records"]
    assert main(["doctor", "--model", str(out), "--json"]) in (0, 1)
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["active_bytes"] < model["weight_bytes"] == done["bytes_after"]
    assert main([*words, "--json"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--packed"], "--out: missing"),
        (["--out", "x", "--packed", "--quantize-head"], "have no effect"),
        (["--out", "x", "--packed", "--group", "32"], "have no effect"),
        (["--out", "x", "--dtype", "float32"], "no effect without --packed"),
        (["--out", "x", "--scheme", "auto"], "expected 'int8' or 'int4'"),
        (["--check"], "packed.json"),
    ],
)
def test_what_has_no_effect_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", "demo", *words]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_served_copy_answers_as_the_model_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", "--model", "demo", "--out", str(out), "--packed", "--scheme", "int8")
    ask = ["generate", "--prompt", "Once upon a time", "--max-tokens", "24", "--temperature", "0"]
    plain = run(*ask, "--model", "demo", "--quantization", "int8")
    assert run(*ask, "--model", str(out)) == plain
    assert len(plain) > 20
