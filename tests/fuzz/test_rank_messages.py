"""What ranks read of one another: any bytes are understood, or refused by an error of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from moeserve.comm.connecting import Address
from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.control.mesh_messages import Kind, ProtocolError, check_header
from moeserve.comm.control.mesh_protocol import MeshProtocol, Stream
from moeserve.comm.control.rpc import Trust, greet, open_channel, open_server, proof_metadata
from moeserve.comm.group import Group
from moeserve.core import FinishReason, Request, RequestId
from moeserve.engine.ranks.rank_server import AttachedDoor
from moeserve.engine.ranks.records import RECORD_BYTES, decide, loads_of
from moeserve.errors import InvalidRequestError, MoeserveError
from moeserve.pb import ep_pb2, rank_pb2

EXAMPLES = 150
VOCAB = 100
LOOPBACK = "127.0.0.1"


@given(st.lists(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), min_size=1, max_size=4))
def test_records_of_any_bytes_lead_all_to_one_decision(records: list[bytes]) -> None:
    whole = b"".join(records)
    with contextlib.suppress(MoeserveError):
        decide(whole)
    loads = loads_of(whole, 3)
    assert len(loads.running_R) == len(records)


words = st.integers(0, 2**32 - 1)
quads = st.integers(0, 2**64 - 1)


@given(words, words, quads, words, quads, quads)
def test_any_header_is_taken_or_refused(
    kind: int, length: int, number: int, step_bytes: int, last_round: int, posted: int
) -> None:
    with contextlib.suppress(ProtocolError):
        check_header(kind % 16, length, number, step_bytes, last_round, posted)
        assert kind % 16 in set(Kind)
        assert length <= max(step_bytes, 4 + 4 * 1024 + 4096)


class Silent(MeshProtocol):
    """One of five ranks, whose sockets go nowhere."""

    def __init__(self) -> None:
        super().__init__(1, range(5), 4)
        for step in range(3):
            for dialled, distance in ((True, -(1 << step)), (False, 1 << step)):
                nowhere: Any = None
                self._streams.append(Stream(nowhere, self._back(distance), step, dialled))

    def _tell_news(self) -> None:
        pass

    def take(self, at: int, kind: int, number: int, body: bytes) -> None:
        stream = self._streams[at]
        most = self._count(stream.step) * self._record_bytes
        check_header(kind, len(body), number, most, stream.round, self._posted)
        self._handle(stream, Kind(kind), number, body)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 9), st.integers(0, 3),
            st.binary(max_size=24) | st.binary(min_size=4, max_size=4)
            | st.tuples(st.integers(0, 6), st.integers(0, 4)).map(lambda p: struct.pack("<II", *p)),
        ),
        max_size=20,
    )
)  # fmt: skip
def test_any_messages_of_neighbours_are_taken_or_refused(
    messages: list[tuple[int, int, int, bytes]],
) -> None:
    mesh = Silent()
    for message in messages:
        with mesh._changed, contextlib.suppress(ProtocolError):
            mesh.take(*message)
    # What is on its way grows with what came: one message to each neighbour, twice at most.
    sent = sum(len(stream.out) for stream in mesh._streams)
    assert sent <= len(messages) * 2 * 6 * (16 + 4 + 24)


class Taking:
    """An engine that takes whatever it is given."""

    def __init__(self) -> None:
        self.taken: list[Request] = []

    def submit(self, request: Request, sink: Any, history: Any = None) -> None:
        self.taken.append(request)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        pass


def submission() -> rank_pb2.ToRank:
    message = rank_pb2.ToRank()
    one = message.submit.add(id="a", prompt=[1, 2, 3], outputs=[4], timeout_s=5.0)
    one.sampling.max_tokens, one.sampling.temperature = 5, 1.0
    one.sampling.top_p = one.sampling.repetition_penalty = 1.0
    one.sampling.bias_ids.append(3)
    one.sampling.biases.append(2.0)
    message.end.add(id="b", reason="abort")
    return message


@given(data=st.data())
def test_any_bytes_of_a_door_are_requests_a_step_can_run_or_refused(
    data: st.DataObject, spoiled: Any
) -> None:
    async def read() -> None:
        engine = Taking()
        door = AttachedDoor(engine, lambda: 1, tuple, VOCAB, lambda: 0.0)
        with contextlib.suppress(InvalidRequestError):
            door.read(spoiled(submission().SerializeToString(), data))
        for request in engine.taken:
            assert max((*request.prompt_ids, *request.params.stop_token_ids), default=0) < VOCAB
            assert request.params.repetition_penalty > 0
        door.write()
        door.close()

    asyncio.run(read())


@given(st.binary(max_size=60), st.integers(0, 3))
def test_any_note_of_an_identity_is_another_identity(note: bytes, rank: int) -> None:
    store = HashStore()
    mine, theirs = (Group(r, 2, store, notify=lambda text: None) for r in range(2))
    theirs.leave("identity/whole", note)
    frame = struct.pack("<II", rank, len(note)) + note
    store.append("identity/notes", frame)  # type: ignore[attr-defined]
    store.add("identity/count", 1)
    with pytest.raises(MoeserveError):
        agree(mine, Identity({"a": "b"}, {}, ""), 0.0)
    with contextlib.suppress(MoeserveError):
        Address.read(note, rank)
    assert ep_pb2.Identity.DESCRIPTOR.name == "Identity"


@given(data=st.data())
def test_addresses_of_any_json(data: st.DataObject, values: st.SearchStrategy[Any]) -> None:
    document = data.draw(st.tuples(values, values, values) | values)
    with contextlib.suppress(MoeserveError):
        found = Address.read(json.dumps(document).encode(), 1)
        assert 0 < found.port < 65536


def test_any_bytes_at_a_ranks_server_keep_nobody_out() -> None:
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    frames = st.tuples(
        words, st.integers(0, 12), st.integers(0, 255), words, st.binary(max_size=40)
    )
    frame = frames.map(
        lambda f: (f[0] % 64).to_bytes(3, "big") + bytes(f[1:3]) + f[3].to_bytes(4, "big") + f[4]
    )
    streams = st.lists(frame | st.binary(max_size=40), max_size=6).map(b"".join)

    async def run() -> None:
        server, port = open_server(LOOPBACK, Trust(), b"run", [])
        await server.start()

        @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)
        @given(streams, st.booleans())
        def attack(data: bytes, begins: bool) -> None:
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port)) as one:
                one.sendall((begin if begins else b"") + data)

        await asyncio.to_thread(attack)
        async with open_channel(LOOPBACK, port, Trust(), "") as channel:
            await greet(channel, proof_metadata(Trust(), b"run"), 0)
        await server.stop(None)

    asyncio.run(run())
