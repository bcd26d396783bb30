"""The exchange between hosts: one stream socket for every pair of ranks, one message a segment.

No sizes go ahead and no thread moves bytes (``comm/tcp.cc`` says why none is needed), so that a
round costs one way through the network. Sockets listen on one interface and take nobody who does
not know the token that went around at the start; as with torch and MPI, bytes are in clear.

Areas are anonymous memory of which pages exist from the first touch on: capacity costs nothing
until it is used.
"""

from __future__ import annotations

import hmac
import mmap
import secrets
import select
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import START_S, Group, named
from moeserve.comm.native import native_half
from moeserve.errors import ConfigError, LateRankError

_TOKEN_BYTES = 32
_RANK_BYTES = 4
_PARITIES = 2
# What the kernel may hold of a stream while nobody reads it; it grants what its own limit allows.
_BUFFER_BYTES = 4 << 20
_HELLO_S = 5.0
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
        reasons = [note.decode() for note in group.all_gather(f"{key}/able", reason.encode())]
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
    """By rank; None is our own. A rank connects to those below it and accepts those above.

    LateRankError names who was not there in time.
    """
    deadline = time.monotonic() + START_S
    with ExitStack() as stack:
        host = address or socket.gethostbyname(socket.gethostname())
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = stack.enter_context(socket.create_server((host, 0), family=family, backlog=512))
        _enlarge_buffers(listening)
        port = listening.getsockname()[1]
        token = secrets.token_hex(_TOKEN_BYTES)
        notes = group.all_gather(f"{key}/address", f"{host} {port} {token}".encode())
        found: list[socket.socket | None] = [None] * group.world
        for rank in range(group.rank):
            there, port_text, secret = notes[rank].decode().split()
            try:
                stream = _dial(there, int(port_text), deadline)
                stack.enter_context(stream)
                stream.sendall(bytes.fromhex(secret) + group.rank.to_bytes(_RANK_BYTES, "little"))
            except OSError as error:
                late = group.of_run(rank)
                raise LateRankError(
                    f"rank {late} cannot be reached at {there}:{port_text}: {error}", [late]
                ) from error
            found[rank] = stream
        _accept_all(listening, bytes.fromhex(token), found, group, deadline)
        for stream in filter(None, found):
            stack.enter_context(stream)
            stream.setblocking(False)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # All is well: only the listener is to be closed.
        stack.pop_all()
        listening.close()
    return found


def _dial(host: str, port: int, deadline: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    stream = socket.socket(family, socket.SOCK_STREAM)
    _enlarge_buffers(stream)  # before the handshake, which fixes how far a window may grow
    stream.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        stream.connect((host, port))
    except OSError:
        stream.close()
        raise
    return stream


def _accept_all(
    listening: socket.socket,
    token: bytes,
    found: list[socket.socket | None],
    group: Group,
    deadline: float,
) -> None:
    """Accept the connections of all ranks above ours; connections of others are closed."""
    expected = set(range(group.rank + 1, group.world))
    while expected:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([listening], [], [], left)[0]:
            late = [group.of_run(r) for r in sorted(expected)]
            raise LateRankError(f"{named(late)} did not connect within {START_S:g} s", late)
        stream, _ = listening.accept()
        try:
            stream.settimeout(min(_HELLO_S, max(0.001, left)))
            hello = stream.recv(_TOKEN_BYTES + _RANK_BYTES, socket.MSG_WAITALL)
        except OSError:
            hello = b""
        rank = int.from_bytes(hello[_TOKEN_BYTES:], "little")
        if not hmac.compare_digest(hello[:_TOKEN_BYTES], token) or rank not in expected:
            stream.close()
            continue
        expected.remove(rank)
        found[rank] = stream


def _enlarge_buffers(stream: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        stream.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
