"""Ranks meet: each reaches all others, and those that do not trust one another end at the start."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from moeserve.comm.control.rpc import Tls, Trust
from moeserve.comm.group import Group
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.engine.ranks import meeting as meeting_module
from moeserve.engine.ranks.meeting import RankMeeting
from moeserve.engine.ranks.rank_links import Unheard
from moeserve.errors import ConfigError, MoeserveError, UnavailableError

WAIT_S = 20.0
SECRET = Trust(secret=b"known to the group alone")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Runs on a thread of its own, as a door's does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


def names(rank: int) -> grpc.GenericRpcHandler:
    async def counted(request: bytes, context: Any) -> bytes:
        return b"rank %d" % rank

    methods: dict[str, Any] = {"Counted": grpc.unary_unary_rpc_method_handler(counted)}
    return grpc.method_handlers_generic_handler("moeserve.rank.RankService", methods)


def meet(
    loop: asyncio.AbstractEventLoop,
    trusts: Sequence[Trust],
    then: Callable[[RankMeeting], object] = lambda meeting: None,
) -> list[object]:
    """What each rank has of it: of ``then``, or the error it ends with."""
    store, port = host_store("127.0.0.1")
    stores = [store, *(join_store("127.0.0.1", port) for _ in trusts[1:])]
    world = len(trusts)
    done = threading.Barrier(world)

    def run(rank: int) -> object:
        group = Group(rank, world, stores[rank], patience_s=WAIT_S, notify=lambda text: None)
        meeting = RankMeeting(loop, group, "127.0.0.1", trusts[rank])
        server, found = None, None
        try:
            server = meeting.open(names(rank))
            found = then(meeting)
        except MoeserveError as error:
            found = error
        done.wait(WAIT_S)
        if server is not None:
            meeting.call(lambda: server.stop(1.0))
        return found

    with ThreadPoolExecutor(world) as pool:
        return [one.result(2 * WAIT_S) for one in [pool.submit(run, r) for r in range(world)]]


def answers(meeting: RankMeeting) -> list[bytes]:
    """Of all ranks, this one too."""

    async def ask() -> list[bytes]:
        found = []
        for rank in range(meeting.group.world):
            link = meeting.link(rank, Unheard())
            found.append(await link.call("Counted", b"", WAIT_S))
            await link.close()
        return found

    return meeting.call(ask)


@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_reach_all_ranks(loop: asyncio.AbstractEventLoop, world: int) -> None:
    for trust in (Trust(), SECRET):
        found = meet(loop, [trust] * world, answers)
        assert found == [[b"rank %d" % rank for rank in range(world)]] * world


def test_a_rank_with_another_secret_is_told_and_so_are_all(
    loop: asyncio.AbstractEventLoop,
) -> None:
    found = meet(loop, [SECRET, SECRET, Trust(secret=b"another"), SECRET])
    assert [type(one) for one in found] == [ConfigError] * 4
    assert str(found[0]) == str(found[3]) == f"rank 1 does not reach its neighbour: {found[1]}"
    assert "rank 2: the caller is not of this run: give all ranks the same ep_secret" in str(
        found[1]
    )
    assert "rank 3: the caller is not of this run" in str(found[2])


def test_ranks_with_certificates_meet_and_others_end(
    loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates can be made")
    ours, theirs = (
        Trust(tls=own_authority(tmp_path / "a")),
        Trust(tls=own_authority(tmp_path / "b")),
    )
    assert meet(loop, [ours, ours], answers) == [[b"rank 0", b"rank 1"]] * 2
    mixed = meet(loop, [ours, SECRET, ours])
    assert {type(one) for one in mixed} == {ConfigError}
    assert {str(one) for one in mixed} == {
        "ranks [1] of 3 have no ep_tls: set it on all ranks or on none"
    }
    strangers = meet(loop, [ours, theirs])
    assert {type(one) for one in strangers} == {ConfigError}
    assert "rank 1: it and this rank do not trust one another" in str(strangers[0])


def own_authority(folder: Path) -> Tls:
    """A certificate that has signed itself, and trusts no other."""
    folder.mkdir()
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    made += ["-nodes", "-subj", "/CN=rank", "-days", "2", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True, timeout=30)
    shutil.copy(folder / "cert.pem", folder / "ca.pem")
    return Tls.load(folder)


def test_a_loop_that_does_not_answer_is_an_error(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting_module, "SOON_S", 0.05)
    stuck = asyncio.Event()

    def ask(meeting: RankMeeting) -> bool:
        return meeting.call(stuck.wait)

    group = Group(0, 1, host_store("127.0.0.1")[0])
    with pytest.raises(UnavailableError, match=r"the event loop has not answered"):
        ask(RankMeeting(loop, group, "127.0.0.1", Trust()))
