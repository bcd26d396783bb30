"""The gRPC door: a server with ``moeserve.v1.Inference``, KServe's inference service, health and
reflection."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moeserve.errors import ConfigError
from moeserve.gateway.grpc.guards import GrpcKeyGuard
from moeserve.gateway.grpc.inference import SERVICE, InferenceMethods
from moeserve.gateway.grpc.kserve import KSERVE_SERVICE, KserveMethods
from moeserve.gateway.limits import MAX_MESSAGE_BYTES
from moeserve.gateway.service import InferenceService

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Without this two servers share a port in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class GrpcDoor:
    """Owns a gRPC server; bound from the start, serving between ``open`` and ``close``."""

    def __init__(
        self,
        service: InferenceService,
        host: str,
        port: int,
        api_key: str | None = None,
        with_reflection: bool = True,
    ) -> None:
        self._health = health.aio.HealthServicer()
        guards = [] if api_key is None else [GrpcKeyGuard(api_key)]
        self._server = grpc.aio.server(interceptors=guards, options=_OPTIONS)
        methods = (InferenceMethods(service), KserveMethods(service))
        self._server.add_generic_rpc_handlers([m.handlers() for m in methods])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            names = (SERVICE, KSERVE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise ConfigError(
                f"grpc_port={port}: cannot listen on {address}; taken, or not of this machine: "
                "choose another --grpc-port (0 for any free one) or --host"
            ) from error

    async def open(self) -> None:
        """Answers from now on; NOT_SERVING until ``announce``."""
        await self.announce(False)
        await self._server.start()

    async def announce(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE, KSERVE_SERVICE):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def close(self, grace_s: float) -> None:
        """Refuses new calls, gives running ones ``grace_s``, then cancels them."""
        await self._server.stop(grace_s)
