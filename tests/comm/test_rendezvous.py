"""Ranks meet, learn who shares a host, and whoever does not fit is refused on all of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.group import Group, host_store, join_store
from moeserve.comm.launch.environment import LOOPBACK, Launch
from moeserve.comm.launch.rendezvous import (
    HOST_ID,
    Rendezvous,
    host_identity,
    listen_address,
    open_group,
    own_address,
    refuse,
)
from moeserve.errors import CheckpointError, ConfigError, LateRankError, PlacementError
from moeserve.models.fingerprint import fingerprint
from moeserve.pb import ep_pb2 as pb

PATIENCE_S = 20.0


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as taken:
        return int(taken.getsockname()[1])


def launches(world: int) -> list[Launch]:
    port = free_port()
    return [Launch(r, world, r, world, LOOPBACK, port, "torch") for r in range(world)]


def meet(
    starts: list[Launch], hosts: Mapping[int, str] | None = None, timeout_s: float = PATIENCE_S
) -> list[Future[Rendezvous]]:
    """As so many processes would; what became of each."""
    named = hosts or {}
    with ThreadPoolExecutor(len(starts)) as pool:
        return [
            pool.submit(
                open_group,
                start,
                environ={HOST_ID: named[i]} if i in named else {},
                timeout_s=timeout_s,
                notify=lambda text: None,
            )
            for i, start in enumerate(starts)
        ]


def test_ranks_meet_and_know_who_shares_a_host() -> None:
    met = [m.result() for m in meet(launches(4), {0: "a", 1: "b", 2: "a", 3: "c"})]
    assert [m.topology.node_R for m in met] == [(0, 1, 0, 2)] * 4
    assert [m.group.rank for m in met] == [0, 1, 2, 3]
    assert [m.sharing for m in met] == [2, 1, 2, 1]
    assert [m.topology.node_R for m in (r.result() for r in meet(launches(2)))] == [(0, 0)] * 2


def test_attempts_of_one_launcher_do_not_read_each_others_notes() -> None:
    store, port = host_store(LOOPBACK)
    starts = [
        Launch(r, 2, r, 2, LOOPBACK, port, "torch", agent_store=True, attempt=attempt)
        for attempt in ("0", "1")
        for r in range(2)
    ]
    assert [m.result().topology.node_R for m in meet(starts)] == [(0, 0)] * 4
    assert store.check(["moeserve/1/arrival/1"])


def test_who_does_not_come_is_named_and_told_of_while_others_wait() -> None:
    told: list[str] = []
    starts = launches(4)
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(open_group, s, environ={}, timeout_s=2.5, notify=told.append)
            for s in (starts[0], starts[2])
        ]
    for one in waiting:
        with pytest.raises(LateRankError, match=r"ranks 1, 3 did not reach|gave up: ranks 1, 3"):
            one.result()
    assert "rank 0, arrival: waiting for ranks 1, 3" in told


def test_a_rank_0_that_is_not_there_is_named() -> None:
    late = meet([launches(2)[1]], timeout_s=0.2)[0]
    with pytest.raises(LateRankError, match=r"rank 0 did not answer at 127.0.0.1:\d+") as caught:
        late.result()
    assert caught.value.ranks == (0,)


def test_a_rank_that_is_there_twice_is_refused() -> None:
    starts = launches(3)
    met = meet([starts[0], starts[1], starts[1]])
    with pytest.raises((ConfigError, LateRankError), match="rank 1 is there twice"):
        met[0].result()


def test_other_sizes_of_the_group_are_refused_on_every_rank() -> None:
    starts = launches(3)
    met = meet([starts[0], starts[1], replace(starts[2], world=4, local_world=4)])
    says = r"was started as one of . ranks, rank . as one of .: give all the same number"
    for one in met:
        with pytest.raises((ConfigError, LateRankError), match=says):
            one.result()


def test_what_does_not_fit_is_named(subtests: pytest.Subtests) -> None:
    for theirs, says in [
        (pb.Arrival(version="9.9", protocol=1, world=2), r"rank 3 runs moeserve 9.9 \(protocol 1"),
        (pb.Arrival(version="0.1", protocol=2, world=2), r"rank 3 .*\(protocol 2\), rank 1 0.1"),
        (pb.Arrival(version="0.1", protocol=1, world=8), "rank 3 was started as one of 8 ranks"),
    ]:
        with subtests.test(says):
            mine = pb.Arrival(version="0.1", protocol=1, world=2)
            refuse(1, mine, 3, mine)
            with pytest.raises(ConfigError, match=says):
                refuse(1, mine, 3, theirs)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: rank 0 cannot listen"):
            open_group(Launch(0, 2, 0, 2, LOOPBACK, port, "torch"), environ={})


def test_a_name_that_leads_to_loopback_is_no_address_for_other_hosts() -> None:
    far = Launch(0, 2, 0, 1, "localhost", 1234, "torch")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR='localhost' is .* not reach"):
        listen_address(far)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR='no.such.host.invalid'"):
        listen_address(replace(far, host="no.such.host.invalid"))
    try:
        own = own_address()
    except ConfigError:
        pytest.skip("this host has no interface beside loopback")
    assert listen_address(replace(far, host=own)) == own
    assert listen_address(replace(far, host=None)) == own


def test_a_host_is_its_name_its_boot_and_its_namespaces() -> None:
    assert os.uname().nodename in host_identity({})
    assert host_identity({}) == host_identity({HOST_ID: ""})
    assert host_identity({HOST_ID: "a host"}) == "a host"


# What all ranks must have in common.


SAME = Identity({"config.json": "12 bytes, digest ab"}, {"dtype": "auto"}, "contiguous")


def compare(*identities: Identity) -> list[Future[None]]:
    world = len(identities)
    store, port = host_store(LOOPBACK)
    stores = [store, *(join_store(LOOPBACK, port) for _ in range(world - 1))]
    with ThreadPoolExecutor(world) as pool:
        return [
            pool.submit(agree, Group(r, world, stores[r]), identity, PATIENCE_S)
            for r, identity in enumerate(identities)
        ]


def test_equal_ranks_agree() -> None:
    assert [done.result() for done in compare(SAME, SAME, SAME)] == [None] * 3


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        (
            replace(SAME, checkpoint={"config.json": "13 bytes, digest cd"}),
            CheckpointError,
            "config.json is 13 bytes, digest cd there and 12 bytes, digest ab here",
        ),
        (
            replace(SAME, checkpoint={**SAME.checkpoint, "model.safetensors": "1 bytes"}),
            CheckpointError,
            "model.safetensors is 1 bytes there and missing here",
        ),
        (
            replace(SAME, settings={"dtype": "float32"}),
            ConfigError,
            "started with dtype=float32, rank 0 with dtype=auto",
        ),
        (replace(SAME, plan="cafe"), PlacementError, "another placement plan .cafe. than rank 0"),
    ],
    ids=["file", "missing file", "setting", "plan"],
)
def test_a_rank_that_differs_is_refused_on_all_ranks_with_what_differs(
    other: Identity, kind: type[Exception], says: str
) -> None:
    first, second, odd = compare(SAME, SAME, other)
    with pytest.raises(kind, match=f"rank 2 .*{says}"):
        first.result()
    with pytest.raises(kind, match="rank 2 "):
        second.result()
    with pytest.raises(kind, match=r"rank [01] .* rank 2"):
        odd.result()


def test_a_checkpoint_is_known_by_its_small_files_and_its_weights_headers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(tiny_checkpoint("mixtral"), first)
    known = fingerprint(first)
    assert {"config.json", "model.safetensors"} <= known.keys()
    assert fingerprint(tiny_checkpoint("mixtral")) == known
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    weights = first / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    changed = fingerprint(first)
    assert {name for name in known if changed[name] != known[name]} == {
        "config.json",
        "model.safetensors",
    }
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="first"):
        fingerprint(first)
