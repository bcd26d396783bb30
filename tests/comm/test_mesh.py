"""The mesh of ranks: the same records everywhere, and a loss is told by name."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from moeserve.comm.connecting import Address, Connector
from moeserve.comm.control.local_mesh import local_meshes
from moeserve.comm.control.mesh import Mesh, open_mesh
from moeserve.comm.control.mesh_twin import PythonMesh
from moeserve.comm.control.neighbours import (
    MAGIC,
    Neighbours,
    connect_neighbours,
    exchange_notes,
    places_ahead,
    places_behind,
)
from moeserve.comm.control.silence import SilenceDetector
from moeserve.comm.control.step_mesh import StepMesh
from moeserve.comm.group import Group
from moeserve.comm.launch.note_store import host_store
from moeserve.comm.native import native_half
from moeserve.comm.proofs import Credentials
from moeserve.errors import ConfigError, LateRankError, MoeserveError, UnavailableError

PATIENCE_S = 20.0
LOOPBACK = "127.0.0.1"
SECRET = b"known to the group alone"
HEADER = struct.Struct("<IIQ")
T = TypeVar("T")
R = TypeVar("R")

native, _ = native_half()
needs_native = pytest.mark.skipif(
    native is None or not hasattr(native, "Mesh"), reason="the mesh over sockets is native"
)
kinds = pytest.mark.parametrize(
    "kind",
    ["local", "python", *(pytest.param(k, marks=needs_native) for k in ("native", "mixed"))],
)
halves = pytest.mark.parametrize("kind", ["python", pytest.param("native", marks=needs_native)])


def groups(world: int, members: tuple[int, ...] = ()) -> list[Group]:
    """Of threads of this process."""
    store = HashStore()
    return [Group(r, world, store, members, notify=lambda text: None) for r in range(world)]


def all_at_once(do: Callable[[T], R], ranks: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(do, ranks, timeout=3 * PATIENCE_S))


@contextlib.contextmanager
def meshes(
    kind: str,
    world: int,
    record_bytes: int = 4,
    deadline_s: float = 20.0,
    members: tuple[int, ...] = (),
) -> Iterator[list[StepMesh]]:
    def opened(group: Group) -> StepMesh:
        if kind == "native" or world == 1:
            return open_mesh(
                group,
                record_bytes,
                deadline_s,
                address=LOOPBACK,
                secret=SECRET,
                timeout_s=PATIENCE_S,
            )
        in_python = kind == "python" or group.rank % 2 == 0
        half = PythonMesh if in_python else native.Mesh
        found = connect_neighbours(group, "mesh", LOOPBACK, SECRET, PATIENCE_S)
        mesh = Mesh(group, found, record_bytes, deadline_s, half)
        mesh.meet(group, PATIENCE_S)
        return mesh

    local = kind == "local"
    ranks = (
        list[StepMesh](local_meshes(world, record_bytes, deadline_s))
        if local
        else all_at_once(opened, groups(world, members))
    )
    try:
        yield ranks
    finally:
        ranks[0].end()
        for mesh in ranks:
            mesh.close()


def record(rank: int, number: int) -> bytes:
    return struct.pack("<HH", rank, number)


def one_round(ranks: Sequence[StepMesh], number: int = 0) -> None:
    for mesh in ranks:
        mesh.post(record(mesh.rank, number))
    for mesh in ranks:
        assert mesh.collect(PATIENCE_S) == b"".join(record(r, number) for r in range(len(ranks)))


def eventually(asked: Callable[[], T | None]) -> T:
    give_up = time.monotonic() + PATIENCE_S
    while not (found := asked()):
        assert time.monotonic() < give_up
        time.sleep(0.002)
    return found


@kinds
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(world=st.integers(1, 9), data=st.data())
def test_all_ranks_collect_the_same_records_in_order(
    kind: str, world: int, data: st.DataObject
) -> None:
    rounds = data.draw(st.integers(1, 30))
    size = data.draw(st.sampled_from([4, 5, 64, 3000]))
    pauses = data.draw(st.lists(st.integers(0, 2), min_size=7, max_size=7))
    with meshes(kind, world, size) as ranks:

        def run(mesh: StepMesh) -> list[bytes]:
            seen = []
            for number in range(rounds):
                mesh.post(record(mesh.rank, number).ljust(size, b"."))
                for pause in (0, 1):
                    time.sleep(pauses[(3 * mesh.rank + 5 * number + pause) % 7] / 2000)
                seen.append(mesh.collect(PATIENCE_S))
            return seen

        expected = [
            b"".join(record(r, n).ljust(size, b".") for r in range(world)) for n in range(rounds)
        ]
        assert all_at_once(run, ranks) == [expected] * world
        assert [mesh.stats.rounds for mesh in ranks] == [rounds] * world
        assert [mesh.alarm() for mesh in ranks] == [None] * world


@halves
@pytest.mark.parametrize("world", range(2, 10))
def test_a_round_costs_log_r_messages_and_each_record_once(kind: str, world: int) -> None:
    rounds, size = 20, 24
    with meshes(kind, world, size) as ranks:
        for number in range(rounds):
            for mesh in ranks:
                mesh.post(record(mesh.rank, number).ljust(size))
            for mesh in ranks:
                mesh.collect(PATIENCE_S)
        messages = rounds * (world - 1).bit_length()
        for mesh in ranks:
            assert mesh.stats.round_messages == messages
            carried = rounds * (world - 1) * size
            assert mesh.stats.round_bytes == carried + messages * HEADER.size


@kinds
def test_an_idle_rank_hears_of_a_round(kind: str) -> None:
    with meshes(kind, 8) as ranks:
        for number in range(5):
            first = ranks[(3 * number) % 8]
            others = [mesh for mesh in ranks if mesh is not first]
            assert not first.wait_begun(0.0)
            with ThreadPoolExecutor(8) as pool:
                waits = [pool.submit(mesh.wait_begun, PATIENCE_S) for mesh in others]
                first.post(record(first.rank, number))
                assert all(wait.result(PATIENCE_S) for wait in waits)
            assert all(mesh.wait_begun(0.0) for mesh in others), "it holds until they post"
            for mesh in others:
                mesh.post(record(mesh.rank, number))
            for mesh in ranks:
                mesh.collect(PATIENCE_S)
                assert not mesh.wait_begun(0.0)


@kinds
def test_a_rank_that_was_busy_is_heard_as_well(kind: str) -> None:
    """No rank has told of this round at once: those that post are taken for busy ones."""
    with meshes(kind, 6) as ranks:
        one_round(ranks)
        ranks[4].post(record(4, 1))
        assert all(mesh.wait_begun(PATIENCE_S) for mesh in ranks if mesh.rank != 4)


@kinds
def test_a_waiter_is_woken_once_for_each_call(kind: str) -> None:
    with meshes(kind, 2) as ranks, ThreadPoolExecutor(1) as pool:
        wait = pool.submit(ranks[0].wait_begun, PATIENCE_S)
        ranks[0].wake()
        assert wait.result(PATIENCE_S) is False
        ranks[0].wake()
        assert ranks[0].wait_begun(PATIENCE_S) is False, "a wake that came before counts"
        wait = pool.submit(ranks[0].wait_begun, PATIENCE_S)
        ranks[1].post(record(1, 0))
        assert wait.result(PATIENCE_S) is True, "and counts once"


@kinds
def test_a_failure_is_told_to_all_with_its_reason_and_whom_it_blames(kind: str) -> None:
    with meshes(kind, 5) as ranks:
        heard: list[list[LateRankError]] = [[] for _ in ranks]
        for mesh in ranks:
            mesh.subscribe(heard[mesh.rank].append)
        ranks[0].post(record(0, 0))
        ranks[3].fail("rank 3 failed: no such file", [3])
        for mesh in ranks:
            error = eventually(mesh.alarm)
            assert (error.message, error.ranks) == ("rank 3 failed: no such file", (3,))
            eventually(lambda mesh=mesh: heard[mesh.rank])
        with pytest.raises(LateRankError, match="no such file"):
            ranks[0].collect(PATIENCE_S)
        assert ranks[1].wait_begun(PATIENCE_S) is False
        ranks[2].fail("rank 2 failed: later", [2])
        ranks[2].end()
        late: list[LateRankError] = []
        ranks[2].subscribe(late.append)
        assert [e.message for e in late] == ["rank 3 failed: no such file"], (
            "at once, and the first"
        )
        assert [len(errors) for errors in heard] == [1] * 5
        assert not any(mesh.ended for mesh in ranks)


@kinds
def test_a_long_reason_is_cut_between_characters(kind: str) -> None:
    with meshes(kind, 3) as ranks:
        ranks[1].fail("ä" * 5000, range(3))
        for mesh in ranks:
            error = eventually(mesh.alarm)
            assert error.ranks == (0, 1, 2)
            assert set(error.message) == {"ä"}


@kinds
def test_ranks_that_leave_after_the_end_are_no_alarm(kind: str) -> None:
    with meshes(kind, 7) as ranks:
        one_round(ranks)
        ranks[4].end()
        assert all(eventually(lambda mesh=mesh: mesh.ended) for mesh in ranks)
        for mesh in ranks[:5]:
            mesh.close()
            mesh.close()
        ranks[5].post(record(5, 1))
        with pytest.raises(LateRankError, match=r"the run ended before .*ranks.* 4.* round 2"):
            ranks[5].collect(PATIENCE_S)
        assert ranks[6].wait_begun(PATIENCE_S) in (True, False)
        ranks[6].fail("too late", [6])
        assert [mesh.alarm() for mesh in ranks] == [None] * 7


@kinds
def test_what_was_agreed_before_the_end_is_still_collected(kind: str) -> None:
    for _ in range(20):
        with meshes(kind, 5) as ranks:

            def last(mesh: StepMesh) -> bytes:
                mesh.post(record(mesh.rank, 0))
                records = mesh.collect(PATIENCE_S)
                mesh.end()
                mesh.close()
                return records

            assert len(set(all_at_once(last, ranks))) == 1
            assert [mesh.alarm() for mesh in ranks] == [None] * 5


@kinds
def test_a_rank_that_leaves_before_the_end_is_named_with_what_it_was_doing(kind: str) -> None:
    with meshes(kind, 4, deadline_s=2.0) as ranks:
        ranks[2].set_activity("layer 7 of step 12")
        time.sleep(0.5)  # two heartbeats
        ranks[2].close()
        for mesh in (ranks[0], ranks[1], ranks[3]):
            error = eventually(mesh.alarm)
            assert error.ranks == (2,)
            assert "rank 2 is gone (" in error.message
            assert "rank 2 was last heard doing: layer 7 of step 12" in error.message
        ranks[2].post(record(2, 0))
        with pytest.raises(UnavailableError):
            ranks[2].collect(PATIENCE_S)


@kinds
def test_every_rank_hears_that_one_has_to_stop(kind: str) -> None:
    with meshes(kind, 4) as ranks:
        asked = [threading.Event() for _ in ranks]
        for mesh in ranks:
            mesh.subscribe(lambda error: None, asked[mesh.rank].set)
        ranks[1].ask_to_stop()
        assert all(event.wait(PATIENCE_S) for event in asked)
        again = threading.Event()
        ranks[3].subscribe(lambda error: None, again.set)
        assert again.is_set()
        assert all(mesh.stop_asked for mesh in ranks)
        assert [mesh.alarm() for mesh in ranks] == [None] * 4


@kinds
@pytest.mark.parametrize("absent", [[2], [0, 3, 6]])
def test_ranks_that_do_not_post_are_named(kind: str, absent: list[int]) -> None:
    with meshes(kind, 7) as ranks:
        one_round(ranks)
        present = [mesh for mesh in ranks if mesh.rank not in absent]
        for mesh in present:
            mesh.post(record(mesh.rank, 1))

        def collect(mesh: StepMesh) -> str:
            with pytest.raises(LateRankError) as caught:
                mesh.collect(0.1)
            assert caught.value.ranks == tuple(absent)
            return caught.value.message

        plural = "ranks 0, 3, 6" if len(absent) > 1 else "rank 2"
        expected = f"{plural} did not post round 2 within 0.1 s"
        assert set(all_at_once(collect, present)) == {expected}
        assert ranks[1].alarm() is None
        for rank in absent:
            ranks[rank].post(record(rank, 1))
        assert len({mesh.collect(PATIENCE_S) for mesh in ranks}) == 1, "late is not never"


@halves
def test_errors_name_ranks_as_the_run_does(kind: str) -> None:
    with meshes(kind, 3, members=(4, 6, 9)) as ranks:
        ranks[0].post(record(0, 0))
        ranks[2].post(record(2, 0))
        with pytest.raises(LateRankError, match="rank 6 did not post round 1") as caught:
            ranks[0].collect(0.05)
        assert caught.value.ranks == (6,)
        ranks[2].close()
        error = eventually(ranks[1].alarm)
        assert error.ranks == (9,)
        assert "rank 9 is gone (the connection was closed)" in error.message


@needs_native
def test_a_frozen_interpreter_is_not_silent() -> None:
    with meshes("native", 3, deadline_s=0.5) as ranks:
        ctypes.PyDLL(None).usleep(1_500_000)  # keeps the lock of the interpreter, in which all are
        one_round(ranks)
        assert [mesh.alarm() for mesh in ranks] == [None] * 3


@halves
def test_a_mesh_leaves_nothing_open(kind: str) -> None:
    with meshes(kind, 2) as ranks:
        one_round(ranks)
    before = (sorted(os.listdir("/proc/self/fd")), threading.active_count())
    for world in (2, 5, 8):
        with meshes(kind, world) as ranks:
            ranks[1].subscribe(lambda error: None)
            one_round(ranks)
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


class Ranks:
    """Processes of ``mesh_ranks.py``, and what they have said."""

    def __init__(self, world: int, deadline_s: float) -> None:
        self._store, port = host_store(LOOPBACK)
        script = Path(__file__).with_name("mesh_ranks.py")
        command = [sys.executable, str(script), str(port), str(world), str(deadline_s)]
        self.parent = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
        assert self.parent.stdout is not None
        self._out = self.parent.stdout
        self.pids: list[int] = []

    def line(self) -> str:
        assert select.select([self._out], [], [], 3 * PATIENCE_S)[0]
        return self._out.readline().decode().strip()

    def start(self) -> None:
        for _ in range(2):
            words = self.line().split()
            if words[0] == "started":
                self.pids = list(map(int, words[1:]))

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.parent.wait(PATIENCE_S)
        self._out.close()


@contextlib.contextmanager
def processes(world: int, deadline_s: float) -> Iterator[Ranks]:
    with contextlib.closing(Ranks(world, deadline_s)) as ranks:
        ranks.start()
        yield ranks


@needs_native
def test_a_killed_process_is_named_by_all_others() -> None:
    with processes(6, deadline_s=20.0) as ranks:
        os.kill(ranks.pids[3], signal.SIGKILL)
        said = sorted(json.loads(ranks.line()) for _ in range(5))
        assert [(rank, blamed) for rank, blamed, _ in said] == [(r, [3]) for r in (0, 1, 2, 4, 5)]
        assert all("rank 3 is gone (" in reason for *_, reason in said)


@needs_native
def test_a_stopped_process_is_named_by_all_and_by_itself_when_it_goes_on() -> None:
    with processes(5, deadline_s=2.0) as ranks:
        os.kill(ranks.pids[1], signal.SIGSTOP)
        said = sorted(json.loads(ranks.line()) for _ in range(4))
        assert [(rank, blamed) for rank, blamed, _ in said] == [(r, [1]) for r in (0, 2, 3, 4)]
        for *_, reason in said:
            assert "rank 1 has been silent for" in reason
            assert "rank 1 was last heard doing: rounds of rank 1" in reason
        os.kill(ranks.pids[1], signal.SIGCONT)
        rank, blamed, reason = json.loads(ranks.line())
        assert (rank, blamed) == (1, [1]), reason


@needs_native
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 3.0), st.sets(st.integers(1, 3))), min_size=1, max_size=60)
)
def test_silence_is_measured_as_its_twin_does(looks: list[tuple[float, set[int]]]) -> None:
    now = 0.0
    twin = SilenceDetector.begin([1, 2, 3], now, limit_s=1.0, period_s=0.25)
    silence = native.Silence([1, 2, 3], now, 1.0, 0.25)
    for gap, heard in looks:
        now += gap
        for rank in heard:
            twin.record(rank, now - gap / 3)
            silence.record(rank, now - gap / 3)
        assert dict(silence.late(now)) == twin.late(now)


@contextlib.contextmanager
def beside_a_raw_rank(kind: str) -> Iterator[tuple[StepMesh, socket.socket]]:
    """Rank 0's mesh of two, and the socket that rank 1 dialled it with."""
    half = PythonMesh if kind == "python" else native.Mesh
    first, second = groups(2)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect_neighbours, first, "mesh", LOOPBACK, None, PATIENCE_S)
        found = connect_neighbours(second, "mesh", LOOPBACK, None, PATIENCE_S)
        mesh = Mesh(first, connecting.result(PATIENCE_S), 4, 20.0, half)
    with found.dialled[0] as raw, found.accepted[0]:
        raw.setblocking(True)
        raw.sendall(message(1, bytes(4), 1))
        mesh.meet(first, PATIENCE_S)
        yield mesh, raw
        mesh.close()


def message(kind: int, body: bytes = b"", number: int = 0) -> bytes:
    return HEADER.pack(kind, len(body), number) + body


VIOLATIONS = {
    "no message at all": (b"GET / HTTP/1.1\r\n\r\n", r"a message of unknown kind \d+"),
    "an unknown kind": (message(9), "a message of unknown kind 9"),
    "too long an activity": (message(3, b"x" * 201), "a heartbeat of 201 bytes"),
    "an endless alarm": (HEADER.pack(4, 1 << 31, 0), "an alarm of 2147483648 bytes"),
    "an alarm about many": (message(4, struct.pack("<I", 1000)), "an alarm about 1000 ranks"),
    "an alarm without ranks": (message(4), "an alarm of 0 bytes"),
    "a longer record": (message(1, b"12345", 2), "records of 5 bytes"),
    "a round out of turn": (message(1, b"1234", 3), "round 3 while this one is at 1"),
    "the word of a far round": (message(2, b"", 9), "word of round 9"),
    "a question of nobody": (message(7, struct.pack("<II", 2, 1), 1), "a question of rank 2"),
    "a question too long": (message(7, b"x" * 9, 1), "a question of 9 bytes"),
    "an answer of nobody": (message(8, struct.pack("<III", 0, 1, 7), 1), "an answer of rank 7"),
    "an end with a body": (message(5, b"x"), "the end of 1 bytes"),
}


@halves
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_rank_that_breaks_the_rules_is_cut_off(kind: str, name: str) -> None:
    sent, reason = VIOLATIONS[name]
    with beside_a_raw_rank(kind) as (mesh, raw):
        raw.sendall(message(3, b"good so far") + sent)
        error = eventually(mesh.alarm)
        assert error.ranks == (1,)
        with pytest.raises(LateRankError, match=rf"rank 1 is gone \(it sent {reason}"):
            raise error
        assert "good so far" in error.message
        while raw.recv(1 << 16):
            pass


@halves
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.binary(max_size=40), st.integers(0, 3))
        | st.binary(max_size=60),
        max_size=12,
    )
)
def test_no_bytes_of_a_neighbour_do_harm(
    kind: str, parts: list[tuple[int, bytes, int] | bytes]
) -> None:
    with beside_a_raw_rank(kind) as (mesh, raw):
        mesh.post(b"mine")
        with contextlib.suppress(OSError):
            for part in parts:
                raw.sendall(part if isinstance(part, bytes) else message(*part))
            raw.shutdown(socket.SHUT_WR)
        assert eventually(lambda: mesh.alarm() is not None or mesh.ended)


def hello(rank: int, there: int, step: int) -> bytes:
    return struct.pack("<8sIII16s", b"moemesh1", rank, there, step, b"n" * 16)


def answer(stream: socket.socket) -> bytes:
    """Nothing where it was closed, also before all was read."""
    with contextlib.suppress(ConnectionResetError):
        return stream.recv(100)
    return b""


def test_strangers_do_not_get_in_and_do_not_keep_others_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = groups(2)
    token = bytes(32)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        opening = pool.submit(open_mesh, first, 4, 20.0, address=LOOPBACK, secret=SECRET)
        listening = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        note = json.dumps([LOOPBACK, listening.getsockname()[1], token.hex()])
        notes = exchange_notes(second, "mesh/address", note.encode(), [0], PATIENCE_S)
        host, port, there = json.loads(notes[0])

        def stranger(data: bytes) -> socket.socket:
            stream = stack.enter_context(socket.create_connection((host, port), PATIENCE_S))
            stream.sendall(data)
            return stream

        stranger(b"")  # stays, and says nothing
        stranger(b"").close()
        for data in (
            b"GET / HTTP/1.1\r\nHost: somewhere.else\r\n\r\n",
            hello(1, 1, 0),
            hello(0, 0, 0),
            hello(1, 0, 1),
            hello(7, 0, 0),
        ):
            assert answer(stranger(data)) == b""
        guess = stranger(hello(1, 0, 0))
        assert len(answer(guess)) == 48
        guess.sendall(b"p" * 32)
        assert answer(guess) == b""
        refused = "a connection to rank 0 was refused"
        eventually(lambda: caplog.text.count(refused) == 7)

        give_up = time.monotonic() + PATIENCE_S
        (ahead,), (behind,) = places_ahead(second), places_behind(second)
        own = Credentials(MAGIC, token, SECRET)
        connector = Connector(second, listening, own, [behind], give_up)
        connector.dial(ahead, Address(host, port, bytes.fromhex(there)))
        found = connector.complete(PATIENCE_S)
        mesh = Mesh(second, Neighbours((found[ahead],), (found[behind],)), 4, 20.0, PythonMesh)
        mesh.meet(second, PATIENCE_S)
        both = [opening.result(PATIENCE_S), mesh]
        one_round(both)
        for mesh in both:
            mesh.end()
            mesh.close()


def test_a_rank_with_another_secret_is_told() -> None:
    ranks = groups(3)

    def refused(group: Group) -> MoeserveError:
        secret = b"another" if group.rank == 1 else SECRET
        with pytest.raises(MoeserveError) as caught:
            open_mesh(group, 4, 20.0, address=LOOPBACK, secret=secret, timeout_s=PATIENCE_S)
        group.give_up(caught.value.message)
        return caught.value

    errors = all_at_once(refused, ranks)
    assert isinstance(errors[0], ConfigError | LateRankError)
    assert isinstance(errors[1], ConfigError | LateRankError)
    assert any("do not trust one another" in error.message for error in errors)
    assert all("same ep_secret" in error.message for error in errors)


def test_a_rank_that_does_not_connect_is_named() -> None:
    ranks = groups(4)
    ranks[2].store.set("mesh/address/2", json.dumps([LOOPBACK, 1, "00"]))

    def late(group: Group) -> LateRankError:
        with pytest.raises(LateRankError) as caught:
            open_mesh(group, 4, 20.0, address=LOOPBACK, timeout_s=0.5)
        return caught.value

    for error in all_at_once(late, [ranks[0], ranks[1], ranks[3]]):
        assert 2 in error.ranks


def test_a_rank_alone_needs_neither_threads_nor_sockets() -> None:
    threads = threading.active_count()
    (group,) = groups(1)
    mesh = open_mesh(group, 4, 5.0)
    one_round([mesh])
    assert not mesh.wait_begun(0.0)
    assert threading.active_count() == threads
    assert not isinstance(mesh, Mesh)
    mesh.close()


def test_without_the_native_half_its_twin_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.comm.control.mesh.native_half", lambda: (None, "no compiler"))
    with meshes("native", 3) as ranks:
        one_round(ranks)


def test_why_a_rank_failed_to_come_is_told_to_those_that_are_ready() -> None:
    """Rank 1 has connected when it gives up: its neighbours see first that it is gone."""
    ranks = groups(5)

    def refused(group: Group) -> str:
        with pytest.raises(LateRankError) as caught:
            open_mesh(group, 4, 20.0, address=LOOPBACK, secret=SECRET, timeout_s=PATIENCE_S)
        return caught.value.message

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(refused, group) for group in ranks if group.rank != 1]
        found = connect_neighbours(ranks[1], "mesh", LOOPBACK, SECRET, PATIENCE_S)
        for stream in (*found.dialled, *found.accepted):
            stream.close()
        time.sleep(0.3)
        ranks[1].give_up("no memory left")
        said = {other.result(PATIENCE_S) for other in others}
    assert said == {"rank 1 gave up: no memory left"}
