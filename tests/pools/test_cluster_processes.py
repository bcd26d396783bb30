"""A cluster of processes, from outside: its answers are those of one process, whoever is killed,
stopped or drained meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub
from moeserve.process.child import Process, StartOptions, end_all, start

pytestmark = pytest.mark.long

PATIENCE_S = 120.0
SETTINGS = {
    "MOESERVE_MODEL": "demo",
    "MOESERVE_THREADS": "1",
    "MOESERVE_NUM_BLOCKS": "512",
    "MOESERVE_GRPC_PORT": "0",
    "MOESERVE_HTTP_PORT": "0",
    "MOESERVE_MAX_MODEL_LEN": "512",
}
STORY = "Once upon a time, there was a little girl named Lily. One day, she found a small box"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class Part:
    """A process of ours and what it prints."""

    def __init__(self, name: str, command: list[str], /, **settings: str) -> None:
        ours = {f"MOESERVE_{key.upper()}": value for key, value in settings.items()}
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MOESERVE_")}
        popen = start(
            [sys.executable, "-m", *command],
            StartOptions(env=environ | SETTINGS | ours, tied=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.name = name
        self.lines: list[str] = []
        self.paused = False
        self.process = Process(name, popen)
        self.process.echo(self.lines.append)

    def said(self, beginning: str) -> str:
        """The line that begins so, without it; waits for it."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if line.startswith(beginning):
                    return line.removeprefix(beginning).strip()
            assert self.process.alive, f"{self.name} ended: {''.join(self.lines)}"
            time.sleep(0.02)
        raise AssertionError(f"{self.name} has not said {beginning!r}: {''.join(self.lines)}")

    def send(self, number: signal.Signals) -> None:
        self.paused = number is signal.SIGSTOP
        self.process.send_signal(number)

    @property
    def url(self) -> str:
        return next(w for w in self.said("ready: ").split() if w.startswith("http="))[5:]

    @property
    def grpc(self) -> str:
        return next(w for w in self.said("ready: ").split() if w.startswith("grpc="))[5:]


@dataclass
class Parts:
    """A cluster, part by part."""

    parts: dict[str, Part] = field(default_factory=dict)
    gateways: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def gateway(self, name: str, listen: str = "127.0.0.1:0", /) -> None:
        command = ["moeserve.worker.cluster_command", "gateway"]
        self.parts[name] = Part(name, command, listen=listen)
        address = self.parts[name].said("registry: ")
        if address not in self.gateways:
            self.gateways.append(address)

    def peer(self, name: str, role: str, /, **settings: str) -> None:
        command = ["moeserve.worker.cluster_command", "peer"]
        join = ",".join(self.gateways)
        self.parts[name] = Part(name, command, role=role, name=name, join=join, **settings)

    def ready(self) -> None:
        for part in self.parts.values():
            part.said("ready: ")

    def close(self) -> None:
        end_all([part.process for part in self.parts.values()], grace_s=10.0)


@pytest.fixture(scope="module")
def alone() -> Iterator[Part]:
    """One process by itself: what is right."""
    part = Part("alone", ["moeserve.cli", "serve"])
    yield part
    part.process.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Parts]:
    """Two gateways, two members that prefill and two that decode, none of which a test may end."""
    parts = Parts()
    try:
        for name in ("g0", "g1"):
            parts.gateway(name)
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
            parts.peer(name, role)
        parts.peer("d1", "decode", block_size="8", num_blocks="1024")
        parts.ready()
        yield parts
    finally:
        parts.close()


def body(number: int, **fields: Any) -> dict[str, Any]:
    """One of many requests: half of them sampled."""
    text = f"{STORY} {number}" if number % 3 else f"{number} + {number * 7} ="
    drawn = {"temperature": 0.8, "seed": number, "top_p": 0.95} if number % 2 else {}
    return {"prompt": text, "max_tokens": 24, "temperature": 0} | drawn | fields


def ask(url: str, fields: dict[str, Any]) -> list[Any]:
    answer = httpx.post(f"{url}/v1/completions", json=fields, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    choices: list[Any] = answer.json()["choices"]
    return choices


def ask_all(urls: list[str], bodies: list[dict[str, Any]]) -> list[list[Any]]:
    with ThreadPoolExecutor(8) as pool:
        turns = [urls[i % len(urls)] for i in range(len(bodies))]
        return list(pool.map(ask, turns, bodies))


def test_answers_over_http_are_those_of_one_process(alone: Part, cluster: Parts) -> None:
    bodies = [body(i, logprobs=2 if i % 5 == 0 else None) for i in range(50)]
    right = ask_all([alone.url], bodies)
    assert ask_all([cluster["g0"].url, cluster["g1"].url], bodies) == right


def test_answers_over_grpc_are_those_of_one_process(alone: Part, cluster: Parts) -> None:
    def tokens(address: str, number: int) -> list[int]:
        prompt = [(number * 31 + i * 7) % 400 + 5 for i in range(5 + 6 * (number % 9))]
        sampling = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
        with grpc.insecure_channel(address) as channel:
            stub: Any = InferenceStub(channel)
            answer = stub.GenerateUnary(
                pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=prompt),
                    sampling=pb.SamplingParams(max_tokens=20, ignore_eos=True, **sampling),
                ),
                timeout=PATIENCE_S,
            )
        return list(answer.outputs[0].token_ids)

    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(tokens, [alone.grpc] * 50, range(50)))
        addresses = [cluster["g0"].grpc, cluster["g1"].grpc] * 25
        assert list(pool.map(tokens, addresses, range(50))) == right


def test_scores_of_prompts_and_grammars_are_those_of_one_process(
    alone: Part, cluster: Parts
) -> None:
    bodies = [
        body(1, prompt_logprobs=1),
        body(3, guided_regex="[0-9]{1,4}"),
        body(5, n=3, logprobs=1),
        body(7, max_tokens=1),
        body(9, stop=["little"], max_tokens=60),
    ]
    assert ask_all([cluster["g0"].url], bodies) == ask_all([alone.url], bodies)


class Streams:
    """Long answers under way, each on a thread of its own; ``texts`` as far as they have come."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self.texts = ["" for _ in bodies]
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(url, i, one)) for i, one in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, url: str, index: int, fields: dict[str, Any]) -> None:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=fields | {"stream": True}, timeout=PATIENCE_S
        ) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    self.errors.append(line)
                for choice in data.get("choices", ()):
                    self.texts[index] += choice["text"]

    def begun(self) -> None:
        until(lambda: all(self.texts), "all answers have begun")

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a stream did not end"
        assert not self.errors
        return self.texts


def snapshots(url: str) -> Iterator[dict[str, Any]]:
    """As the page of the dashboard gets them."""
    with httpx.stream("GET", f"{url}/dashboard/events", timeout=PATIENCE_S) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_the_dashboard_shows_who_has_sent_kv_to_whom(cluster: Parts) -> None:
    gateway = cluster["g0"].url
    ask_all([gateway], [body(i) for i in range(4)])
    end = time.monotonic() + PATIENCE_S
    with contextlib.closing(snapshots(gateway)) as shots:
        shot = next(shot for shot in shots if shot["flows"] or time.monotonic() > end)
    roles = {member["id"]: member["role"] for member in shot["members"]}
    assert shot["flows"]
    for flow in shot["flows"]:
        assert (roles[flow["source"]], roles[flow["target"]]) == ("prefill", "decode")
        assert flow["bytes"] > 0
        assert flow["runs"] > 0


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


def long_bodies(count: int) -> list[dict[str, Any]]:
    return [body(i, max_tokens=300, ignore_eos=True) for i in range(count)]


@pytest.fixture(scope="module")
def long_answers(alone: Part) -> list[str]:
    return [choices[0]["text"] for choices in ask_all([alone.url], long_bodies(8))]


def shown(gateway: Part, metric: str) -> float:
    """Of the page of metrics."""
    page = httpx.get(f"{gateway.url}/metrics", timeout=PATIENCE_S).text
    (line,) = (line for line in page.splitlines() if line.startswith(f"moeserve_{metric}"))
    return float(line.rpartition(" ")[2])


def members(gateway: Part, role: str, count: int) -> None:
    """Waits until the gateway knows so many."""
    metric = f'members{{role="{role}"}}'
    until(lambda: shown(gateway, metric) == count, f"{count} members that {role}")


@pytest.fixture
def third(cluster: Parts) -> Iterator[Parts]:
    """A third member that decodes, so that a test may end two; afterwards there are the two of
    each role again."""
    cluster.peer("d2", "decode")
    cluster.ready()
    members(cluster["g0"], "decode", 3)
    yield cluster
    cluster.parts.pop("d2").process.close()
    for name, role in (("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        if not cluster[name].process.alive or cluster[name].paused:
            cluster[name].process.close()
            cluster.peer(name, role)
    cluster.ready()
    for role in ("decode", "prefill"):
        members(cluster["g0"], role, 2)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_members_may_be_lost_while_they_answer(
    third: Parts, long_answers: list[str], ending: signal.Signals
) -> None:
    gateway = third["g0"]
    before = shown(gateway, "cluster_lost_total")
    streams = Streams(gateway.url, long_bodies(8))
    streams.begun()
    for name in ("d0", "d1", "p1"):
        third[name].send(ending)
    assert streams.join() == long_answers
    assert shown(gateway, "cluster_lost_total") > before, "nothing was lost"


def test_a_member_that_drains_loses_nothing(third: Parts, long_answers: list[str]) -> None:
    gateway = third["g0"]
    moved = shown(gateway, "cluster_moved_total")
    streams = Streams(gateway.url, long_bodies(8))
    streams.begun()
    leaving = [third[name] for name in ("d0", "d1")]
    for part in leaving:
        part.send(signal.SIGTERM)
    assert streams.join() == long_answers
    for part in leaving:
        assert part.process.wait(PATIENCE_S)
        assert part.process.status == 0
        assert not any("Traceback" in line for line in part.lines)
    assert shown(gateway, "cluster_moved_total") > moved, "nothing was moved while it ran"


def test_a_gateway_that_is_started_anew_finds_the_members(
    cluster: Parts, long_answers: list[str]
) -> None:
    cluster["g1"].process.send_signal(signal.SIGKILL)
    assert cluster["g1"].process.wait(PATIENCE_S)
    cluster.gateway("g1", cluster.gateways[1])
    assert ask(cluster["g1"].url, long_bodies(1)[0])[0]["text"] == long_answers[0]


def test_a_gateway_answers_loading_until_somebody_decodes() -> None:
    parts = Parts()
    try:
        port = free_port()
        command = ["moeserve.worker.cluster_command", "gateway"]
        parts.parts["g0"] = Part("g0", command, http_port=str(port))
        parts.gateways.append(parts["g0"].said("registry: "))
        parts.peer("p0", "prefill")
        parts["p0"].said("ready: ")
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body(0))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        parts["g0"].process.send_signal(signal.SIGTERM)
        assert parts["g0"].process.wait(PATIENCE_S)
        assert parts["g0"].process.status == 0
    finally:
        parts.close()


@pytest.mark.timeout(400)
def test_a_whole_cluster_is_raised_and_ended_by_one_command(alone: Part) -> None:
    """Of members with two ranks each, with a cache, found by an etcd where there is one."""
    words = "--prefill 1 --decode 1 --cache 1 --gateways 2 --ep 2"
    if shutil.which("etcd"):
        words += " --registry etcd"
    part = Part("up", ["moeserve.cli", "up", *words.split()])
    try:
        line = part.said("ready: ")
        assert line.startswith("1 prefill of 2 ranks, 1 decode of 2 ranks, 1 cache; model=demo ")
        urls = [w[5:].rstrip(";") for w in line.split() if w.startswith("http=")]
        long = [body(i, prompt=f"{STORY}. " * 4) for i in range(8)]
        assert ask_all(urls, long) == ask_all([alone.url], long)
        children = subprocess.run(
            ["pgrep", "-P", str(part.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(children) == 5 + bool(shutil.which("etcd"))
        os.kill(part.process.pid, signal.SIGTERM)
        assert part.process.wait(PATIENCE_S)
        assert part.process.status == 0
        assert not any(os.path.exists(f"/proc/{child}") for child in children)
    finally:
        part.process.close()
