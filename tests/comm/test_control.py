"""The star around rank 0: messages arrive whole, strangers stay out, and a loss is told by name."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeserve.comm.control.channels import Follower, Leader, follow, lead, require_trust
from moeserve.comm.control.link import LARGEST, Link, Tls, Trust, accept, connect
from moeserve.comm.group import Group, host_store, join_store
from moeserve.errors import ConfigError, LateRankError, MoeserveError, UnauthenticatedError
from moeserve.pb import ep_pb2 as pb

PATIENCE_S = 20.0
SECRET = Trust(secret=b"known to the group alone")


def groups(world: int) -> list[Group]:
    """Of threads of this process."""
    store, port = host_store("127.0.0.1")
    stores = [store, *(join_store("127.0.0.1", port) for _ in range(world - 1))]
    return [Group(r, world, s, notify=lambda text: None) for r, s in enumerate(stores)]


@contextlib.contextmanager
def star(
    world: int, deadline_s: float = 5.0, trust: Sequence[Trust] | Trust = SECRET
) -> Iterator[tuple[Leader, list[Follower]]]:
    trusts = [trust] * world if isinstance(trust, Trust) else trust
    ranks = groups(world)
    with ThreadPoolExecutor(world) as pool:
        leads = pool.submit(lead, ranks[0], "127.0.0.1", trusts[0], deadline_s, PATIENCE_S)
        follows = [
            pool.submit(follow, g, trusts[g.rank], deadline_s, PATIENCE_S) for g in ranks[1:]
        ]
        leader, followers = leads.result(PATIENCE_S), [f.result(PATIENCE_S) for f in follows]
    try:
        yield leader, followers
    finally:
        leader.close()
        for follower in followers:
            follower.close()


def eventually(asked: Callable[[], MoeserveError | None]) -> LateRankError:
    give_up = time.monotonic() + PATIENCE_S
    while (error := asked()) is None:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    assert isinstance(error, LateRankError)
    return error


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=200_000), max_size=5))
def test_messages_arrive_whole_and_in_order(messages: list[bytes]) -> None:
    near, far = [Link(end) for end in connected_pair()]
    with contextlib.closing(near), contextlib.closing(far):
        sender = threading.Thread(target=lambda: [near.send(m, PATIENCE_S) for m in messages])
        sender.start()
        assert [far.receive(PATIENCE_S) for _ in messages] == messages
        sender.join(PATIENCE_S)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        return near, listening.accept()[0]


def test_orders_go_out_reports_come_back_and_the_end_is_told() -> None:
    with star(3) as (leader, followers):
        for step in range(20):
            for follower in followers:
                leader.send(follower.rank, b"order %d for %d" % (step, follower.rank))
            for follower in followers:
                order = follower.receive()
                assert order == b"order %d for %d" % (step, follower.rank)
                follower.send(b"done: " + order)
            reports = [leader.receive(f.rank, PATIENCE_S) for f in followers]
            assert reports == [b"done: order %d for %d" % (step, r) for r in (1, 2)]
        leader.close()
        assert [f.receive(PATIENCE_S) for f in followers] == [None, None]
        assert [f.alarm() for f in followers] == [None, None]
        assert leader.alarm() is None


def test_everybody_hears_what_everybody_does() -> None:
    with star(3, deadline_s=0.5) as (leader, followers):
        for rank, one in enumerate([leader, *followers]):
            one.heartbeat.activity = f"step {rank}".__str__
        give_up = time.monotonic() + PATIENCE_S
        wanted = "; ".join(f"rank {r} was last heard doing: step {r}" for r in range(3))
        while any(f.heartbeat.activity_of([0, 1, 2]) != wanted for f in followers):
            assert time.monotonic() < give_up
            time.sleep(0.01)


def test_a_rank_that_goes_is_named_everywhere_with_what_it_was_doing() -> None:
    with star(4) as (leader, followers):
        followers[1].heartbeat.activity = lambda: "layer 7 of step 12"
        give_up = time.monotonic() + PATIENCE_S
        while "layer 7" not in followers[0].heartbeat.activity_of([2]):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        heard: list[LateRankError] = []
        leader.heartbeat.subscribe(heard.append)
        followers[1].close()
        for one in (leader, followers[0], followers[2]):
            error = eventually(one.alarm)
            assert error.ranks == (2,)
            assert "rank 2 is gone" in error.message
            assert "layer 7 of step 12" in error.message
        with pytest.raises(LateRankError, match="rank 2"):
            leader.receive(2, PATIENCE_S)
        with pytest.raises(LateRankError, match="rank 2"):
            leader.send(1, b"order")
        with pytest.raises(LateRankError, match="rank 2"):
            followers[0].receive()
        assert [e.ranks for e in heard] == [(2,)]
        late: list[LateRankError] = []
        leader.heartbeat.subscribe(late.append)
        assert late == heard, "whoever listens later hears it at once"


def test_a_silent_rank_is_named_everywhere() -> None:
    ranks = groups(3)
    with ThreadPoolExecutor(3) as pool:
        leads = pool.submit(lead, ranks[0], "127.0.0.1", SECRET, 0.5, PATIENCE_S)
        follows = pool.submit(follow, ranks[1], SECRET, 0.5, PATIENCE_S)
        place = json.loads(ranks[2].all_gather("control", b"", PATIENCE_S)[0])
        mute = [
            connect(tuple(place), 2, channel, SECRET, PATIENCE_S)
            for channel in (pb.CHANNEL_STEPS, pb.CHANNEL_HEARTBEAT)
        ]
        leader, follower = leads.result(PATIENCE_S), follows.result(PATIENCE_S)
    try:
        for one in (leader, follower):
            error = eventually(one.alarm)
            assert error.ranks == (2,)
            assert "rank 2 has been silent for" in error.message
    finally:
        leader.close()
        follower.close()
        for link in mute:
            link.close()


def test_a_lost_leader_is_named_by_all_others() -> None:
    with star(3) as (leader, followers):
        leader.heartbeat.activity = lambda: "planning"
        leader.heartbeat._ended = True  # whoever dies tells nobody
        for link in (*leader._steps.values(), *leader.heartbeat._links.values()):
            link.socket.shutdown(socket.SHUT_RDWR)
        for follower in followers:
            assert eventually(follower.alarm).ranks == (0,)
            with pytest.raises(LateRankError, match="rank 0 is gone"):
                follower.receive()


def test_a_failure_is_told_with_its_reason_and_whom_it_blames() -> None:
    with star(4) as (leader, followers):
        followers[0].fail(LateRankError("rank 3 sent nothing for 5 s", [3]))
        for one in (leader, *followers):
            error = eventually(one.alarm)
            assert error.ranks == (3,)
            assert error.message == "rank 1 failed: rank 3 sent nothing for 5 s"
    with star(2) as (leader, followers):
        leader.fail(ConfigError("no such file"))
        error = eventually(followers[0].alarm)
        assert (error.ranks, error.message) == ((0,), "rank 0 failed: no such file")


def test_a_rank_that_is_told_to_stop_asks_rank_0() -> None:
    with star(2) as (leader, followers):
        asked = threading.Event()
        leader.heartbeat.subscribe(lambda error: None, asked.set)
        followers[0].heartbeat.ask_to_stop()
        assert asked.wait(PATIENCE_S)
        again = threading.Event()
        leader.heartbeat.subscribe(lambda error: None, again.set)
        assert again.is_set()


def test_a_report_that_does_not_come_is_late() -> None:
    with star(2) as (leader, _), pytest.raises(LateRankError, match=r"rank 1 has not reported"):
        leader.receive(1, 0.1)


def test_strangers_do_not_get_in_and_do_not_keep_others_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = groups(2)
    with ThreadPoolExecutor(2) as pool:
        leads = pool.submit(lead, ranks[0], "127.0.0.1", SECRET, 5.0, PATIENCE_S)
        host, port = json.loads(ranks[1].all_gather("control", b"", PATIENCE_S)[0])
        garbage = socket.create_connection((host, port))
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        garbage.close()
        gone = socket.create_connection((host, port))
        gone.close()
        for trust in (Trust(secret=b"guessed"), Trust()):
            with pytest.raises(UnauthenticatedError, match="does not know this group's secret"):
                connect((host, port), 1, pb.CHANNEL_STEPS, trust, PATIENCE_S)
        links = [
            connect((host, port), 1, channel, SECRET, PATIENCE_S)
            for channel in (pb.CHANNEL_STEPS, pb.CHANNEL_HEARTBEAT)
        ]
        leader = leads.result(PATIENCE_S)
    leader.close()
    for link in links:
        link.close()
    assert caplog.text.count("was refused") == 4


def test_the_side_that_accepts_checks_as_well() -> None:
    near, far = connected_pair()
    with ThreadPoolExecutor(1) as pool, contextlib.closing(near):
        accepting = pool.submit(accept, far, SECRET, PATIENCE_S)
        link = Link(near)
        hello = pb.Hello(rank=1, channel=pb.CHANNEL_STEPS, nonce=bytes(16))
        link.send(hello.SerializeToString(), PATIENCE_S)
        link.receive(PATIENCE_S)
        link.send(pb.Proof(proof=bytes(32)).SerializeToString(), PATIENCE_S)
        with pytest.raises(UnauthenticatedError, match="same ep_secret"):
            accepting.result(PATIENCE_S)


def test_a_message_beyond_the_bound_is_not_read() -> None:
    near, far = connected_pair()
    near.sendall((LARGEST + 1).to_bytes(4, "little"))
    link = Link(far)
    with contextlib.closing(near), contextlib.closing(link), pytest.raises(ConnectionAbortedError):
        link.receive(PATIENCE_S)


def test_a_rank_with_another_secret_is_told() -> None:
    ranks = groups(2)
    with ThreadPoolExecutor(2) as pool:
        leads = pool.submit(lead, ranks[0], "127.0.0.1", SECRET, 5.0, PATIENCE_S)
        with pytest.raises(
            ConfigError, match=r"do not trust one another.*same ep_secret"
        ) as caught:
            follow(ranks[1], Trust(secret=b"another"), 5.0, PATIENCE_S)
        ranks[1].give_up(caught.value.message)
        with pytest.raises(LateRankError, match=r"rank 1 gave up: .*same ep_secret"):
            leads.result(PATIENCE_S)


def test_beyond_loopback_a_secret_or_tls_is_required() -> None:
    with pytest.raises(ConfigError, match=r"10.0.0.1, which others can reach: set ep_tls, or"):
        require_trust("10.0.0.1", Trust())
    require_trust("10.0.0.1", SECRET)
    require_trust("127.0.0.1", Trust())


def both_ways_at_once(one: Link, other: Link) -> None:
    """Each end sends on one thread while it receives on another."""
    messages = [bytes([i]) * (1 + 4000 * i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        sent = [
            pool.submit(lambda end=end: [end.send(m, PATIENCE_S) for m in messages])
            for end in (one, other)
        ]
        came = [
            pool.submit(lambda end=end: [end.receive(PATIENCE_S) for _ in messages])
            for end in (one, other)
        ]
        assert [c.result(PATIENCE_S) == messages for c in came] == [True, True]
        assert [len(s.result(PATIENCE_S)) for s in sent] == [len(messages)] * 2


def certify(folder: Path, authority: str) -> Tls:
    """A rank's folder of certificates, by an authority made on the way."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates can be made")
    folder.mkdir()

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca, key = folder.parent / f"{authority}.pem", folder.parent / f"{authority}.key"
    if not ca.exists():
        made = ["req", "-x509", *curve, "-subj", f"/CN={authority}", "-days", "2"]
        words = ["openssl", *made, "-keyout", str(key), "-out", str(ca)]
        subprocess.run(words, check=True, capture_output=True, timeout=30)
    asked = ["openssl", "req", *curve, "-subj", "/CN=rank", "-keyout", "key.pem", "-out", "csr"]
    signed = ["openssl", "x509", "-req", "-in", "csr", "-CA", str(ca), "-CAkey", str(key)]
    signed += ["-CAcreateserial", "-days", "2", "-out", "cert.pem"]
    for words in (asked, signed):
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=30)
    shutil.copy(ca, folder / "ca.pem")
    return Tls.load(folder)


def test_mutual_tls_carries_orders_and_refuses_other_authorities(tmp_path: Path) -> None:
    ours = [Trust(tls=certify(tmp_path / name, "ours")) for name in ("a", "b")]
    with star(2, trust=ours) as (leader, followers):
        for size in (1, 100_000):
            leader.send(1, bytes(size))
            assert followers[0].receive(PATIENCE_S) == bytes(size)
            followers[0].send(bytes(size))
            assert leader.receive(1, PATIENCE_S) == bytes(size)
        both_ways_at_once(leader._steps[1], followers[0]._steps)  # type: ignore[attr-defined]
        assert "TLSv1.3" in str(leader._steps[1].socket.version())  # type: ignore[attr-defined]
    theirs = Trust(tls=certify(tmp_path / "c", "theirs"))
    ranks = groups(2)
    with ThreadPoolExecutor(1) as pool:
        leads = pool.submit(lead, ranks[0], "127.0.0.1", ours[0], 5.0, PATIENCE_S)
        with pytest.raises(ConfigError, match=r"do not trust one another: .*verify failed"):
            follow(ranks[1], theirs, 5.0, PATIENCE_S)
        ranks[1].give_up("other certificates")
        with pytest.raises(LateRankError, match="other certificates"):
            leads.result(PATIENCE_S)
    with pytest.raises(ConfigError, match=r"cert.pem, key.pem and ca.pem cannot be used"):
        Tls.load(tmp_path / "nowhere")
