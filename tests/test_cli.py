"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moeserve import __version__, cli

Checkpoint = Callable[[str], Path]


def run(*args: str, timeout: float = 110.0) -> subprocess.CompletedProcess[str]:
    """As a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moeserve.cli", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_generate_prints_one_json_object(tiny_checkpoint: Checkpoint) -> None:
    asked = ["--prompt", "hello", "--max-tokens", "12", "--temperature", "0", "--ignore-eos"]
    done = run(
        "generate", "--model", str(tiny_checkpoint("qwen3_moe")), *asked, "--dtype", "float32",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == 12
    assert isinstance(answer["text"], str)
    assert answer["finish_reason"] == "length"
    assert 0 < answer["ttft_s"] < 100
    assert 0 < answer["tpot_s"] < 100


def test_text_and_its_token_ids_generate_the_same(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    from moeserve.models.tokenizer import Tokenizer

    folder = tiny_checkpoint("deepseek_v3")
    ids = Tokenizer.load(folder).encode("one two")
    answers = []
    for prompt in (["--prompt", "one two"], ["--prompt-ids", ",".join(map(str, ids))]):
        args = ["generate", "--model", str(folder), *prompt, "--temperature", "0", "--json"]
        assert cli.main([*args, "--max-tokens", "8", "--threads", "1"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1]


def test_a_reader_that_leaves_ends_the_answer_quietly(tiny_checkpoint: Checkpoint) -> None:
    asked = ["--prompt", "hello", "--max-tokens", "200", "--ignore-eos", "--threads", "1"]
    command = ["generate", "--model", str(tiny_checkpoint("qwen3_moe")), *asked]
    with subprocess.Popen(
        [sys.executable, "-m", "moeserve.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait(110) == 1
    assert "Traceback" not in told
    assert "BrokenPipe" not in told


def test_a_seed_repeats_an_answer(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for seed in ("5", "5", "6"):
        args = ["generate", "--model", str(tiny_checkpoint("qwen3_moe")), "--prompt", "x", "--json"]
        assert cli.main([*args, "--seed", seed, "--max-tokens", "16", "--ignore-eos"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1] != answers[2]


def test_without_json_the_text_streams_to_stdout_and_the_figures_to_stderr(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "--model", str(tiny_checkpoint("qwen3_moe")), "--prompt", "x"]
    assert cli.main([*args, "--max-tokens", "5", "--temperature", "0", "--ignore-eos"]) == 0
    shown = capsys.readouterr()
    assert "[5 tokens, TTFT " in shown.err
    assert "TTFT" not in shown.out


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["--max-tokens", "4"], 2, "give --prompt TEXT or --prompt-ids IDS"),
        (["--prompt", ""], 1, "the prompt is empty"),
        (["--prompt-ids", "1,two"], 2, "--prompt-ids='1,two': expected integers"),
        (["--prompt-ids", "99999"], 1, "99999 is no token id"),
        (["--prompt", "x", "--temperature", "nan"], 1, "temperature=nan: expected a number"),
        (["--prompt", "x", "--temperature", "-1"], 1, "temperature=-1.0: expected a number"),
        (["--prompt", "x", "--max-tokens", "100000"], 1, "max_tokens=100000"),
        (["--prompt", "x", "--dtype", "int3"], 2, "--dtype='int3'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(
    args: list[str],
    status: int,
    says: str,
    tiny_checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", "--model", str(tiny_checkpoint("qwen3_moe")), *args]) == status
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", "/nowhere/at/all", "--prompt", "x"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_flags_are_not_guessed_from_their_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--max-num-seq", "3"])
    assert ended.value.code == 2
    assert "--max-num-seq" in capsys.readouterr().err


def test_print_config_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--max-num-seqs", "7", "--kv-memory", "1GiB", "--print-config"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["max_num_seqs"] == 7
    file = tmp_path / "serve.yaml"
    file.write_text(first)
    assert cli.main(["serve", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == first


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "generate", "doctor", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert "example: moeserve" in capsys.readouterr().out


def test_doctor_prints_json_and_says_whether_all_is_well(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["doctor", "--model", str(tiny_checkpoint("qwen3_moe")), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["exit_status"] == status
    assert report["model"]["architecture"] == "Qwen3MoeForCausalLM"


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moeserve.cli import main\n"
        "sys.exit(main(['serve', '--print-config']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_serve_takes_its_model_and_port_as_people_type_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["serve", "elsewhere", "--port", "8123", "--print-config"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert (said["model"], said["http_port"]) == ("elsewhere", 8123)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo", "--model", "demo"], "--model='demo' and MODEL 'demo': give one"),
        (["--port", "1", "--http-port", "2"], "--http-port='2' and --port '1': give one"),
        (["--port", "x"], "--http-port='x'"),
    ],
)
def test_serve_takes_neither_twice(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *words, "--print-config"]) == 2
    assert says in capsys.readouterr().err


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeserve", "--version"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == f"moeserve {__version__}\n"
