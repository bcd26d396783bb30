"""``moeserve bench serve`` against the real server with the demo model, over both doors and TLS."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeserve import cli

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

PATIENCE_S = 90
SERVE = "serve demo --grpc-port 0 --http-port 0 --threads 1 --num-blocks 256".split()
SMALL = "--input-len 24 --output-len 6 --ignore-eos --json".split()


class Served(NamedTuple):
    http: str
    grpc: str
    flags: list[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with TLS that asks for a key."""
    folder = tmp_path_factory.mktemp("served")
    assert cli.main(["certs", "--out", str(folder)]) == 0
    (folder / "keys").write_text("bench:a-key-of-the-bench-0123456789\n")
    (folder / "key").write_text("a-key-of-the-bench-0123456789\n")
    secure = ["--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem")]
    secure += ["--api-key-file", str(folder / "keys")]
    process = subprocess.Popen(
        [sys.executable, "-m", "moeserve.cli", *SERVE, *secure], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.fullmatch(r"ready: model=\S+ grpc=(\S+) http=(https://\S+)\n", ready)
        assert found is not None, ready
        flags = ["--tls-ca", str(folder / "ca.pem"), "--api-key-file", str(folder / "key")]
        yield Served(found[2], f"grpcs://{found[1]}", flags)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def bench(capsys: pytest.CaptureFixture[str], served: Served, *words: str) -> dict[str, Any]:
    assert cli.main(["bench", "serve", *words, *served.flags, *SMALL]) == 0
    said = capsys.readouterr()
    assert said.err == "", "progress is for terminals"
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_token_ids_over_http_have_exact_lengths(
    capsys: pytest.CaptureFixture[str], served: Served, tmp_path: Path
) -> None:
    raw, picture = tmp_path / "raw.jsonl", tmp_path / "run.png"
    told = ["--save", str(raw), "--plot", str(picture), "--slo", "ttft:60s", "e2el:60s"]
    shown = bench(
        capsys, served, "--target", served.http, "--num-prompts", "8", "--request-rate", "40", *told
    )
    assert (shown["completed"], shown["failed"], shown["failures"]) == (8, 0, {})
    assert (shown["total_input_tokens"], shown["total_output_tokens"]) == (8 * 24, 8 * 6)
    assert (shown["model_id"], shown["backend"]) == ("demo", "openai-completions")
    assert shown["slo_attainment"] == 1.0
    assert shown["request_goodput"] == pytest.approx(shown["request_throughput"])
    outcomes = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [o["index"] for o in outcomes] == list(range(8))
    for o in outcomes:
        assert sum(o["message_tokens"]) == o["output_tokens"] == 6
        assert o["due_s"] <= o["sent_s"] <= o["message_s"][0] <= o["message_s"][-1] <= o["end_s"]
        assert o["message_s"] == sorted(o["message_s"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_chat_and_texts_over_http(capsys: pytest.CaptureFixture[str], served: Served) -> None:
    words = ["--target", served.http, "--num-prompts", "3", "--max-concurrency", "1"]
    for more in (["--api", "chat"], ["--prompts", "text"]):
        shown = bench(capsys, served, *words, *more)
        assert (shown["completed"], shown["total_output_tokens"]) == (3, 18)
        assert shown["max_concurrent_requests"] == 1
        assert shown["total_input_tokens"] >= 3 * 24, "a word has a token at least"


def test_ids_and_texts_over_grpc(capsys: pytest.CaptureFixture[str], served: Served) -> None:
    words = ["--target", served.grpc, "--num-prompts", "4"]
    shown = bench(capsys, served, *words)
    assert (shown["completed"], shown["backend"]) == (4, "moeserve-grpc")
    assert (shown["total_input_tokens"], shown["total_output_tokens"]) == (4 * 24, 4 * 6)
    assert bench(capsys, served, *words, "--prompts", "text")["completed"] == 4


def test_equal_hashes_of_a_trace_hit_the_prefix_cache(
    capsys: pytest.CaptureFixture[str], served: Served, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * i,
            "input_length": 1100,
            "output_length": 40,
            "hash_ids": [3, 4, 5 + i],
        }
        for i in range(3)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["bench", "serve", "--target", served.grpc, "--trace", str(trace), "--speed", "10"]
    words += ["--length-scale", "0.125", "--max-output-len", "3", "--ignore-eos", "--json"]
    words += ["--seed", "5"]  # prompts that no other run has left in the cache
    assert cli.main([*words, *served.flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["completed"] == 3
    assert shown["total_output_tokens"] == 9
    assert shown["total_input_tokens"] == 3 * (64 + 64 + round(76 * 0.125))
    assert shown["total_cached_tokens"] == 2 * 128


def test_people_are_told_in_a_table(capsys: pytest.CaptureFixture[str], served: Served) -> None:
    words = ["--num-prompts", "2", "--slo", "tpot:50s", *served.flags, *SMALL[:-1]]
    assert cli.main(["bench", "serve", "--target", served.http, *words]) == 0
    said = capsys.readouterr().out
    for part in ("TTFT, time to first token", "p99", "2 answers in", "goodput", "sent late"):
        assert part in said


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--target", "http://127.0.0.1:9"], 1, "does not name its models (connect"),
        (["--target", "http://127.0.0.1:9", "--model", "m"], 1, "before the run failed"),
        (["--target", "nowhere"], 2, "--target='nowhere'"),
        (["--slo", "ttft"], 2, "--slo 'ttft'"),
        (["--plot", "run.bmp"], 2, "--plot='run.bmp'"),
        (["--num-prompts", "0"], 2, "--num-prompts=0"),
        (["--timeout", "0"], 2, "--timeout=0.0"),
        (["--percentiles", "a"], 2, "--percentiles='a'"),
        (["--percentiles", "101"], 2, "from 0 to 100"),
        (["--speed", "2"], 2, "--speed"),
        (["--trace-format", "azure"], 2, "are of a --trace"),
        (["--trace", "nowhere.csv"], 2, "--trace='nowhere.csv'"),
        (["--trace", "nowhere.csv", "--input-len", "3"], 2, "--input-len: lengths come from"),
        (["--extra-body", "[]"], 2, "--extra-body='[]'"),
        (["--target", "grpc://127.0.0.1:9", "--standard"], 2, "are of HTTP"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, says: str
) -> None:
    assert cli.main(["bench", "serve", *words]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert said.err.count("\n") == 1
