"""An instance with a door at every rank, as its clients see it: one answer wherever they ask."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

RANKS, REQUESTS, PATIENCE_S = 4, 160, 120.0
FLAGS = [
    *("--model", "demo", "--grpc-port", "none", "--http-port", "0", "--num-blocks", "64"),
    *("--threads", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"),
    *("--ep", str(RANKS), "--doors", "all", "--ep-deadline", "60"),
]

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


@contextmanager
def instance(said: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The process and the ports of all doors."""
    command = [sys.executable, "-m", "moeserve.cli", "serve", *FLAGS]
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            ports = [first, *others(said)]
            yield process, [int(re.findall(r"http=http://\S+:(\d+)", p)[0]) for p in ports]
        finally:
            process.kill()
            process.wait(PATIENCE_S)
            assert process.stdout is not None
            process.stdout.close()


def others(said: Path) -> list[str]:
    """What the other ranks print, which rank 0 passes on; all are ready when one is."""
    for _ in range(int(PATIENCE_S / 0.1)):
        found = [line for line in said.read_text().splitlines() if "ready:" in line]
        if len(found) == RANKS - 1:
            return found
        signal.sigtimedwait([], 0.1)
    raise AssertionError(f"not all doors opened: {said.read_text()}")


def ask(port: int, prompt: str, **more: object) -> tuple[str, list[float]]:
    """Text and log-probabilities, if any."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 12, "temperature": 0} | more
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | (more or {"ignore_eos": True})).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        choice = json.loads(answer.read())["choices"][0]
    return choice["text"], (choice["logprobs"] or {}).get("token_logprobs", [])


def test_every_door_gives_the_same_answers_and_all_stop_together(tmp_path: Path) -> None:
    prompts = [f"Once upon a time there were {i % 5}" for i in range(REQUESTS)]
    with instance(tmp_path / "log") as (process, ports):
        assert len(set(ports)) == RANKS
        with ThreadPoolExecutor(32) as clients:
            answers = list(clients.map(ask, ports * (REQUESTS // RANKS), prompts))
            score = functools.partial(ask, echo=True, logprobs=1, max_tokens=0)
            scores = list(clients.map(score, ports * 4, [prompts[0]] * RANKS * 4))
        page = urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=PATIENCE_S)
        with page:
            counted = page.read().decode()
        formed = {ask(port, prompts[0], guided_regex="[a-z]{3}-[0-9]{2}")[0] for port in ports}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert len({(p, text) for p, (text, _) in zip(prompts, answers, strict=True)}) == 5
    assert scores[0][0] == prompts[0]
    assert len(scores[0][1]) > 5
    assert scores.count(scores[0]) == len(scores)
    assert len(formed) == 1
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", formed.pop())
    tokens = re.search(r"^moeserve_generated_tokens_total\S* (\S+)$", counted, re.MULTILINE)
    assert tokens is not None
    assert float(tokens[1]) == 12 * REQUESTS + len(scores)
    by_rank = re.findall(r"^moeserve_rank_layer_tokens_total\S* (\S+)$", counted, re.MULTILINE)
    assert len(by_rank) == RANKS
    assert all(float(tokens) > 0 for tokens in by_rank)
