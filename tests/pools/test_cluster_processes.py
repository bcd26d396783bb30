"""A cluster of processes, from outside: its answers are those of one process, whoever is killed,
stopped or drained meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from cluster_parts import (
    PATIENCE_S,
    STORY,
    Part,
    Parts,
    Streams,
    ask,
    ask_all,
    body,
    free_port,
    long_bodies,
    members,
    shown,
    until,
)

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.long


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


@pytest.fixture(scope="module")
def long_answers(alone: Part) -> list[str]:
    return [choices[0]["text"] for choices in ask_all([alone.url], long_bodies(16))]


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
    streams = Streams(gateway.url, long_bodies(16))  # some run when all have begun
    streams.begun()
    for name in ("d0", "d2", "p1"):  # the newest one has most of them
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
    assert streams.join() == long_answers[:8]
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


def restarted(part: Part) -> set[str]:
    """Parts of a cluster that were ready twice."""
    names = [line.partition(" (process ")[0] for line in list(part.lines) if " (process " in line]
    return {name for name in names if names.count(name) > 1}


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
        for name in ("decode-0", "gateway-1"):
            began = part.said(f"{name} (process ")
            os.kill(int(began.partition(")")[0]), signal.SIGKILL)
            assert part.said(f"{name}: ended ") == "by signal 9; it is started anew in 1 s"
        until(lambda: restarted(part) >= {"decode-0", "gateway-1"}, "both are ready again")
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
