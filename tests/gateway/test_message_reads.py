"""Messages of gRPC that never end: each has a limit, and where others wait a short one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from moeserve.errors import DeadlineError, InvalidRequestError
from moeserve.gateway.grpc import reads
from moeserve.gateway.grpc.guards import BusyPeers
from moeserve.gateway.grpc.reads import MessageReads

House = Any
PATIENCE_S = 60.0
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


class Call:
    """A call whose message arrives when it is told to."""

    def __init__(self) -> None:
        self.message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()

    async def read(self) -> Any:
        self.asked.set()
        return await self.message


async def test_slots_are_taken_in_turn_and_given_back() -> None:
    slots = MessageReads(slots=2)
    calls = [Call() for _ in range(4)]
    tasks = [asyncio.create_task(slots.first(call)) for call in calls]
    await asyncio.gather(*(call.asked.wait() for call in calls[:2]))
    await asyncio.sleep(0)
    assert [call.asked.is_set() for call in calls] == [True, True, False, False]
    for number, call in enumerate(calls):
        await asyncio.wait_for(call.asked.wait(), PATIENCE_S)
        call.message.set_result(number)
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3]


async def test_one_that_takes_long_goes_as_soon_as_another_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reads, "CONTENDED_S", 0.05)
    slots = MessageReads(slots=1)
    slow, quick = Call(), Call()
    first = asyncio.create_task(slots.first(slow))
    await slow.asked.wait()
    await asyncio.sleep(0.1)
    assert not first.done()  # alone it may take a minute
    second = asyncio.create_task(slots.first(quick))
    with pytest.raises(DeadlineError, match="did not arrive in time"):
        await asyncio.wait_for(first, PATIENCE_S)
    await asyncio.wait_for(quick.asked.wait(), PATIENCE_S)
    quick.message.set_result(b"x")
    assert await second == b"x"


async def test_a_call_that_ends_without_a_message_is_refused() -> None:
    call = Call()
    call.message.set_result(grpc.aio.EOF)
    with pytest.raises(InvalidRequestError, match="no message"):
        await MessageReads().first(call)


async def test_a_slot_comes_back_from_a_call_that_is_cancelled() -> None:
    slots = MessageReads(slots=1)
    holder, waiter, last = Call(), Call(), Call()
    holding = asyncio.create_task(slots.first(holder))
    await holder.asked.wait()
    waiting = asyncio.create_task(slots.first(waiter))
    await asyncio.sleep(0)
    for task in (waiting, holding):
        task.cancel()
    await asyncio.wait({waiting, holding})
    last.message.set_result(b"x")
    assert await asyncio.wait_for(slots.first(last), PATIENCE_S) == b"x"


def test_peers_are_busy_while_their_calls_run() -> None:
    busy = BusyPeers()
    with busy.calling("ipv4:127.0.0.1:50000") as welcome, busy.calling("ipv6:%5B::1%5D:50000"):
        assert welcome
        assert 50000 in busy
        with busy.calling("unix:"):
            assert 50000 in busy
    assert 50000 not in busy


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def text(word: str) -> bytes:
    return bytes([len(word)]) + word.encode()


def begun_call(declared: int, sent: bytes) -> bytes:
    """HTTP/2's greeting, and a call whose message is longer than what comes of it."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/moeserve.v1.Inference/Generate",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    head = b"".join(b"\0" + text(name) + text(value) for name, value in fields.items())
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, END_HEADERS, 1, head)
        + frame(DATA, 0, 1, struct.pack(">BI", 0, declared) + sent)
    )


def test_a_message_that_never_ends_ends_its_call(
    tiny: Path, open_house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "READ_S", 0.3)
    with open_house(tiny, num_blocks=64) as house:
        address = ("127.0.0.1", house.server.grpc_port)
        with socket.create_connection(address, timeout=PATIENCE_S) as stranger:
            stranger.sendall(begun_call(100_000, b"x" * 10))
            received, ended = b"", False
            while not ended:
                received += stranger.recv(65536)
                at = 0
                while len(received) - at >= 9:
                    size = int.from_bytes(received[at : at + 3], "big")
                    if len(received) - at < 9 + size:
                        break
                    kind, flags = received[at + 3], received[at + 4]
                    ended |= kind == HEADERS and bool(flags & END_STREAM)
                    at += 9 + size
                received = received[at:]
        assert house.tokens([72], 2)
