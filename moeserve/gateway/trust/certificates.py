"""TLS of both doors, from files that may change while serving.

New connections get what was read last; running ones go on with what they began with. With
authorities for clients, a client without a certificate of one of them gets no connection.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from moeserve.errors import ConfigError

MAX_FILE_BYTES = 1 << 20


class ServerTls:
    """Owns what the files said when they were read last. ConfigError where they are of no use."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self.read()

    @property
    def files(self) -> tuple[Path, ...]:
        rest = () if self._client_ca is None else (self._client_ca,)
        return (self._cert, self._key, *rest)

    def read(self) -> None:
        """All files again, together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        cert, key = _bytes_of("tls_cert", self._cert), _bytes_of("tls_key", self._key)
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self._cert, self._key, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"tls_cert={str(self._cert)!r}, tls_key={str(self._key)!r}: expected a chain and "
                f"its key in PEM, without a password ({error})"
            ) from error
        ca = None
        if self._client_ca is not None:
            ca = _bytes_of("tls_client_ca", self._client_ca)
            try:
                context.load_verify_locations(cadata=ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise ConfigError(
                    f"tls_client_ca={str(self._client_ca)!r}: expected certificates in PEM"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        self._context = context
        self._grpc = grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def context(self) -> ssl.SSLContext:
        """For a new connection over HTTP."""
        return self._context

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server, which asks again for every new connection."""
        given = self._grpc

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if given is self._grpc:
                return None
            given = self._grpc
            return given

        # Its documentation allows None for "as before"; its types do not.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", newer)
        return grpc.dynamic_ssl_server_credentials(
            given, fetch, require_client_authentication=self._client_ca is not None
        )


def _bytes_of(name: str, file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}={str(file)!r}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}={str(file)!r}: is longer than {MAX_FILE_BYTES} bytes")
    return raw
