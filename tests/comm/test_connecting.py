"""Ranks connect beside any number of strangers, and nothing that these send raises."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from moeserve.comm import connecting
from moeserve.comm.connecting import Address, Connector, listen
from moeserve.comm.exchange.tcp import connect as connect_exchange
from moeserve.comm.group import Group
from moeserve.comm.proofs import TOKEN_BYTES, Credentials, Handshake, Place, accepting, dialling
from moeserve.errors import ConfigError, LateRankError, UnauthenticatedError

LOOPBACK = "127.0.0.1"
MAGIC = b"movetest"
PATIENCE_S = 20.0
PLACE = Place(1, 0, 0)

Stranger = Callable[[Address, contextlib.ExitStack], None]


def groups(world: int) -> list[Group]:
    store = HashStore()
    return [Group(rank, world, store, notify=lambda text: None) for rank in range(world)]


def reach(at: Address, stack: contextlib.ExitStack, data: bytes = b"") -> socket.socket:
    stream = stack.enter_context(socket.create_connection((at.host, at.port), PATIENCE_S))
    with contextlib.suppress(OSError):
        stream.sendall(data)
    return stream


def hello(magic: bytes = MAGIC, dialler: int = 1, acceptor: int = 0, channel: int = 0) -> bytes:
    return struct.pack("<8sIII16s", magic, dialler, acceptor, channel, b"n" * 16)


def many_idle(at: Address, stack: contextlib.ExitStack) -> None:
    for _ in range(200):
        reach(at, stack)


def many_guesses(at: Address, stack: contextlib.ExitStack) -> None:
    """Each says the hello of the rank that is awaited, and then nothing."""
    for _ in range(200):
        reach(at, stack, hello())


def a_trickle(at: Address, stack: contextlib.ExitStack) -> None:
    stop = threading.Event()
    streams = [reach(at, stack) for _ in range(4)]

    def drip() -> None:
        for byte in hello() * 100:
            for stream in streams:
                with contextlib.suppress(OSError):
                    stream.send(bytes([byte]))
            if stop.wait(0.03):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)


def wrong_words(at: Address, stack: contextlib.ExitStack) -> None:
    most = 2**32 - 1
    for data in (
        b"GET / HTTP/1.1\r\nHost: somewhere.else\r\n\r\n",
        hello(b"moemesh1"),
        hello(dialler=most, acceptor=most, channel=most),
        hello(channel=most),
        hello(dialler=0),
        hello() + b"p" * 32,
        b"\xff" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ):
        reach(at, stack, data)


def half_closed(at: Address, stack: contextlib.ExitStack) -> None:
    for data in (b"", hello()[:10], hello()):
        with contextlib.suppress(OSError):
            reach(at, stack, data).shutdown(socket.SHUT_WR)


def reset(at: Address, stack: contextlib.ExitStack) -> None:
    for data in (b"", hello()[:10], hello()):
        stream = reach(at, stack, data)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


STRANGERS: list[Stranger] = [many_idle, many_guesses, a_trickle, wrong_words, half_closed, reset]


@contextlib.contextmanager
def acceptor(group: Group, deadline_s: float = PATIENCE_S) -> Iterator[tuple[Connector, Address]]:
    with contextlib.ExitStack() as stack:
        listening = listen(stack, LOOPBACK)
        token = secrets.token_bytes(TOKEN_BYTES)
        own = Credentials(MAGIC, token, b"secret")
        connector = Connector(group, listening, own, [PLACE], time.monotonic() + deadline_s)
        stack.callback(connector.close)
        yield connector, Address(LOOPBACK, listening.getsockname()[1], token)


@contextlib.contextmanager
def diallers(group: Group, at: Address) -> Iterator[Connector]:
    with contextlib.ExitStack() as stack:
        own = Credentials(MAGIC, b"", b"secret")
        listening = listen(stack, LOOPBACK)
        connector = Connector(group, listening, own, [], time.monotonic() + PATIENCE_S)
        stack.callback(connector.close)
        connector.dial(PLACE, at)
        yield connector


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_rank_gets_in_beside_strangers_that_came_first(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for one of them: here a handshake could take longer than the test."""
    monkeypatch.setattr(connecting, "_HANDSHAKE_S", 10 * PATIENCE_S)
    first, second = groups(2)
    with (
        contextlib.ExitStack() as stack,
        acceptor(first) as (connector, at),
        diallers(second, at) as dialler,
        ThreadPoolExecutor(2) as pool,
    ):
        stranger(at, stack)
        accepted = pool.submit(connector.complete, PATIENCE_S)
        dialled = pool.submit(dialler.complete, PATIENCE_S)
        ends = [accepted.result(PATIENCE_S)[PLACE], dialled.result(PATIENCE_S)[PLACE]]
        with ends[0], ends[1]:
            ends[1].send(b"it is me")
            ends[0].setblocking(True)
            assert ends[0].recv(8, socket.MSG_WAITALL) == b"it is me"
    assert "Traceback" not in caplog.text
    assert caplog.text.count("was refused") <= 10


def test_slow_ones_are_dropped_by_their_own_deadlines_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connecting, "_HANDSHAKE_S", 0.1)
    first, _ = groups(2)
    with contextlib.ExitStack() as stack:
        with acceptor(first, 1.0) as (connector, at):
            a_trickle(at, stack)
            silent = [reach(at, stack) for _ in range(20)]
            with pytest.raises(LateRankError, match="rank 1 did not connect in 1 s"):
                connector.complete(1.0)
        assert [stream.recv(1) for stream in silent] == [b""] * 20
    assert caplog.text.count("it did not finish its handshake in time") == 10
    assert "rank 0 refused 24 connections in all" in caplog.text


def test_a_rank_that_lost_its_place_dials_again() -> None:
    first, second = groups(2)
    with (
        contextlib.ExitStack() as stack,
        acceptor(first) as (connector, at),
        diallers(second, at) as dialler,
        ThreadPoolExecutor(2) as pool,
    ):
        dialled = pool.submit(dialler.complete, PATIENCE_S)
        for _ in range(2):
            stack.enter_context(accepted_by(connector)).close()
        accepted = pool.submit(connector.complete, PATIENCE_S).result(PATIENCE_S)
        for found in (accepted, dialled.result(PATIENCE_S)):
            found[PLACE].close()


def accepted_by(connector: Connector) -> socket.socket:
    """Its next connection, taken away from it."""
    listening = connector._listening
    listening.settimeout(PATIENCE_S)
    stream, _ = listening.accept()
    listening.setblocking(False)
    return stream


def test_an_exchange_of_sockets_connects_beside_strangers() -> None:
    ranks = groups(3)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        opening = [pool.submit(connect_exchange, g, "x", LOOPBACK) for g in ranks[:2]]
        deadline = time.monotonic() + PATIENCE_S
        store = ranks[0].store
        while not store.check(["x/address/count"]) or store.add("x/address/count", 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        notes = bytes(store.get("x/address/notes"))
        while notes:
            rank, size = struct.unpack_from("<II", notes)
            at = Address.read(notes[8 : 8 + size], rank)
            notes = notes[8 + size :]
            for stranger in STRANGERS:
                stranger(at, stack)
        opening.append(pool.submit(connect_exchange, ranks[2], "x", LOOPBACK))
        rows = [future.result(PATIENCE_S) for future in opening]
        for me, row in enumerate(rows):
            assert [stream is None for stream in row] == [rank == me for rank in range(3)]
            for stream in filter(None, row):
                stack.enter_context(stream)


NOTES = [
    b"",
    b"\xff",
    b"{}",
    b"[1, 2]",
    b'["127.0.0.1", 70000, "00"]',
    b'["127.0.0.1", -1, "00"]',
    b'["127.0.0.1", 1e400, "00"]',
    b'["127.0.0.1", 80, "xyz"]',
    b'["127.0.0.1", 80, 5]',
    b"[" * 100_000,
]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_is_no_address_names_its_rank(note: bytes) -> None:
    with pytest.raises(ConfigError, match="of rank 7") as caught:
        Address.read(note, 7)
    assert len(caught.value.message) < 250


def talk(dialler: Handshake, acceptor: Handshake) -> tuple[Place | None, Place | None]:
    """Both handshakes to their ends, over a channel that loses nothing."""
    found: list[Place | None] = [None, None]
    sides, wires = [dialler, acceptor], [b"", b""]
    turns = [next(dialler), next(acceptor)]
    wires[1] += turns[0].send
    active = True
    while active:
        active = False
        for me in (1, 0):
            need = turns[me].needed
            if found[me] is not None or len(wires[me]) < need:
                continue
            active = True
            data, wires[me] = wires[me][:need], wires[me][need:]
            try:
                turns[me] = sides[me].send(data)
                wires[1 - me] += turns[me].send
            except StopIteration as end:
                found[me] = end.value
    return found[0], found[1]


places = st.builds(Place, *[st.integers(0, 2**32 - 1)] * 3)


@given(places, st.binary(max_size=40), st.none() | st.binary(max_size=40))
def test_those_who_know_the_same_prove_the_same_place(
    place: Place, token: bytes, secret: bytes | None
) -> None:
    both = Credentials(MAGIC, token, secret)
    assert talk(dialling(both, place), accepting(both, lambda p: p == place)) == (place, place)


@given(st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8))
def test_those_who_know_something_else_prove_nothing(
    token: bytes, other_token: bytes, secret: bytes, other_secret: bytes
) -> None:
    mine, theirs = Credentials(MAGIC, token, secret), Credentials(MAGIC, other_token, other_secret)
    if mine == theirs:
        return
    with pytest.raises(UnauthenticatedError, match="same ep_secret"):
        talk(dialling(theirs, PLACE), accepting(mine, lambda p: True))


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60) | st.just(hello()), max_size=4), st.booleans())
def test_no_bytes_prove_anything_or_raise_anything_else(parts: list[bytes], dials: bool) -> None:
    mine = Credentials(MAGIC, b"token", None)
    side = dialling(mine, PLACE) if dials else accepting(mine, lambda p: p == PLACE)
    data = b"".join(parts)
    turn = next(side)
    with contextlib.suppress(ConnectionAbortedError, UnauthenticatedError):
        while len(data) >= turn.needed > 0:
            received, data = data[: turn.needed], data[turn.needed :]
            turn = side.send(received)
    assert turn.needed > 0


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
