"""How processes of one instance reach one another by gRPC, and whom they trust.

On one host they meet over loopback. Beyond it nobody is trusted for having found the port: either
both ends show a certificate of the group's own authority (``tls``: mutual TLS, everything is
encrypted), or they prove to know a secret (``secret``, on a network that is trusted not to read or
change packets). The proof is an HMAC of the run's name under the secret, so that it is of no use in
another run; without a secret the run's own random key is proven, which keeps other runs of the same
host apart. A certificate's name does not matter, only who signed it.

Who is refused learns why: ``greet`` at the start, ``reason`` of any call. gRPC's own threads keep
connections alive and find dead peers (HTTP/2 pings, ``KEEPALIVE_S``), so a busy interpreter is no
dead peer, and a stream may wait for its next message for as long as it lives.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from moeserve.errors import ConfigError, MoeserveError, UnavailableError

# No message is larger, either way.
MOST_BYTES = 64 << 20
# What whoever connects gets to begin to speak HTTP/2 (and TLS); how many calls it may have open.
HANDSHAKE_S = 10
MOST_CALLS = 4096
# How often a connection is tried, and for how long an answer is waited for.
KEEPALIVE_S = 10
# What a peer gets to answer the first call, connecting included.
GREETING_S = 20.0
SERVICE = "moeserve.peer"

PROOF = "moeserve-proof"
NOT_OF_THIS_RUN = "the caller is not of this run: give all ranks the same ep_secret"
# What gRPC says where the other end closed the connection before it was made: one that wants TLS
# does so, but so does one that dies.
_SHUT = "last error: UNAVAILABLE"
# What every server and channel between ranks is opened with.
OPTIONS = (
    ("grpc.max_send_message_length", MOST_BYTES),
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
    ("grpc.max_concurrent_streams", MOST_CALLS),
    # A peer that comes back is found soon, however long it was away.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Tls:
    """A rank's certificate, its key, and the authority that signed those of all ranks, as PEM.
    ``name`` is one that the certificate is for, ``folder`` where they were read."""

    folder: Path
    certificate: bytes
    key: bytes
    authority: bytes
    name: str

    @classmethod
    def load(cls, folder: Path) -> Tls:
        """From ``cert.pem``, ``key.pem`` and ``ca.pem``."""
        try:
            name = name_of(folder)
            certificate, key = (folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes()
            authority = (folder / "ca.pem").read_bytes()
        except OSError as error:  # of which ssl.SSLError is one
            raise ConfigError(
                f"ep_tls={str(folder)!r}: cert.pem, key.pem and ca.pem cannot be used: {error}"
            ) from error
        if not name:
            raise ConfigError(
                f"ep_tls={str(folder)!r}: cert.pem is for no name: make one with a common name or "
                "a DNS name, of any text"
            )
        return cls(folder, certificate, key, authority, name)


@dataclass(frozen=True, slots=True)
class Trust:
    """How a connection is secured; both None: not at all, which is for loopback alone."""

    secret: bytes | None = None
    tls: Tls | None = None

    def proof(self, run: bytes) -> str:
        """What shows that one is of the run of this name."""
        return hmac.digest(self.secret or b"", b"moeserve run " + run, "sha256").hex()


def require_trust(host: str, trust: Trust) -> None:
    """Beyond loopback nobody is trusted for having found the port: ConfigError."""
    if not _is_loopback(host) and trust.secret is None and trust.tls is None:
        raise ConfigError(
            f"ranks on several hosts meet at {host}, which others can reach: set ep_tls, or "
            "ep_secret on a network that you trust, the same on all ranks"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def open_server(
    host: str,
    trust: Trust,
    run: bytes,
    handlers: Sequence[grpc.GenericRpcHandler],
    port: int = 0,
) -> tuple[grpc.aio.Server, int]:
    """A server of the running event loop, not started yet, and its port, which is any free one
    where ``port`` is 0. ConfigError where it may not be reached by ``host``, or cannot."""
    require_trust(host, trust)
    guards = [ProofGuard(trust.proof(run))]
    server = grpc.aio.server(interceptors=guards, options=OPTIONS)
    server.add_generic_rpc_handlers((_greetings(), *handlers))
    try:
        return server, add_port(server, host, port, trust)
    except RuntimeError as error:
        what = f"port {port} of {host} cannot" if port else f"no port of {host} can"
        raise ConfigError(
            f"{what} be opened for the other ranks: name an interface of this host, and a port "
            f"that is free if any ({error})"
        ) from error


def add_port(server: grpc.aio.Server | grpc.Server, host: str, port: int, trust: Trust) -> int:
    """Let the server listen there; the port. RuntimeError where it cannot."""
    place, tls = place_of(host, port), trust.tls
    if tls is None:
        return int(server.add_insecure_port(place))
    pair = [(tls.key, tls.certificate)]
    both = grpc.ssl_server_credentials(pair, tls.authority, require_client_auth=True)
    return int(server.add_secure_port(place, both))


def open_channel(host: str, port: int, trust: Trust, name: str) -> grpc.aio.Channel:
    """To a server of ``open_server``; ``name`` is of its certificate, if it has one."""
    if trust.tls is None:
        return grpc.aio.insecure_channel(place_of(host, port), options=OPTIONS)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", name))
    own = channel_credentials(trust.tls)
    return grpc.aio.secure_channel(place_of(host, port), own, options=options)


def place_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)


def proof_metadata(trust: Trust, run: bytes) -> tuple[tuple[str, str], ...]:
    """Goes with every call."""
    return ((PROOF, trust.proof(run)),)


async def greet(
    channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...], rank: int
) -> None:
    """Make sure that ``rank`` and this process trust one another: ConfigError says what to change
    if they do not, UnavailableError that it is not reached within ``GREETING_S``."""
    asked: Any = channel.unary_unary(f"/{SERVICE}/Greet")
    try:
        await asked(b"", timeout=GREETING_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        kind: type[MoeserveError] = ConfigError if distrusts(error) else UnavailableError
        raise kind(f"rank {rank}: {reason(error)}") from error


def reason(error: grpc.Call | grpc.aio.AioRpcError) -> str:
    """Why a call failed, and what to do where it is a matter of trust."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return details
    if distrusts(error):
        return (
            "it and this rank do not trust one another: give all ranks certificates that one "
            f"authority has signed (ep_tls), or none ({details})"
        )
    if _SHUT in details:
        return (
            f"it closed the connection: if it runs, set ep_tls on all ranks or on none ({details})"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return details or code.name


def distrusts(error: grpc.Call | grpc.aio.AioRpcError) -> bool:
    """Whether one end surely refused the other."""
    refused = "handshake failed" in (error.details() or "")
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or refused


def _greetings() -> grpc.GenericRpcHandler:
    async def greet_back(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return b""

    handler: Handler = grpc.unary_unary_rpc_method_handler(greet_back)
    return grpc.method_handlers_generic_handler(SERVICE, {"Greet": handler})


class ProofGuard(grpc.aio.ServerInterceptor):
    """Refuses calls without the run's proof."""

    def __init__(self, proof: str) -> None:
        self._proof = proof

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        shown = dict(handler_call_details.invocation_metadata or ()).get(PROOF, "")
        if is_proof(shown, self._proof):
            return await continuation(handler_call_details)
        # As a stream, whatever the method is: it is refused before anything of it is read.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_OF_THIS_RUN)


def is_proof(shown: str | bytes, expected: str) -> bool:
    proof = shown.encode() if isinstance(shown, str) else shown
    return hmac.compare_digest(proof, expected.encode())


def name_of(folder: Path) -> str:
    """A name that ``cert.pem`` is for, as whoever connects would see it.

    A handshake in memory, for the standard library reads certificates only of a connection.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    client.load_verify_locations(folder / "ca.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(up, down, server_side=True),
        client.wrap_bio(down, up, server_side=False),
    ]
    for _ in range(4):
        for end in (ends[1], ends[0]):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return _name_in(ends[1].getpeercert())


def name_at(host: str, port: int, tls: Tls, timeout_s: float) -> str:
    """A name of the certificate of a server that the group's authority has signed; for whoever
    connects before it could be told. OSError, of which ssl.SSLError is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # gRPC checks the name that is found here
    context.load_verify_locations(tls.folder / "ca.pem")
    context.load_cert_chain(tls.folder / "cert.pem", tls.folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout_s) as stream,
        context.wrap_socket(stream) as secured,
    ):
        return _name_in(secured.getpeercert())


def _name_in(certificate: Any) -> str:
    """The first name that a certificate is for, as the standard library shows it."""
    found = certificate or {}
    names = [value for kind, value in found.get("subjectAltName", ()) if kind == "DNS"]
    common = [v for rdn in found.get("subject", ()) for k, v in rdn if k == "commonName"]
    return str((*names, *common, "")[0])
