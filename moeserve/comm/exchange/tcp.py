"""The exchange between hosts: one stream socket for every pair of ranks, one message a segment.

No sizes go ahead and no thread moves bytes (``comm/tcp.cc`` says why none is needed), so that a
round costs one way through the network. Sockets listen on one interface and take nobody who does
not know the token that went around at the start; as with torch and MPI, bytes are in clear.

Areas are anonymous memory of which pages exist from the first touch on: capacity costs nothing
until it is used.
"""

from __future__ import annotations

import mmap
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moeserve.comm.connecting import Address, Connector, listen
from moeserve.comm.exchange.backend import ExchangeBackend
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import START_S, Group, named
from moeserve.comm.native import native_half
from moeserve.comm.proofs import TOKEN_BYTES, Credentials, Place
from moeserve.errors import ConfigError, LateRankError

_MAGIC = b"moetcp01"
_PARITIES = 2
# What the kernel may hold of a stream while nobody reads it; it grants what its own limit allows.
_BUFFER_BYTES = 4 << 20
# How long a rank that does anything at all may take to answer.
_GRACE_NS = 200_000_000


class TcpExchange(ExchangeBackend):
    """Collective: all ranks of the group build theirs at the same time.

    ``address`` is of the interface that peers reach; by default what the host's name means.
    """

    name = "tcp"

    def __init__(
        self, group: Group, lanes: Lanes, key: str = "tcp", address: str | None = None
    ) -> None:
        super().__init__(group, lanes)
        native, reason = native_half()
        if native is not None and not hasattr(native, "Streams"):
            reason = "this system has no streams (Linux has)"
        reasons = [
            note.decode(errors="replace")
            for note in group.all_gather(f"{key}/able", reason.encode())
        ]
        for rank, why in enumerate(reasons):
            if why:
                raise ConfigError(f"no streams between ranks: rank {group.of_run(rank)}: {why}")
        assert native is not None
        self._sockets = connect(group, key, address)
        every, parities, ranks = range(len(lanes.bytes_L)), range(_PARITIES), range(group.world)
        self._inbox_LPR = [
            [[_area(lanes.bytes_L[lane]) for _ in ranks] for _ in parities] for lane in every
        ]
        # What a rank sends itself is where it is to be.
        self._outbox_LPR = [
            [
                [
                    self._inbox_LPR[lane][p][r] if r == group.rank else _area(lanes.bytes_L[lane])
                    for r in ranks
                ]
                for p in parities
            ]
            for lane in every
        ]
        self._streams = native.Streams(
            group.rank,
            [-1 if s is None else s.fileno() for s in self._sockets],
            list(lanes.bytes_L),
            [area.data_ptr() for lane in self._outbox_LPR for p in lane for area in p],
            [area.data_ptr() for lane in self._inbox_LPR for p in lane for area in p],
        )

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        return self._outbox_LPR[lane][self._streams.begin(lane)]

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._streams.send(lane, sizes_R)
        self._count_sent(sizes_R)

    def receive(self, lane: int) -> list[Tensor]:
        lengths = self._streams.receive(lane, 0)
        if not lengths:
            self._wait(lane, self._sleep, lambda: self._late_ranks(lane))
            lengths = self._streams.receive(lane, 0)
        areas = self._inbox_LPR[lane][self.round_L[lane] & 1]
        return [area[:length] for area, length in zip(areas, lengths, strict=True)]

    def _sleep(self, lane: int, slice_s: float, waited_s: float) -> bool:
        if self._streams.receive(lane, int(slice_s * 1e9)):
            return True
        if lost := self._disconnected(lane):
            raise self._disconnected_error(lost)
        return False

    def _disconnected(self, lane: int) -> list[int]:
        missing = set(self._streams.missing(lane))
        return [r for r in self._streams.disconnected() if r in missing]

    def _disconnected_error(self, lost: Sequence[int]) -> LateRankError:
        ranks = [self._group.of_run(r) for r in lost]
        why = next((w for w in map(self._streams.violation, lost) if w), "its connection has ended")
        return LateRankError(f"{named(ranks)} is gone: {why}", ranks)

    def _late_ranks(self, lane: int) -> list[int]:
        """Those who are missing and answer no ping; all who are missing, if all of them answer."""
        missing = self._streams.missing(lane)
        silent = set(self._streams.silent(_GRACE_NS))
        return [r for r in missing if r in silent] or missing

    def _release(self) -> None:
        # Areas go with the last view of them, so that one which is still held stays readable.
        del self._streams
        self._inbox_LPR, self._outbox_LPR = [], []
        for stream in self._sockets:
            if stream is not None:
                stream.close()
        self._sockets = []


def _area(capacity: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(capacity, 1)), dtype=torch.uint8)


def connect(group: Group, key: str, address: str | None) -> list[socket.socket | None]:
    """By rank; None is our own. A rank dials those below it and accepts those above.

    LateRankError names who was not there in time.
    """
    deadline = time.monotonic() + START_S
    host = address or socket.gethostbyname(socket.gethostname())
    me, world = group.rank, group.world
    dialled = {rank: Place(me, rank, 0) for rank in range(me)}
    accepted = {rank: Place(rank, me, 0) for rank in range(me + 1, world)}
    with ExitStack() as stack:
        # Before a handshake of TCP, which fixes how far a window may grow.
        listening = listen(stack, host, _enlarge_buffers)
        token = secrets.token_bytes(TOKEN_BYTES)
        own = Address(host, listening.getsockname()[1], token)
        credentials = Credentials(_MAGIC, token, None)
        connector = Connector(
            group, listening, credentials, accepted.values(), deadline, _enlarge_buffers
        )
        stack.callback(connector.close)
        notes = group.all_gather(f"{key}/address", own.note())
        for rank, place in dialled.items():
            connector.dial(place, Address.read(notes[rank], group.of_run(rank)))
        found = connector.complete(START_S)
    for stream in found.values():
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    places = dialled | accepted
    return [found[places[rank]] if rank != me else None for rank in range(world)]


def _enlarge_buffers(stream: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        stream.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
