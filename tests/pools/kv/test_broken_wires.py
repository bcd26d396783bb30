"""Connections that break, freeze or change bytes between two ranks, and callers who leave or talk
nonsense: tokens are right, and nothing is held afterwards on either side."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from toy_house import alone
from toy_peer import RUN, SHARED, WAIT_S, Peer, ended, peer, request, until

from moeserve.comm.control.rpc import Trust, open_channel, proof_metadata
from moeserve.engine.ranks.messages import write_submission
from moeserve.engine.sequence import NEW, KvSource
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.digests import geometry_of
from moeserve.pools.kv.frames import Side, seal
from moeserve.pools.kv.memory import SlotMemory
from moeserve.pools.kv.serve import SERVICE

ASK = request("wired", 60)


@dataclass
class Wire:
    """Carries bytes to a server and back, and does one thing to what comes back at byte ``at``."""

    port: int
    what: str
    at: int
    passed: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def source(self) -> AsyncIterator[KvSource]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield KvSource(f"127.0.0.1:{port}")
        finally:
            server.close()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far, near = await asyncio.open_connection("127.0.0.1", self.port)
        writers = (writer, near)
        self.tasks.append(asyncio.create_task(self._carry(reader, near, writers, harm=False)))
        self.tasks.append(asyncio.create_task(self._carry(far, writer, writers, harm=True)))

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        all_writers: tuple[asyncio.StreamWriter, ...],
        *,
        harm: bool,
    ) -> None:
        try:
            while data := await reader.read(2048):
                if harm:
                    data = await self._harm(data)
                writer.write(data)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            for one in all_writers:
                one.close()

    async def _harm(self, data: bytes) -> bytes:
        at, self.passed = self.at - self.passed, self.passed + len(data)
        if not 0 <= at < len(data):
            return data
        if self.what == "flip":
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        if self.what == "freeze":
            await asyncio.sleep(WAIT_S)
        raise EOFError


@pytest.mark.long
@pytest.mark.parametrize("what", ["cut", "freeze", "flip"])
async def test_a_wire_that_fails_anywhere(what: str) -> None:
    want = alone(ASK).tokens
    draw = random.Random(7)
    places = [draw.randrange(0, 9000) for _ in range({"flip": 24, "cut": 10, "freeze": 3}[what])]
    async with peer() as a:
        for at in places:
            async with peer(block_size=6) as b, Wire(a.port, what, at).source() as source:
                sink = b.ask(ASK, source)
                await ended(sink)
                assert sink.tokens == want, at
                await b.vacant()
                await a.vacant()
                lost, wrong = b.counters.sources_lost, b.counters.bad_digests
                if what != "flip":
                    assert sum(lost.values()) <= 1
                    assert b.counters.fetched + b.counters.recomputed == 60
                else:
                    assert wrong <= 1 or lost


async def test_the_next_source_goes_on_where_the_first_one_failed() -> None:
    async with peer(chunk=64) as a, peer() as c, peer() as b:
        wire = Wire(a.port, "cut", 4000)
        async with wire.source() as source:
            sink = b.ask(ASK, source, c.source)
            await ended(sink)
        assert sink.tokens == alone(ASK).tokens
        assert sum(b.counters.sources_lost.values()) == 1
        for one in (a, b, c):
            await one.vacant()


def first_message(to: Peer, **changes: Any) -> pb.ToSource:
    wanted = pb.Wanted(
        compute_id=to.terms.compute_id, geometry=geometry_of(to.house.layouts), **changes
    )
    write_submission(wanted.submission, ASK, NEW, 0.0)
    return pb.ToSource(wanted=wanted)


@contextlib.asynccontextmanager
async def stranger(to: Peer) -> AsyncIterator[Any]:
    """A call that the test writes and reads by itself."""
    channel = open_channel("127.0.0.1", to.port, Trust(), "")
    try:
        begin: Any = channel.stream_stream(f"/{SERVICE}/Fetch")
        call = begin(metadata=proof_metadata(Trust(), RUN), timeout=WAIT_S)
        yield call
        call.cancel()
    finally:
        await channel.close()


async def status(call: Any) -> grpc.StatusCode:
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize("reads", [0, 1, 3, 8])
async def test_who_leaves_leaves_nothing_behind(reads: int) -> None:
    async with peer(step_s=0.005, chunk=4) as a:
        async with stranger(a) as call:
            frame = seal(Side.RECEIVER, 0, first_message(a).SerializeToString())
            await call.write(frame)
            for _ in range(reads):
                await call.read()
        await a.vacant()


async def test_who_takes_nothing_is_left() -> None:
    """Not a byte is read, and the prompt has more than the windows of a connection hold."""
    sizes = (8, 512, 512)
    async with peer(chunk=64, sizes=sizes, blocks=24, layers=6) as a, stranger(a) as call:
        frame = seal(Side.RECEIVER, 0, first_message(a).SerializeToString())
        await call.write(frame)
        await until(lambda: a.counters.serving == 1)
        await a.vacant()


BAD = {
    "no frame": b"hello",
    "empty": b"",
    "no message": seal(Side.RECEIVER, 0, b"\xff\xff\xff"),
    "nothing wanted": seal(Side.RECEIVER, 0, b""),
    "the other side": seal(Side.SOURCE, 0, b""),
    "the wrong number": seal(Side.RECEIVER, 1, b""),
    "done": seal(Side.RECEIVER, 0, pb.ToSource(done=pb.Done()).SerializeToString()),
}


async def test_first_words_that_mean_nothing() -> None:
    async with peer() as a:
        wanted = {
            "more than all": first_message(a, have=60),
            "a vast number": first_message(a, have=1 << 60),
            "nobody runs": first_message(a, running="nobody"),
        }
        other = first_message(a)
        other.wanted.geometry = b"other"
        far = first_message(a)
        far.wanted.submission.prompt.append(1 << 31)
        frames = BAD | {
            name: seal(Side.RECEIVER, 0, message.SerializeToString())
            for name, message in (wanted | {"unlike": other, "no token": far}).items()
        }
        for name, frame in frames.items():
            async with stranger(a) as call:
                await call.write(frame)
                code = await status(call)
                assert code in (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.DATA_LOSS,
                    grpc.StatusCode.NOT_FOUND,
                ), name
        async with stranger(a) as call:
            await call.done_writing()
            assert await status(call) is grpc.StatusCode.INVALID_ARGUMENT
        async with stranger(a) as call:
            assert await status(call) is grpc.StatusCode.UNAVAILABLE, "it says nothing at all"
        assert a.house.histories == []
        await a.vacant()


@pytest.mark.parametrize(
    "words",
    [
        pb.ToSource(again=pb.Again(layer=9, start=0, count=4)),
        pb.ToSource(again=pb.Again(layer=0, start=0, count=1 << 31)),
        pb.ToSource(again=pb.Again(layer=0, start=4, count=0)),
        pb.ToSource(stop=pb.Stop()),
        pb.ToSource(wanted=pb.Wanted()),
        pb.ToSource(),
    ],
    ids=lambda words: str(words.WhichOneof("what")),
)
async def test_words_that_are_not_due(words: pb.ToSource) -> None:
    async with peer(step_s=0.02, chunk=4) as a, stranger(a) as call:
        await call.write(seal(Side.RECEIVER, 0, first_message(a).SerializeToString()))
        await call.read()
        await call.write(seal(Side.RECEIVER, 1, words.SerializeToString()))
        assert await status(call) is grpc.StatusCode.INVALID_ARGUMENT
        await a.vacant()


@pytest.mark.parametrize(
    "memory",
    [
        pb.Memory(),
        pb.Memory(pid=1, fd=0, cookie=bytes(32), slots=2, slot_bytes=4096),
        pb.Memory(pid=2**31, fd=2**31, cookie=bytes(32), slots=2, slot_bytes=4096),
        pb.Memory(cookie=bytes(32), slots=1 << 30, slot_bytes=1 << 60),
        "shorter",
        "another",
    ],
    ids=["nothing", "not ours", "nowhere", "vast", "shorter than said", "another cookie"],
)
async def test_memory_that_is_not_there_is_not_used(memory: Any) -> None:
    """The bytes come in messages."""
    async with peer() as a:
        async with stranger(a) as call:
            own = None
            if isinstance(memory, str):
                own = SlotMemory(2, 1 << 16)
                offer = own.offer()
                if memory == "shorter":
                    offer.slots = 3
                else:
                    offer.cookie = bytes(32)
                memory = offer
            message = first_message(a, memory=memory)
            await call.write(seal(Side.RECEIVER, 0, message.SerializeToString()))
            await call.read()
            await until(lambda: bool(a.counters.sent_bytes))
            assert set(a.counters.sent_bytes) == {"grpc"}
            if own is not None:
                own.close()
        await a.vacant()


async def test_slots_that_are_freed_too_often() -> None:
    async with peer(limits=SHARED) as a, stranger(a) as call:
        own = SlotMemory(2, 4096)
        message = first_message(a, memory=own.offer())
        await call.write(seal(Side.RECEIVER, 0, message.SerializeToString()))
        await call.read()
        for number in (1, 2):
            freed = pb.ToSource(freed=pb.Freed(slot=77))
            await call.write(seal(Side.RECEIVER, number, freed.SerializeToString()))
        assert await status(call) is grpc.StatusCode.INVALID_ARGUMENT
        await a.vacant()
        own.close()


async def test_slots_that_are_never_freed() -> None:
    async with peer() as a, stranger(a) as call:
        own = SlotMemory(1, 1024)
        message = first_message(a, memory=own.offer())
        await call.write(seal(Side.RECEIVER, 0, message.SerializeToString()))
        assert await status(call) is grpc.StatusCode.UNAVAILABLE
        await a.vacant()
        own.close()
