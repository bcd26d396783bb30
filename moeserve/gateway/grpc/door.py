"""The gRPC door: a server with ``moeserve.v1.Inference``, KServe's inference service, health and
reflection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moeserve.comm.control.idle_connections import IdleConnections
from moeserve.errors import ConfigError
from moeserve.gateway.descriptors import MOST
from moeserve.gateway.grpc.guards import BusyPeers, GrpcGuard
from moeserve.gateway.grpc.inference import SERVICE, InferenceMethods
from moeserve.gateway.grpc.kserve import KSERVE_SERVICE, KserveMethods
from moeserve.gateway.grpc.reads import MessageReads
from moeserve.gateway.http.server import address_of
from moeserve.gateway.limits import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from moeserve.gateway.service import InferenceService
from moeserve.gateway.trust.identity import Tenants

# A backstop far above ``MAX_CALLS``, which is told with a status.
MAX_STREAMS = 1 << 16
HANDSHAKE_MS = 10_000
IDLE_MS = 300_000
# How often a client may ping: some do every five seconds, with or without a call.
PING_MS = 2_000
# A client that does not answer is gone; ours notices a cable that was pulled.
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000
# Where a client of ``Watch`` does not read, its lock is held.
ANNOUNCE_S = 2.0

OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # Without this two servers share a port in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Calls that wait for this process to look at them: beyond a thousand gRPC begins to end some
    # as CANCELLED, without a word. Streams and connections are bounded, and so are these.
    ("grpc.server.max_pending_requests", 1 << 20),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 20),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_connection_idle_ms", IDLE_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
)


class GrpcDoor:
    """Owns a gRPC server; bound from the start, serving between ``open`` and ``close``."""

    def __init__(
        self,
        service: InferenceService,
        host: str,
        port: int,
        tenants: Tenants | None = None,
        with_reflection: bool = True,
        *,
        max_connections: int = MOST,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._health = health.aio.HealthServicer()
        busy = BusyPeers()
        self._server = grpc.aio.server(
            interceptors=[GrpcGuard(tenants, MessageReads(), busy)],
            options=(*OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections)),
        )
        # Services beside health, by name: what follows their state, and what reflection shows.
        services = {
            SERVICE: InferenceMethods(service).handlers(),
            KSERVE_SERVICE: KserveMethods(service).handlers(),
        }
        self._names: Sequence[str] = ("", *services)
        self._server.add_generic_rpc_handlers(tuple(services.values()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.port = self._bind(host, port, credentials)
        self.connections = IdleConnections(self.port, max_connections, busy.__contains__)
        self._watching: asyncio.Task[None] | None = None

    def _bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        address = address_of(host, port)
        try:
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise ConfigError(
                f"grpc_port={port}: cannot listen on {address}; taken, or not of this machine: "
                "choose another --grpc-port (0 for any free one) or --host"
            ) from error

    async def open(self) -> None:
        """Answers from now on; NOT_SERVING until ``announce``."""
        await self.announce(False)
        await self._server.start()
        self._watching = asyncio.create_task(self.connections.watch())

    async def announce(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._health.set(name, status.SERVING if serving else status.NOT_SERVING),
                    ANNOUNCE_S,
                )

    async def close(self, grace_s: float) -> None:
        """Refuses new calls, gives running ones ``grace_s``, then cancels them."""
        if self._watching is not None:
            self._watching.cancel()
        await self._server.stop(grace_s)
