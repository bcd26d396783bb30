"""Both doors as the settings want them: who may come in, over what, and how many.

Files of keys and certificates are watched while the doors are open.
"""

from __future__ import annotations

import asyncio

from moeserve.config.options import DoorOptions
from moeserve.errors import ConfigError
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.descriptors import connections_of_a_door
from moeserve.gateway.grpc.door import GrpcDoor
from moeserve.gateway.http.access import AccessLog
from moeserve.gateway.http.app import MetricsPage, http_app
from moeserve.gateway.http.guards import HostRules, host_rules
from moeserve.gateway.http.server import HttpServer, no_tls
from moeserve.gateway.service import InferenceService
from moeserve.gateway.trust.certificates import ServerTls
from moeserve.gateway.trust.file_watch import FileWatch
from moeserve.gateway.trust.identity import DEFAULT_TENANT, Tenants, read_keys


class Entrance:
    """Owns the doors: bound from the start, they answer between ``open`` and ``close``."""

    def __init__(
        self,
        service: InferenceService,
        config: DoorOptions,
        metrics: MetricsPage,
        farewell_s: float,
        dashboard: Dashboard | None = None,
    ) -> None:
        self._config = config
        self._farewell_s = farewell_s
        self._dashboard = dashboard
        self._watches: list[FileWatch] = []
        self._watching: list[asyncio.Task[None]] = []
        self.grpc: GrpcDoor | None = None
        self.http: HttpServer | None = None
        tenants = self._tenants()
        tls = self._tls()
        ports = (config.http_port, config.grpc_port)
        doors = sum(port is not None for port in ports)
        most = connections_of_a_door(config.max_connections, doors) if doors else 0
        if config.http_port is not None:
            feed = None if dashboard is None else dashboard.feed
            self.http = HttpServer(
                AccessLog(http_app(service, tenants, metrics, _rules(config), feed)),
                config.host,
                config.http_port,
                farewell_s,
                max_connections=most,
                idle_s=config.idle_timeout_s,
                tls=no_tls if tls is None else tls.context,
            )
        if config.grpc_port is not None:
            try:
                self.grpc = GrpcDoor(
                    service,
                    config.host,
                    config.grpc_port,
                    tenants,
                    config.loopback if config.reflection is None else config.reflection,
                    max_connections=most,
                    credentials=None if tls is None else tls.credentials(),
                )
            except BaseException:  # whatever it is goes on up; the port must not stay taken
                self.release()
                raise

    async def open(self) -> None:
        """Both doors answer UNAVAILABLE until the service has a model."""
        if self.grpc is not None:
            await self.grpc.open()
        if self.http is not None:
            self.http.open()
            if self._dashboard is not None:
                self._dashboard.open()
        self._watching = [asyncio.create_task(watch.watch()) for watch in self._watches]

    async def announce(self, serving: bool) -> None:
        """Through gRPC's health service; over HTTP the service's own state says it."""
        if self.grpc is not None:
            await self.grpc.announce(serving)

    def release(self) -> None:
        """What was bound and never opened."""
        if self.http is not None:
            self.http.release()

    async def close(self) -> None:
        for task in self._watching:
            task.cancel()
        await self.announce(False)
        if self._dashboard is not None:
            await self._dashboard.close()
        if self.grpc is not None:
            await self.grpc.close(self._farewell_s)
        if self.http is not None:
            await self.http.close()

    def _tenants(self) -> Tenants | None:
        """None where everybody may come in."""
        one = self._config.api_key
        file = self._config.api_key_file
        if file is None:
            return None if one is None else Tenants({"": one.get_secret_value()})
        own = {} if one is None else {DEFAULT_TENANT: one.get_secret_value()}
        tenants = Tenants(own | read_keys(file))
        self._watches.append(FileWatch([file], lambda: tenants.replace(own | read_keys(file))))
        return tenants

    def _tls(self) -> ServerTls | None:
        config = self._config
        if config.tls_cert is None and config.tls_key is None and config.tls_client_ca is None:
            return None
        if config.tls_cert is None or config.tls_key is None:
            raise ConfigError("TLS takes both: set tls_cert and tls_key")
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
        self._watches.append(FileWatch(tls.files, tls.read))
        return tls


def _rules(config: DoorOptions) -> HostRules:
    return host_rules(
        config.host,
        config.loopback,
        _words(config.allowed_hosts),
        _words(config.allowed_origins),
    )


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
