"""Peers as processes: one that has no checkpoint takes it from those that have, and answers as they
do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from moeserve.config.cluster import PeerConfig
from moeserve.errors import ConfigError, UnavailableError
from moeserve.models.library import resolve_model
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.manifest import manifest_of
from moeserve.process.child import Process, StartOptions, end_all, start
from moeserve.worker import weights
from moeserve.worker.weights import name_wanted, weights_here

pytestmark = pytest.mark.long

PATIENCE_S = 120.0
SETTINGS = {"THREADS": "1", "NUM_BLOCKS": "256", "HTTP_PORT": "0", "MAX_MODEL_LEN": "512"}
ASKED = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.7, "seed": 5}


class Cluster:
    """Processes by name, and what each has printed."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        self.lines: dict[str, list[str]] = {}
        self.join = ""

    def start(self, name: str, what: str, /, **settings: str) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MOESERVE_")}
        known = {} if settings.get("role") == "cache" else SETTINGS
        known = {"HTTP_PORT": "0"} if what == "gateway" else known
        ours = known | {key.upper(): value for key, value in settings.items()}
        popen = start(
            [sys.executable, "-m", "moeserve.worker.cluster_command", what],
            StartOptions(env=environ | {f"MOESERVE_{k}": v for k, v in ours.items()}, tied=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes[name] = Process(name, popen)
        self.lines[name] = []
        self.processes[name].echo(self.lines[name].append)

    def peer(self, name: str, /, **settings: str) -> None:
        self.start(name, "peer", name=name, join=self.join, **settings)

    def said(self, name: str, pattern: str) -> str:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for line in list(self.lines[name]):
                if found := re.search(pattern, line):
                    return found.group(1)
            assert self.processes[name].alive, "".join(self.lines[name])
            time.sleep(0.02)
        raise AssertionError("".join(self.lines[name]))

    def url(self, name: str) -> str:
        return self.said(name, r"ready: .*http=(\S+)")

    def answer(self, name: str) -> Any:
        answer = httpx.post(f"{self.url(name)}/v1/completions", json=ASKED, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def counted(self, name: str, what: str) -> float:
        page = httpx.get(f"{self.url(name)}/metrics", timeout=PATIENCE_S).text
        (line,) = (x for x in page.splitlines() if x.startswith(f"moeserve_weights_{what}_total "))
        return float(line.split()[1])

    def stop(self, name: str) -> int | None:
        self.processes[name].send_signal(signal.SIGTERM)
        assert self.processes[name].wait(PATIENCE_S)
        return self.processes[name].status


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A gateway, a cache, and a member that has read the demo model from its disk and put it into
    the cache."""
    cluster = Cluster()
    try:
        cluster.start("gateway", "gateway")
        cluster.join = cluster.said("gateway", r"registry: (\S+)")
        cluster.peer("cache", role="cache", cache_memory="256MiB")
        cluster.said("cache", "(ready: )")
        cluster.peer("first", role="unified", weights="auto", model="demo")
        cluster.url("first")
        yield cluster
    finally:
        end_all(list(cluster.processes.values()), grace_s=10.0)


def test_a_peer_without_a_checkpoint_has_one_from_a_neighbour(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.peer("second", role="unified", weights="pool", weights_folder=str(tmp_path))
    assert cluster.answer("second") == cluster.answer("first")
    came = sum(cluster.counted("second", f"{whose}_bytes") for whose in ("neighbour", "pool"))
    assert came == sum(f.stat().st_size for f in next(tmp_path.glob("*/")).iterdir())
    assert cluster.counted("second", "disk_bytes") == 0
    assert cluster.counted("first", "disk_bytes") == came
    assert cluster.counted("first", "sent_bytes") >= cluster.counted("second", "neighbour_bytes")
    assert cluster.stop("second") == 0


@pytest.mark.parametrize(
    ("own_rate", "their_rate", "chosen"),
    [(1e12, 1e12, "own"), (1e3, 1e12, "theirs"), (1e3, 1e3, "members")],
)
def test_what_is_fastest_is_chosen(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_rate: float,
    their_rate: float,
    chosen: str,
) -> None:
    theirs, own, root = resolve_model("demo"), tmp_path / "copy", tmp_path / "root"
    shutil.copytree(theirs, own)
    rates = {own: own_rate, theirs.resolve(): their_rate}
    monkeypatch.setattr(weights, "reading_rate", lambda folder: rates[folder])
    config = PeerConfig(weights="auto", join=cluster.join, model=str(own), weights_folder=root)
    counts = WeightCounts()
    arrived = asyncio.run(weights_here(config, counts))
    arrived.close()
    came = counts.neighbour_bytes + counts.pool_bytes
    folder = Path(arrived.config.model)
    assert bool(came) != bool(counts.disk_bytes)
    wanted = {"own": own, "theirs": theirs.resolve(), "members": root / manifest_of(own, "").id}
    assert folder == wanted[chosen]
    if chosen != "own":
        assert arrived.config.served_model_name == "demo"


def test_without_room_for_those_of_others_the_folder_here_is_read(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "copy"
    shutil.copytree(resolve_model("demo"), own)
    monkeypatch.setattr(weights, "reading_rate", lambda folder: 1e3)
    monkeypatch.setattr("shutil.disk_usage", lambda root: SimpleNamespace(free=1 << 20))
    config = PeerConfig(weights="auto", join=cluster.join, model=str(own), weights_folder=tmp_path)
    counts = WeightCounts()
    arrived = asyncio.run(weights_here(config, counts))
    assert arrived.config.model == str(own)
    assert counts.disk_bytes == manifest_of(own, "").nbytes


def test_a_cluster_that_nobody_serves_any_more_begins_anew_from_the_cache(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.said("first", "(were new to the cache pool)")
    right = cluster.answer("first")
    assert cluster.counted("first", "put_bytes") == cluster.counted("first", "disk_bytes")
    assert cluster.stop("first") == 0
    cluster.peer("third", role="unified", weights="pool", weights_folder=str(tmp_path))
    assert cluster.answer("third") == right
    assert cluster.counted("third", "neighbour_bytes") == 0
    assert cluster.counted("third", "pool_bytes") > 0


def test_a_peer_that_finds_nobody_says_what_to_do(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WAIT_S", 0.5)
    config = PeerConfig(weights="pool", join=cluster.join, model="no-such-model")
    with pytest.raises(UnavailableError, match="has weights of no-such-model: start a member"):
        asyncio.run(weights_here(config, WeightCounts()))


def test_the_name_that_is_wanted_is_that_of_clients() -> None:
    assert name_wanted(PeerConfig()) == ""
    assert name_wanted(PeerConfig(model="/models/olmoe")) == "olmoe"
    assert name_wanted(PeerConfig(model="org/olmoe")) == "org/olmoe"
    assert name_wanted(PeerConfig(model="x", served_model_name="tale")) == "tale"


def test_weights_from_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match="--join"):
        asyncio.run(weights_here(PeerConfig(weights="pool"), WeightCounts()))
