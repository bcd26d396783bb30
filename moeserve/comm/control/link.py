"""One connection between two ranks: whole messages over TCP, with deadlines.

A message is its length in four bytes and then its bytes. Who connects and who accepts prove to one
another that they know the group's secret, if there is one: HMAC-SHA256 over nonces of both. That
keeps others from joining; it neither hides nor signs what follows, so whoever can read or change
packets on the way can read or change messages. With ``Tls`` both ends show a certificate of the
group's own authority, and everything is encrypted; the name in a certificate does not matter.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from moeserve.errors import ConfigError, UnauthenticatedError
from moeserve.pb import ep_pb2 as pb

LARGEST = 64 << 20
# Before anybody has proven anything.
LARGEST_UNPROVEN = 1024
# How long one look at the socket lasts before ``check`` is asked again.
SLICE_S = 0.05
_LENGTH = struct.Struct("<I")
_NONCE_BYTES = 16
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Tls:
    """Contexts for the two ends of a connection."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, folder: Path) -> Tls:
        """From ``cert.pem``, ``key.pem`` and ``ca.pem``, the authority that signed all ranks'."""
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
                context.load_verify_locations(folder / "ca.pem")
            except OSError as error:  # of which ssl.SSLError is one
                raise ConfigError(
                    f"ep_tls={str(folder)!r}: cert.pem, key.pem and ca.pem cannot be used: {error}"
                ) from error
        return cls(server, client)


@dataclass(frozen=True, slots=True)
class Trust:
    """How a connection is secured; both None: not at all, which is for loopback alone."""

    secret: bytes | None = None
    tls: Tls | None = None


class Link:
    """Owns a connected socket. One thread may send while another receives.

    OSError, of which ConnectionError is one, where the other end closed or a message is too long.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(SLICE_S)
        self.socket = connected
        self._read = b""
        # A TLS connection has one state for both directions, which calls must not share.
        self._tls_lock = threading.Lock() if isinstance(connected, ssl.SSLSocket) else None

    def send(self, message: bytes, timeout_s: float) -> None:
        """TimeoutError where the other end does not take it; the link is of no use after that."""
        data = memoryview(_LENGTH.pack(len(message)) + message)
        sent = self._send_some(data)
        if sent == len(data):
            return
        give_up = time.monotonic() + timeout_s
        while sent < len(data):
            if time.monotonic() > give_up:
                raise TimeoutError(f"a message was not taken within {timeout_s:g} s")
            sent += self._send_some(data[sent:])

    def receive(
        self,
        timeout_s: float | None,
        check: Callable[[], None] | None = None,
        largest: int = LARGEST,
    ) -> bytes:
        """The next message. While it waits ``check`` may raise why waiting is in vain."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._cut(largest)) is None:
            if not self.read_some():
                if check is not None:
                    check()
                if give_up is not None and time.monotonic() > give_up:
                    raise TimeoutError(f"no message came within {timeout_s:g} s")
        return message

    def ready(self) -> bytes | None:
        """A message that was already read."""
        return self._cut(LARGEST)

    def read_some(self) -> bool:
        """Reads what is there, waiting for it a moment; False if nothing came."""
        try:
            data = self._receive_some()
        except (TimeoutError, ssl.SSLWantReadError):
            return False
        if not data:
            raise ConnectionResetError("the connection was closed")
        self._read = self._read + data if self._read else data
        return True

    def close(self) -> None:
        self.socket.close()

    def _receive_some(self) -> bytes:
        lock = self._tls_lock
        if lock is None:
            return self.socket.recv(1 << 16)
        assert isinstance(self.socket, ssl.SSLSocket)
        with lock:
            buffered = self.socket.pending()
        if not buffered:
            # Waits without the lock, so that another thread can send.
            poll = select.poll()
            poll.register(self.socket, select.POLLIN)
            if not poll.poll(SLICE_S * 1000):
                raise TimeoutError
        with lock:
            return self.socket.recv(1 << 16)

    def _cut(self, largest: int) -> bytes | None:
        have = len(self._read)
        if have < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._read)
        if length > largest:
            raise ConnectionAbortedError(f"a message of {length} bytes, of at most {largest}")
        end = _LENGTH.size + length
        if have < end:
            return None
        message, self._read = self._read[_LENGTH.size : end], self._read[end:]
        return message

    def _send_some(self, data: memoryview) -> int:
        try:
            if self._tls_lock is None:
                return self.socket.send(data)
            with self._tls_lock:
                return self.socket.send(data)
        except (TimeoutError, ssl.SSLWantWriteError):
            return 0


def connect(
    place: tuple[str, int], rank: int, channel: pb.Channel, trust: Trust, timeout_s: float
) -> Link:
    """To rank 0's ``place``. UnauthenticatedError where it does not prove to be of this group."""
    connected: socket.socket = socket.create_connection(place, timeout=timeout_s)
    try:
        if trust.tls is not None:
            connected = trust.tls.client.wrap_socket(connected)
        link = Link(connected)
        hello = pb.Hello(rank=rank, channel=channel, nonce=secrets.token_bytes(_NONCE_BYTES))
        link.send(hello.SerializeToString(), timeout_s)
        challenge = _expect(link, pb.Challenge, timeout_s)
        _require(trust, b"rank 0", hello, challenge.nonce, challenge.proof)
        proof = pb.Proof(proof=_prove(trust, b"rank n", hello, challenge.nonce))
        link.send(proof.SerializeToString(), timeout_s)
        _expect(link, pb.Welcome, timeout_s)
    except BaseException:  # goes on up; the socket must not stay open
        connected.close()
        raise
    return link


def accept(connected: socket.socket, trust: Trust, timeout_s: float) -> tuple[pb.Hello, Link]:
    """The other side of ``connect``."""
    try:
        connected.settimeout(timeout_s)
        if trust.tls is not None:
            connected = trust.tls.server.wrap_socket(connected, server_side=True)
        link = Link(connected)
        hello = _expect(link, pb.Hello, timeout_s)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        challenge = pb.Challenge(nonce=nonce, proof=_prove(trust, b"rank 0", hello, nonce))
        link.send(challenge.SerializeToString(), timeout_s)
        proof = _expect(link, pb.Proof, timeout_s)
        _require(trust, b"rank n", hello, nonce, proof.proof)
        link.send(pb.Welcome().SerializeToString(), timeout_s)
    except BaseException:  # goes on up; the socket must not stay open
        connected.close()
        raise
    return hello, link


def _expect(link: Link, kind: type[M], timeout_s: float) -> M:
    try:
        return kind.FromString(link.receive(timeout_s, largest=LARGEST_UNPROVEN))
    except DecodeError as error:
        raise ConnectionAbortedError(f"not a {kind.__name__} of ours") from error


def _prove(trust: Trust, side: bytes, hello: pb.Hello, nonce: bytes) -> bytes:
    if trust.secret is None:
        return b""
    # Fixed widths, so that no two different sets of values are the same text.
    values = struct.pack("<II", hello.rank, hello.channel)
    ours, theirs = sha256(hello.nonce).digest(), sha256(nonce).digest()
    return hmac.digest(trust.secret, side + values + ours + theirs, "sha256")


def _require(trust: Trust, side: bytes, hello: pb.Hello, nonce: bytes, proof: bytes) -> None:
    if len(nonce) != _NONCE_BYTES or len(hello.nonce) != _NONCE_BYTES:
        raise UnauthenticatedError("a connection without a nonce")
    if not hmac.compare_digest(_prove(trust, side, hello, nonce), proof):
        raise UnauthenticatedError(
            "the other end does not know this group's secret: give all ranks the same ep_secret"
        )
