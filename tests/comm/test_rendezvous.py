"""Ranks meet, learn who shares a host, and whoever does not fit is refused on all of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.group import START_S, Group, backing_off
from moeserve.comm.launch.environment import LOOPBACK, Launch
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.comm.launch.rendezvous import (
    HOST_ID,
    START_CPU_S,
    Rendezvous,
    host_identity,
    listen_address,
    open_group,
    own_address,
    patience_of,
    refuse,
)
from moeserve.errors import CheckpointError, ConfigError, LateRankError, PlacementError
from moeserve.host import allowed_cores
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
    store = TCPStore(LOOPBACK, 0, None, True, timedelta(seconds=PATIENCE_S), False)
    port = store.port
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


def test_ranks_that_share_cores_are_waited_for_as_long_as_they_take_to_start() -> None:
    few, many = launches(1)[0], launches(64)[0]
    cores = len(allowed_cores())
    assert patience_of(few) == START_S + START_CPU_S / cores
    assert patience_of(many) == START_S + 64 * START_CPU_S / cores
    assert patience_of(replace(many, local_world=None)) == patience_of(few)


# Notes of all ranks.


class CountingStore:
    """A rank's own connection; ``asked`` is what it was asked for, and under which key."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.asked: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        def ask(key: Any, *more: Any) -> Any:
            self.asked.append((name, str(key)))
            return getattr(self._store, name)(key, *more)

        return ask


def stores_of(world: int) -> list[Any]:
    store, port = host_store(LOOPBACK)
    return [store, *(join_store(LOOPBACK, port) for _ in range(world - 1))]


@pytest.mark.parametrize("world", [2, 16])
def test_who_comes_last_asks_the_store_three_times_whatever_the_number_of_ranks(world: int) -> None:
    stores = stores_of(world)
    last = CountingStore(stores[-1])
    ranks = [Group(r, world, store) for r, store in enumerate([*stores[:-1], last])]
    with ThreadPoolExecutor(world) as pool:
        first = [pool.submit(rank.all_gather, "k", b"%d" % rank.rank) for rank in ranks[:-1]]
        while ranks[0].store.add("k/count", 0) < world - 1:
            time.sleep(0.001)
        gathered = [pool.submit(ranks[-1].all_gather, "k", b"last").result(PATIENCE_S)]
        gathered += [one.result(PATIENCE_S) for one in first]
    assert gathered == [[*(b"%d" % r for r in range(world - 1)), b"last"]] * world
    assert last.asked == [("append", "k/notes"), ("add", "k/count"), ("get", "k/notes")]


@settings(max_examples=20, deadline=None)
@given(notes=st.lists(st.binary(max_size=40), min_size=1, max_size=5), data=st.data())
def test_notes_of_any_bytes_come_in_order_of_ranks_whoever_comes_first(
    notes: list[bytes], data: st.DataObject
) -> None:
    store, world = HashStore(), len(notes)
    order = data.draw(st.permutations(range(world)))
    seen: dict[int, list[int]] = {r: [] for r in range(world)}
    with ThreadPoolExecutor(world) as pool:
        gathered = {
            r: pool.submit(
                Group(r, world, store).all_gather,
                "k",
                notes[r],
                PATIENCE_S,
                lambda rank, note, r=r: seen[r].append(rank),
            )
            for r in order
        }
        assert [gathered[r].result() for r in range(world)] == [notes] * world
    assert [sorted(seen[r]) for r in range(world)] == [list(range(world))] * world


def test_a_note_is_checked_while_others_are_late() -> None:
    store = HashStore()

    def refuses(rank: int, note: bytes) -> None:
        if note == b"wrong":
            raise ConfigError(f"rank {rank} is wrong")

    with ThreadPoolExecutor(2) as pool:
        wrong = pool.submit(Group(1, 3, store).all_gather, "k", b"wrong", 1.0)
        with pytest.raises(ConfigError, match="rank 1 is wrong"):
            Group(0, 3, store).all_gather("k", b"", PATIENCE_S, refuses)
        with pytest.raises(LateRankError, match="rank 2 did not reach 'k' within 1 s"):
            wrong.result()


def test_who_gives_up_ends_the_wait_of_others_and_is_named() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Group(0, 2, store).all_gather, "k", b"", PATIENCE_S)
        Group(1, 2, store).give_up("no memory")
        with pytest.raises(LateRankError, match="rank 1 gave up: no memory") as caught:
            waiting.result()
    assert caught.value.ranks == (1,)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_notes_that_no_rank_has_left_are_refused_or_passed_over(
    before: bytes, given_up: bytes
) -> None:
    """Whoever reaches the store can write to it."""
    store = HashStore()
    store.append("k/notes", before)  # type: ignore[attr-defined]
    store.add("k/count", 1)
    if given_up:
        store.set("given up", given_up)  # type: ignore[arg-type]
    with contextlib.suppress(ConfigError, LateRankError):
        Group(0, 2, store).all_gather("k", b"mine", 0.0)


def test_an_arrival_that_is_none_is_refused() -> None:
    for note in (b"\xff", b"\x0a\xff", b"GET / HTTP/1.1"):
        starts = launches(2)
        store, _ = host_store(LOOPBACK, starts[0].port or 0)
        shared = PrefixStore(f"moeserve/{starts[0].attempt}", store)
        spoil = Group(1, 2, shared)
        with ThreadPoolExecutor(1) as pool:
            spoiling = pool.submit(spoil.all_gather, "arrival", note, PATIENCE_S)
            with pytest.raises(ConfigError, match="no arrival of rank 1"):
                open_group(starts[0], environ={}, store=store, timeout_s=PATIENCE_S)
            with contextlib.suppress(LateRankError):
                spoiling.result()


def test_the_end_of_who_keeps_the_notes_is_named() -> None:
    store, port = host_store(LOOPBACK)
    other = Group(1, 2, join_store(LOOPBACK, port))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.all_gather, "k", b"", PATIENCE_S)
        while store.add("k/count", 0) < 1:
            time.sleep(0.001)
        del store
        with pytest.raises(LateRankError, match="k: the rank that keeps the notes has ended"):
            waiting.result()


@settings(max_examples=50)
@given(waited_s=st.floats(0.001, 1000.0))
def test_looks_grow_slowly_with_the_wait_and_overshoot_it_by_half(waited_s: float) -> None:
    total_s, looks = 0.0, 0
    for pause_s in backing_off(0.001, 0.1):
        if total_s >= waited_s:
            break
        total_s, looks = total_s + pause_s, looks + 1
        assert pause_s <= 0.1
    assert total_s <= 1.5 * waited_s + 0.001
    assert looks <= 13 + waited_s / 0.1


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


def test_equal_ranks_agree_and_read_nobodys_whole_identity() -> None:
    stores = list(map(CountingStore, stores_of(2)))
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(agree, Group(r, 2, s), SAME) for r, s in enumerate(stores)]
        assert [one.result() for one in done] == [None] * 2
    for store in stores:
        whole = [what for what, key in store.asked if key.startswith("identity/whole")]
        assert whole == ["set"]
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
