"""Connections from each rank to those 2^i ahead of it, whose both ends have proven who they are.

The address of every rank and a random token are left as notes, and read by those who dial it;
``comm.connecting`` makes the connections.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch.distributed import DistError

from moeserve.comm.connecting import Address, Connector, listen
from moeserve.comm.group import NOTICE_S, POLL_S, Group, named
from moeserve.comm.proofs import TOKEN_BYTES, Credentials, Place
from moeserve.errors import LateRankError

MAGIC = b"moemesh1"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """``dialled[i]`` leads to rank + 2^i, ``accepted[i]`` to rank - 2^i, modulo the world."""

    dialled: tuple[socket.socket, ...]
    accepted: tuple[socket.socket, ...]


def num_steps(world: int) -> int:
    """How many distances 1, 2, 4, ... are below ``world``: ceil(log2 world)."""
    return (world - 1).bit_length()


def connect_neighbours(
    group: Group,
    key: str,
    address: str | None,
    secret: bytes | None,
    timeout_s: float,
) -> Neighbours:
    """Collective. ``address`` is of the interface that peers reach; by default what the host's name
    means. LateRankError names who did not come; ConfigError who has another secret."""
    deadline = time.monotonic() + timeout_s
    host = address or socket.gethostbyname(socket.gethostname())
    dialled, accepted = places_ahead(group), places_behind(group)
    with ExitStack() as stack:
        listening = listen(stack, host)
        token = secrets.token_bytes(TOKEN_BYTES)
        own = Address(host, listening.getsockname()[1], token)
        credentials = Credentials(MAGIC, token, secret)
        connector = Connector(group, listening, credentials, accepted, deadline)
        stack.callback(connector.close)
        ahead = [place.acceptor for place in dialled]
        notes = exchange_notes(group, f"{key}/address", own.note(), ahead, timeout_s)
        for place in dialled:
            note = notes[place.acceptor]
            connector.dial(place, Address.read(note, group.of_run(place.acceptor)))
        found = connector.complete(timeout_s)
    for stream in found.values():
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Neighbours(tuple(found[p] for p in dialled), tuple(found[p] for p in accepted))


def places_ahead(group: Group) -> list[Place]:
    """By distance: the connections that this rank dials; a channel is a distance."""
    rank, world = group.rank, group.world
    return [Place(rank, (rank + (1 << i)) % world, i) for i in range(num_steps(world))]


def places_behind(group: Group) -> list[Place]:
    """By distance: those that it accepts."""
    rank, world = group.rank, group.world
    return [Place((rank - (1 << i)) % world, rank, i) for i in range(num_steps(world))]


def exchange_notes(
    group: Group, key: str, note: bytes, ranks: Sequence[int], timeout_s: float
) -> dict[int, bytes]:
    """Leave a note, and read those of ``ranks``: ``Group.all_gather`` for a few of many.

    LateRankError names the ranks that did not come or gave up.
    """
    notes: dict[int, bytes] = {}
    begun = time.monotonic()
    notice_at = begun + NOTICE_S
    try:
        group.store.set(f"{key}/{group.rank}", note)  # type: ignore[arg-type]
        while True:
            trouble = group.trouble()
            for rank in ranks:
                if rank not in notes and group.store.check([f"{key}/{rank}"]):
                    notes[rank] = bytes(group.store.get(f"{key}/{rank}"))
            missing = sorted({group.of_run(rank) for rank in ranks if rank not in notes})
            if not missing:
                return notes
            if trouble is not None:
                raise trouble
            now = time.monotonic()
            if now > begun + timeout_s:
                raise LateRankError(
                    f"{named(missing)} did not reach {key!r} within {timeout_s:g} s", missing
                )
            if now > notice_at:
                notice_at = now + (now - begun)  # ever less often
                group.notify(f"rank {group.rank}, {key}: waiting for {named(missing)}")
            time.sleep(POLL_S)
    except DistError as error:
        raise LateRankError(f"{key}: the rank that keeps the notes has ended", [0]) from error
