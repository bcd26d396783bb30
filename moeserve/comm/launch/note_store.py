"""The notes of the start over gRPC: rank 0 keeps them, the others ask it. Each end is
a ``NoteStore``.

Who is not of the run reads and writes nothing. The first call, ``Meet``, is open to all: the caller
sends a nonce, and gets a random name of the run with a proof (HMAC-SHA256 under the group's secret
over both); every other call shows the proof of ``rpc`` over that name. So each end knows that the
other has the secret. With certificates the connection is mutual TLS. With neither, which is for
loopback alone, whoever is on this host is of the run.

The server waits for nobody: a call is one step of ``Notes``, a stranger's is refused before
anything of it is read, and who wants to wait for a note asks again. Connections are bounded, and
those of strangers give way (``idle_connections``).
"""

from __future__ import annotations

import hmac
import resource
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from torch.distributed import DistNetworkError

from moeserve.comm.control.idle_connections import IdleConnections
from moeserve.comm.control.rpc import (
    NOT_OF_THIS_RUN,
    OPTIONS,
    PROOF,
    Trust,
    add_port,
    channel_credentials,
    distrusts,
    is_proof,
    name_at,
    place_of,
    proof_metadata,
    reason,
    require_trust,
)
from moeserve.comm.group import START_S, backing_off
from moeserve.comm.launch.notes import FIRST_LOOK_S, SLOWEST_LOOK_S, Notes, NoteStore, note_methods
from moeserve.errors import ConfigError, MoeserveError, UnavailableError
from moeserve.pb import notes_pb2 as pb

SERVICE = "moeserve.notes"
# What a call may take (an interpreter that is held up answers late), and what connecting may.
CALL_S = 60.0
MEET_S = 10.0
_THREADS = 4
_NONCE = "moeserve-nonce-bin"
_NONCE_BYTES = 16
# Longer than any note may be; gRPC reads no more of a message.
_MOST_MESSAGE = 20 << 20
_MOST_CALLS = 4096
# Of the descriptors that the process may have, the share that connections to the notes may take.
_SHARE = 2
_MOST_CONNECTIONS = 8192
_OPTIONS = (
    *(option for option in OPTIONS if "message_length" not in option[0]),
    ("grpc.max_send_message_length", _MOST_MESSAGE),
    ("grpc.max_receive_message_length", _MOST_MESSAGE),
)
# What a server that has too much to do says before it has looked at a call.
_BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)


class HostedStore(NoteStore):
    """Keeps the notes in this process, and lets others ask for them at ``port`` until it is closed
    or forgotten. ConfigError where ``host`` may not be reached by that trust, OSError where it
    cannot listen there."""

    def __init__(self, host: str, port: int, trust: Trust, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._over = threading.Event()
        require_trust(host, trust)
        self._methods = note_methods(Notes())
        service = _NoteService(self._methods, trust)
        most = _most_connections()
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, "moeserve-notes"),
            handlers=[service],
            options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", most)),
            maximum_concurrent_rpcs=_MOST_CALLS,
        )
        try:
            self.port = add_port(self._server, host, port, trust)
        except RuntimeError as error:
            raise OSError(f"it is taken, or no address of this host ({error})") from error
        self._server.start()
        idle = IdleConnections(self.port, most, service.known.__contains__, "the notes")
        threading.Thread(
            target=idle.watch_until, args=(self._over,), name="moeserve-notes-idle", daemon=True
        ).start()

    def close(self) -> None:
        self._over.set()
        self._server.stop(None)

    def __del__(self) -> None:
        # gRPC ends a server that nobody holds; to wait for it here would never end as the
        # interpreter does, whose threads stand still.
        self._over.set()

    def _ask(self, method: str, request: pb.NoteRequest) -> pb.NoteReply:
        return self._methods[method](request)


class RemoteStore(NoteStore):
    """Notes that another rank keeps. DistNetworkError says that it has ended or does not answer,
    ConfigError what it refuses."""

    def __init__(
        self, channel: grpc.Channel, metadata: Sequence[tuple[str, str]], timeout_s: float
    ) -> None:
        super().__init__(timeout_s)
        self._channel = channel
        self.metadata = metadata
        self._calls: dict[str, Any] = {
            method: channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=pb.NoteRequest.SerializeToString,
                response_deserializer=pb.NoteReply.FromString,
            )
            for method in note_methods(Notes())
        }

    def close(self) -> None:
        self._channel.close()

    def _ask(self, method: str, request: pb.NoteRequest) -> pb.NoteReply:
        until = time.monotonic() + CALL_S
        pauses = backing_off(FIRST_LOOK_S, SLOWEST_LOOK_S)
        while True:
            left_s = max(0.0, until - time.monotonic())
            try:
                reply: pb.NoteReply = self._calls[method](
                    request, timeout=left_s, metadata=self.metadata
                )
                return reply
            except grpc.RpcError as error:
                failed = _call_of(error)
                code = failed.code()
                if code is grpc.StatusCode.INVALID_ARGUMENT or distrusts(failed):
                    raise ConfigError(f"the notes of the start: {reason(failed)}") from error
                if code not in _BUSY:
                    raise DistNetworkError(reason(failed)) from error
            time.sleep(next(pauses))


def host_store(
    host: str, port: int = 0, timeout_s: float = START_S, trust: Trust | None = None
) -> tuple[HostedStore, int]:
    """Keep the notes here, listening on ``host`` alone; the store and its port. Waits for a note
    end after ``timeout_s``."""
    store = HostedStore(host, port, trust or Trust(), timeout_s)
    return store, store.port


def join_store(
    host: str, port: int, timeout_s: float = START_S, trust: Trust | None = None
) -> RemoteStore:
    """Reach the notes that another rank keeps. UnavailableError where nobody answers within
    ``MEET_S``, ConfigError where the two do not trust one another."""
    trust = trust or Trust()
    require_trust(host, trust)
    channel = _open_channel(host, port, trust)
    try:
        run = _meet(channel, trust)
    except MoeserveError:
        channel.close()
        raise
    return RemoteStore(channel, proof_metadata(trust, run), timeout_s)


class _NoteService(grpc.GenericRpcHandler):
    """Calls by name. ``known`` are the ports from which calls with the run's proof have come."""

    def __init__(
        self, methods: Mapping[str, Callable[[pb.NoteRequest], pb.NoteReply]], trust: Trust
    ) -> None:
        run = secrets.token_bytes(_NONCE_BYTES)
        self._run, self._trust, self._proof = run, trust, trust.proof(run)
        self.known: set[int] = set()
        # As streams, of which nothing is read: a caller that sends nothing holds no thread.
        self._meeting: Any = grpc.stream_stream_rpc_method_handler(self._meet)
        self._refusing: Any = grpc.stream_stream_rpc_method_handler(_refuse)
        self._handlers = {
            f"/{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(
                self._answering(method),
                request_deserializer=pb.NoteRequest.FromString,
                response_serializer=pb.NoteReply.SerializeToString,
            )
            for name, method in methods.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == f"/{SERVICE}/Meet":
            return self._meeting
        shown = dict(details.invocation_metadata or ()).get(PROOF, "")
        if not is_proof(shown, self._proof):
            return self._refusing
        return self._handlers.get(details.method)

    def _meet(self, requests: object, context: grpc.ServicerContext) -> Any:
        nonce = dict(context.invocation_metadata()).get(_NONCE, b"")
        if not isinstance(nonce, bytes) or len(nonce) != _NONCE_BYTES:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{_NONCE} of 16 bytes is missing")
        yield self._run + proof_of_keeper(self._trust, nonce, self._run)

    def _answering(
        self, method: Callable[[pb.NoteRequest], pb.NoteReply]
    ) -> Callable[[pb.NoteRequest, grpc.ServicerContext], pb.NoteReply]:
        def answer(request: pb.NoteRequest, context: grpc.ServicerContext) -> pb.NoteReply:
            self.known.add(int(context.peer().rpartition(":")[2]))
            try:
                return method(request)
            except ConfigError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
                raise

        return answer


def _refuse(requests: object, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_OF_THIS_RUN)
    yield b""


def proof_of_keeper(trust: Trust, nonce: bytes, run: bytes) -> bytes:
    """What shows that who keeps the notes of the run of this name knows the secret."""
    return hmac.digest(trust.secret or b"", b"moeserve notes " + nonce + run, "sha256")


def _open_channel(host: str, port: int, trust: Trust) -> grpc.Channel:
    if trust.tls is None:
        return grpc.insecure_channel(place_of(host, port), options=_OPTIONS)
    try:
        name = name_at(host, port, trust.tls, MEET_S)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError, TimeoutError) as error:
        raise UnavailableError(f"{host}:{port}: {error}") from error
    except ssl.SSLError as error:
        raise ConfigError(
            f"rank 0 at {host}:{port} and this rank do not trust one another: give all ranks "
            f"certificates that one authority has signed (ep_tls), or none ({error})"
        ) from error
    except OSError as error:
        raise UnavailableError(f"{host}:{port}: {error}") from error
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(place_of(host, port), channel_credentials(trust.tls), options)


def _meet(channel: grpc.Channel, trust: Trust) -> bytes:
    """The name of the run, once who keeps its notes has proven to know the secret."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    ask: Any = channel.unary_unary(f"/{SERVICE}/Meet")
    try:
        reply: bytes = ask(b"", timeout=MEET_S, metadata=((_NONCE, nonce),))
    except grpc.RpcError as error:
        failed = _call_of(error)
        kind: type[MoeserveError] = ConfigError if distrusts(failed) else UnavailableError
        raise kind(f"rank 0: {reason(failed)}") from error
    run, proof = reply[:_NONCE_BYTES], reply[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, proof_of_keeper(trust, nonce, run)):
        raise ConfigError(
            "who answers at rank 0's place does not know this group's secret: give all ranks the "
            "same ep_secret"
        )
    return run


def _call_of(error: grpc.RpcError) -> Any:
    """gRPC's errors of calls are calls; its type hints do not say so."""
    return error


def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft // _SHARE
    return max(1, min(_MOST_CONNECTIONS, limit))
