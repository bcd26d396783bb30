"""Connections of gRPC give way by what the kernel says of their silence."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from moeserve.comm.control.idle_connections import IdleConnections

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's record of silence is Linux's"
)
Pairs = list[tuple[socket.socket, socket.socket]]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    """Eight connections to one port: client and server of each, the eldest first."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        found = []
        for _ in range(8):
            client = socket.create_connection(listening.getsockname(), timeout=30)
            served, _ = listening.accept()
            found.append((stack.enter_context(client), stack.enter_context(served)))
        yield found


def closed(pairs: Pairs) -> list[bool]:
    ended = []
    for client, _ in pairs:
        client.setblocking(False)
        try:
            ended.append(client.recv(1) == b"")
        except BlockingIOError:
            ended.append(False)
    return ended


def test_the_silent_give_way_and_the_busy_stay(pairs: Pairs) -> None:
    port = pairs[0][1].getsockname()[1]
    busy = {pairs[0][0].getsockname()[1], pairs[1][0].getsockname()[1]}
    # Room for six of eight: three quarters.
    watch = IdleConnections(port, 8, busy.__contains__)
    time.sleep(0.05)  # the kernel counts in ticks
    for client, served in pairs[4:]:  # these speak
        client.sendall(b"x")
        assert served.recv(1) == b"x"
    before = len(os.listdir("/proc/self/fd"))
    watch.evict()
    assert watch.evicted == 2
    assert closed(pairs) == [False, False, True, True, False, False, False, False]
    assert len(os.listdir("/proc/self/fd")) == before
    watch.evict()  # the sockets are still there, shut down; nothing of the living goes
    assert closed(pairs)[4:] == [False] * 4


def test_nobody_goes_where_all_are_busy_or_there_is_room(pairs: Pairs) -> None:
    port = pairs[0][1].getsockname()[1]
    for watch in (IdleConnections(port, 4, lambda _: True), IdleConnections(port, 11, bool)):
        watch.evict()
        assert watch.evicted == 0
    assert closed(pairs) == [False] * 8
