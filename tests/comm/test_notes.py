"""Notes of the start: what they hold, what bounds them, and whom rank 0 lets at them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import DistNetworkError, HashStore, TCPStore

from moeserve.comm.control.idle_connections import IdleConnections
from moeserve.comm.control.rpc import Tls, Trust, proof_metadata
from moeserve.comm.group import Group, PrefixedStore
from moeserve.comm.launch import note_store
from moeserve.comm.launch.environment import LOOPBACK, Launch
from moeserve.comm.launch.note_store import SERVICE, HostedStore, host_store, join_store
from moeserve.comm.launch.notes import NoteBounds, Notes
from moeserve.comm.launch.rendezvous import open_group
from moeserve.errors import ConfigError, UnavailableError
from moeserve.pb import notes_pb2 as pb

WAIT_S = 20.0
SECRET = Trust(secret=b"known to the group alone")
OTHER = Trust(secret=b"known to somebody else!!")
Certify = Callable[..., Tls]

KEYS = st.sampled_from(["a", "b", "c/d", "ü"])
VALUES = st.binary(max_size=6)
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1)),
)


@contextlib.contextmanager
def hosting(trust: Trust) -> Iterator[HostedStore]:
    store, _ = host_store(LOOPBACK, 0, WAIT_S, trust)
    try:
        yield store
    finally:
        store.close()


# What they hold.


@settings(max_examples=100, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_a_store_of_notes_is_a_store_of_torch(steps: list[tuple[Any, ...]]) -> None:
    """Whatever is asked of both, the one that torch brings with it is the oracle."""
    with hosting(SECRET) as hosted:
        ours, theirs = PrefixedStore("x", hosted), HashStore()
        for name, *words in steps:
            assert getattr(ours, name)(*words) == getattr(theirs, name)(*words)
        for key in ("a", "b", "c/d", "ü"):
            assert ours.check([key]) == theirs.check([key])
            if theirs.check([key]):
                assert ours.get(key) == theirs.get(key)


def test_both_ends_see_the_same_notes_and_numbers_add_up() -> None:
    with hosting(SECRET) as hosted:
        joined = [join_store(LOOPBACK, hosted.port, WAIT_S, SECRET) for _ in range(3)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda store: [store.add("n", 1) for _ in range(50)], [hosted, *joined]))
        assert [store.add("n", 0) for store in (hosted, *joined)] == [200] * 4
        joined[0].set("k", b"\xff\0")
        assert [bytes(store.get("k")) for store in (hosted, *joined)] == [b"\xff\0"] * 4
        assert joined[1].compare_set("k", b"other", b"new") == b"\xff\0"
        assert joined[1].compare_set("k", b"\xff\0", b"new") == b"new"


def test_a_note_is_awaited_and_one_that_does_not_come_is_named() -> None:
    with hosting(SECRET) as hosted:
        joined = join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(joined.get, "late"), pool.submit(hosted.wait, ["late"])]
            hosted.set("late", b"here")
            assert [one.result(WAIT_S) for one in waiting] == [b"here", None]
        with pytest.raises(DistNetworkError, match=r"no note under \['never'\] within 0.05 s"):
            joined.wait(["never", "late"][:1], timedelta(seconds=0.05))


def test_notes_are_bounded_and_what_is_beyond_changes_nothing(subtests: pytest.Subtests) -> None:
    notes = Notes(NoteBounds(most_keys=2, most_key_bytes=4, most_value_bytes=8, most_bytes=20))
    notes.set("a", b"1234")
    for key, value, says in [
        ("abcde", b"", "beyond 4 bytes of a key"),
        ("üüü", b"", "beyond 4 bytes of a key"),
        ("b", b"123456789", "beyond 8 bytes of a note"),
    ]:
        with subtests.test(says), pytest.raises(ConfigError, match=says):
            notes.set(key, value)
    notes.set("b", b"12345678")
    with pytest.raises(ConfigError, match="'a' is beyond 8 bytes of a note"):
        notes.append("a", b"56789")
    notes.append("a", b"5678")  # 2 bytes of keys and 16 of values
    with pytest.raises(ConfigError, match="beyond 2 notes"):
        notes.set("c", b"")
    assert notes.get("b") == b"12345678"
    small = Notes(NoteBounds(most_bytes=20))
    small.set("a", b"x" * 19)
    with pytest.raises(ConfigError, match="beyond 20 bytes of all notes"):
        small.set("b", b"")
    small.set("a", b"")
    small.set("b", b"x" * 18)


def test_whoever_asks_is_told_of_a_bound_and_of_a_note_that_is_no_number() -> None:
    with hosting(SECRET) as hosted:
        joined = join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)
        joined.set("k", b"word")
        for store in (hosted, joined):
            with pytest.raises(ConfigError, match="note 'k' is b'word', no number"):
                store.add("k", 1)
            with pytest.raises(ConfigError, match="beyond 16777216 bytes of a note"):
                store.set("k", bytes((16 << 20) + 1))
        assert joined.get("k") == b"word"


def test_the_end_of_who_keeps_them_is_noticed() -> None:
    with hosting(SECRET) as hosted:
        joined = join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)
        joined.set("k", b"")
    with pytest.raises(DistNetworkError):
        joined.get("k")
    with pytest.raises(UnavailableError):
        join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)


# Who is let at them.


def test_each_end_must_know_the_secret() -> None:
    with hosting(SECRET) as hosted:
        for wrong in (OTHER, Trust()):
            with pytest.raises(ConfigError, match="does not know this group's secret"):
                join_store(LOOPBACK, hosted.port, WAIT_S, wrong)
    with hosting(Trust()) as hosted, pytest.raises(ConfigError, match="same ep_secret"):
        join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)


def test_beyond_loopback_nobody_is_let_in_for_having_found_the_port() -> None:
    with pytest.raises(ConfigError, match="which others can reach: set ep_tls, or ep_secret"):
        host_store("0.0.0.0")
    with pytest.raises(ConfigError, match="which others can reach: set ep_tls, or ep_secret"):
        join_store("192.0.2.1", 1)
    for host in ("192.0.2.1", None):
        for rank in range(2):  # at once, though nobody listens there
            start = Launch(rank, 2, 0, 1, host, 1, "openmpi")
            with pytest.raises(ConfigError, match="which others can reach: set ep_tls"):
                open_group(start, environ={}, trust=Trust(), timeout_s=WAIT_S)


def test_with_certificates_only_whom_the_authority_has_signed(certify: Certify) -> None:
    rank_0, rank_1 = certify("rank0", "ours", "/CN=a"), certify("rank1", "ours", "/CN=b")
    stranger = certify("stranger", "theirs")
    with hosting(Trust(tls=rank_0)) as hosted:
        joined = join_store(LOOPBACK, hosted.port, WAIT_S, Trust(tls=rank_1))
        joined.set("k", b"v")
        assert hosted.get("k") == b"v"
        with pytest.raises(ConfigError, match="do not trust one another"):
            join_store(LOOPBACK, hosted.port, WAIT_S, Trust(tls=stranger))
        with pytest.raises(UnavailableError, match="set ep_tls on all ranks or on none"):
            join_store(LOOPBACK, hosted.port, WAIT_S, Trust())
        both = Trust(secret=b"known to the group alone", tls=rank_1)
        with pytest.raises(ConfigError, match="does not know this group's secret"):
            join_store(LOOPBACK, hosted.port, WAIT_S, both)
    with hosting(Trust()) as plain, pytest.raises(ConfigError, match="or none"):
        join_store(LOOPBACK, plain.port, WAIT_S, Trust(tls=rank_1))


# Strangers, who found the port.


def raw(port: int) -> grpc.Channel:
    return grpc.insecure_channel(f"{LOOPBACK}:{port}")


def code_of(channel: grpc.Channel, method: str, *, metadata: Any = (), data: bytes = b"") -> Any:
    call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
    try:
        call(data, timeout=WAIT_S, metadata=metadata)
    except grpc.RpcError as error:
        refused: Any = error
        return refused.code()
    return grpc.StatusCode.OK


def test_a_stranger_reads_and_writes_nothing() -> None:
    with hosting(SECRET) as hosted, raw(hosted.port) as channel:
        hosted.set("k", b"v")
        note = pb.NoteRequest(key="k", value=b"spoilt", more_keys=["k"]).SerializeToString()
        for method in ("Get", "Set", "Append", "Add", "Check", "CompareSet", "Other"):
            for shown in ((), proof_metadata(OTHER, b"run"), (("moeserve-proof", "x"),)):
                code = code_of(channel, method, metadata=shown, data=note)
                assert code is grpc.StatusCode.UNAUTHENTICATED
        assert code_of(channel, "Meet") is grpc.StatusCode.INVALID_ARGUMENT
        nonce = (("moeserve-nonce-bin", b"short"),)
        assert code_of(channel, "Meet", metadata=nonce) is grpc.StatusCode.INVALID_ARGUMENT
        assert hosted.get("k") == b"v"


def test_a_proof_is_of_no_use_in_another_run() -> None:
    with hosting(SECRET) as first, hosting(SECRET) as second:
        joined = join_store(LOOPBACK, first.port, WAIT_S, SECRET)
        with raw(second.port) as channel:
            note = pb.NoteRequest(key="k").SerializeToString()
            code = code_of(channel, "Set", metadata=joined.metadata, data=note)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert not second.check(["k"])


def test_the_store_of_torch_gets_nothing_from_it() -> None:
    """Who knows only what every launcher speaks."""
    with hosting(SECRET) as hosted:
        with pytest.raises(RuntimeError):
            TCPStore(LOOPBACK, hosted.port, None, False, timedelta(seconds=1), False)
        assert join_store(LOOPBACK, hosted.port, WAIT_S, SECRET).add("n", 1) == 1


def test_a_rank_meets_beside_strangers_who_say_nothing_or_a_little() -> None:
    """More of them than connections may be: those that are not of the run give way."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(note_store, "_most_connections", lambda: 24)
        hosted = stack.enter_context(hosting(SECRET))
        early = join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)
        early.set("early", b"")
        for number in range(60):
            stream = stack.enter_context(contextlib.closing(socket.socket()))
            stream.settimeout(WAIT_S)
            with contextlib.suppress(OSError):  # it has given way already
                stream.connect((LOOPBACK, hosted.port))
                stream.sendall([b"", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\0"][number % 3])
        starts = Launch(1, 2, 1, 2, LOOPBACK, hosted.port, "torch")
        with ThreadPoolExecutor(2) as pool:
            others = [
                pool.submit(
                    open_group,
                    start,
                    environ={},
                    store=store,
                    trust=SECRET,
                    timeout_s=WAIT_S,
                    notify=lambda text: None,
                )
                for start, store in ((starts, None), (zero(starts), hosted))
            ]
            assert [one.result(2 * WAIT_S).group.rank for one in others] == [1, 0]
        assert early.check(["early"])


def zero(start: Launch) -> Launch:
    return Launch(0, 2, 0, 2, start.host, start.port, start.launcher)


def test_calls_that_send_nothing_hold_up_nobody() -> None:
    """As many as there are threads, and more: of a stranger's call nothing is read."""
    with hosting(SECRET) as hosted, raw(hosted.port) as channel:
        quiet: Any = channel.stream_stream(f"/{SERVICE}/Set")
        nonce = (("moeserve-nonce-bin", bytes(16)),)
        meeting: Any = channel.stream_stream(f"/{SERVICE}/Meet")
        calls = [quiet(silence(), timeout=WAIT_S) for _ in range(20)]
        calls += [meeting(silence(), timeout=WAIT_S, metadata=nonce) for _ in range(20)]
        joined = join_store(LOOPBACK, hosted.port, WAIT_S, SECRET)
        assert [joined.add("n", 1) for _ in range(10)] == list(range(1, 11))
        for call in calls:
            call.cancel()


def silence() -> Iterator[bytes]:
    time.sleep(1.0)
    yield b""


def test_a_flood_of_calls_is_refused_while_ranks_gather() -> None:
    with hosting(SECRET) as hosted, raw(hosted.port) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Append")
        flood = [call.future(bytes(1000), timeout=WAIT_S) for _ in range(2000)]
        stores = [hosted, *(join_store(LOOPBACK, hosted.port, WAIT_S, SECRET) for _ in range(3))]
        with ThreadPoolExecutor(4) as pool:
            gathered = list(
                pool.map(lambda r: Group(r, 4, stores[r]).all_gather("k", b"%d" % r), range(4))
            )
        assert gathered == [[b"0", b"1", b"2", b"3"]] * 4
        refused = {one.code() for one in flood}
        assert refused <= {
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.CANCELLED,
        }


def test_who_watches_connections_ends_with_the_notes() -> None:
    over = threading.Event()
    watch = IdleConnections(1, 8, bool, "a test")
    thread = threading.Thread(target=watch.watch_until, args=(over,))
    thread.start()
    over.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()
