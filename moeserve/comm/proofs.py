"""How both ends of a connection between ranks prove who they are. Pure: bytes in, bytes out.

Who dials says which rank it is, whom it wants and which of the connections between the two this is;
then both ends prove, over nonces of both, that they know the token of the rank that is dialled and
the group's secret, if there is one (HMAC-SHA256). That keeps others from joining; it neither hides
nor signs what follows::

    dialler                                   acceptor
    hello: magic, place, nonce       ->
                                     <-       nonce, proof
    proof                            ->
                                     <-       welcome

A handshake is a generator: it yields what it sends and how many bytes it needs next, and returns
the place when that is proven. It raises ConnectionAbortedError for bytes that may not be,
UnauthenticatedError for a proof that is none.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

from moeserve.errors import UnauthenticatedError

MAGIC_BYTES = 8
TOKEN_BYTES = 32
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"<{MAGIC_BYTES}sIII{_NONCE_BYTES}s")
_WELCOME = b"w"


class Turn(NamedTuple):
    """Send this, then read so many bytes; with none to read the handshake is over."""

    send: bytes
    needed: int


class Place(NamedTuple):
    """A connection from rank ``dialler`` to rank ``acceptor``; ``channel`` tells apart those of
    one pair."""

    dialler: int
    acceptor: int
    channel: int


Handshake = Generator[Turn, bytes, Place]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What both ends know: ``magic`` names the kind of connection, ``token`` is of the rank that
    is dialled, ``secret`` of the group."""

    magic: bytes
    token: bytes
    secret: bytes | None

    def proof(self, side: bytes, place: Place, dialler: bytes, acceptor: bytes) -> bytes:
        """Of one side over both nonces."""
        # Everything after the side has a fixed width, so no two sets of values are the same text.
        key = hmac.digest(self.secret or b"", self.token, "sha256")
        pair = struct.pack("<III", *place)
        return hmac.digest(key, side + pair + dialler + acceptor, "sha256")


def accepting(credentials: Credentials, is_awaited: Callable[[Place], bool]) -> Handshake:
    """``is_awaited`` says which places may be taken."""
    hello = yield Turn(b"", _HELLO.size)
    magic, dialler, acceptor, channel, theirs = _HELLO.unpack(hello)
    place = Place(dialler, acceptor, channel)
    if magic != credentials.magic:
        raise ConnectionAbortedError("it is none of this run's ranks")
    if not is_awaited(place):
        raise ConnectionAbortedError(f"rank {dialler} is none that is awaited")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    own = credentials.proof(b"accepts", place, theirs, nonce)
    proof = yield Turn(nonce + own, _PROOF_BYTES)
    _require(proof, credentials.proof(b"dials", place, theirs, nonce))
    if not is_awaited(place):
        raise ConnectionAbortedError(f"rank {dialler} is connected already")
    yield Turn(_WELCOME, 0)
    return place


def dialling(credentials: Credentials, place: Place) -> Handshake:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    hello = _HELLO.pack(credentials.magic, *place, nonce)
    challenge = yield Turn(hello, _NONCE_BYTES + _PROOF_BYTES)
    theirs, proof = challenge[:_NONCE_BYTES], challenge[_NONCE_BYTES:]
    _require(proof, credentials.proof(b"accepts", place, nonce, theirs))
    own = credentials.proof(b"dials", place, nonce, theirs)
    if (yield Turn(own, len(_WELCOME))) != _WELCOME:
        raise ConnectionAbortedError("it sent no welcome")
    return place


def _require(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise UnauthenticatedError(
            "the other end does not know this group's secret: give all ranks the same ep_secret"
        )
