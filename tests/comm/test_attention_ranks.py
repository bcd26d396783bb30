"""Ranks that have the requests, and one that runs experts only, as a client sees them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import host_store
from moeserve.config.options import EpOptions, RankModelOptions
from moeserve.engine.rank_model import EpContext, plan_of_context
from moeserve.errors import ConfigError
from moeserve.gateway.offline import generate
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.library import resolve_model
from moeserve.observe.progress import Progress

PATIENCE_S, REQUESTS, TOKENS = 120.0, 24, 12
PROMPTS = [f"Once upon a time there were {i % 3}" for i in range(REQUESTS)]
ASKED = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
FLAGS = [
    *("--model", "demo", "--grpc-port", "none", "--http-port", "0", "--num-blocks", "96"),
    *("--threads", "1", "--max-num-seqs", "6", "--max-num-batched-tokens", "64"),
    *("--ep", "3", "--ep-deadline", "60", "--microbatches", "2", "--attention-ranks", "2"),
]

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


def get(address: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        said: bytes = answer.read()
    return said.decode()


def test_answers_are_those_of_one_process_and_a_rank_without_requests_has_none(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "moeserve.cli", "serve", *FLAGS]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        (door,) = re.findall(r"http=(http://\S+)", process.stdout.readline())

        def ask(prompt: str) -> str:
            body = {"model": "demo", "prompt": prompt, **ASKED}
            text: str = json.loads(get(f"{door}/v1/completions", body))["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(REQUESTS) as clients:
            answers = list(clients.map(ask, PROMPTS))
        page = get(f"{door}/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()
    alone = {p: generate(RankModelOptions(model="demo"), p, ASKED).text for p in PROMPTS[:3]}
    assert answers == [alone[prompt] for prompt in PROMPTS]

    def by_rank(name: str) -> list[float]:
        return [float(n) for n in re.findall(rf"^{name}{{\S* (\S+)$", page, re.MULTILINE)]

    tokens = by_rank("moeserve_rank_layer_tokens_total")
    assert len(tokens) == 3
    assert all(n > 0 for n in tokens[:2])
    assert tokens[2] == 0
    assert by_rank("moeserve_kv_blocks") == [2 * 96.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_ranks": 4}, "attention_ranks=4: there are 3 ranks"),
        ({"attention_ranks": 2, "replan": "auto"}, "leave out --replan auto"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    store, _ = host_store("127.0.0.1")
    context = EpContext(
        Group(0, 3, store), Topology((0, 0, 0)), Progress(), EpOptions.model_validate(options)
    )
    with pytest.raises(ConfigError, match=said):
        plan_of_context(Checkpoint.open(resolve_model("demo")), context)
