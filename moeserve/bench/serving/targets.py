"""What a server must be able to do to be driven; its address and certificates.

A target turns a planned request into what is sent, ahead of time, and sends it when told: the
answer goes into a record, message by message. Addresses are URLs: ``http://host:port``, ``https``,
``grpc`` and ``grpcs``, the two last with TLS.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from moeserve.bench.serving.outcomes import AnswerRecord
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.errors import ConfigError
from moeserve.regular_file import open_regular

SCHEMES = ("http", "https", "grpc", "grpcs")
MAX_FILE_BYTES = 1 << 20
SETUP_S = 30.0  # for what is asked before the run

Prepared = TypeVar("Prepared")


class ServingTarget(Protocol[Prepared]):
    """A server under load; ``send`` may run any number of times at once."""

    def prepare(self, request: PlannedRequest) -> Prepared:
        """What is sent for it. ConfigError where this target takes no such prompt."""
        ...

    async def send(self, prepared: Prepared, record: AnswerRecord) -> None:
        """Returns when the answer is whole and in ``record``; RequestFailed says what went wrong.
        Whoever calls sets a deadline, by cancelling."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TargetAddress:
    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def tls(self) -> bool:
        return self.scheme in ("https", "grpcs")

    @property
    def over_grpc(self) -> bool:
        return self.scheme.startswith("grpc")

    @property
    def place(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(url: str) -> TargetAddress:
    """ConfigError where it is no address of a target. A path is a prefix: /v1 is added to it."""
    try:
        read = urlsplit(url)
        port = read.port
    except ValueError as error:
        raise ConfigError(f"--target={url!r}: {error}") from error
    if read.scheme not in SCHEMES or not read.hostname:
        raise ConfigError(
            f"--target={url!r}: expected {', '.join(SCHEMES)}, as in http://host:8000"
        )
    if read.username is not None or read.query or read.fragment:
        raise ConfigError(f"--target={url!r}: expected scheme, host, port and path alone")
    path = read.path.rstrip("/").removesuffix("/v1")
    if path and read.scheme.startswith("grpc"):
        raise ConfigError(f"--target={url!r}: gRPC has no path")
    if port is None:
        if read.scheme.startswith("grpc"):
            raise ConfigError(f"--target={url!r}: say the port, gRPC has no usual one")
        port = 443 if read.scheme == "https" else 80
    if not (read.hostname + path).isascii() or any(c.isspace() for c in path):
        raise ConfigError(f"--target={url!r}: expected ASCII without spaces")
    return TargetAddress(read.scheme, read.hostname, port, path)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Files in PEM: who signs the server's certificate (default: whom the system trusts), and our
    own certificate with its key, for a server that asks for one."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("--tls-cert and --tls-key are given together")

    def context(self) -> ssl.SSLContext:
        try:
            made = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.cert is not None:
                # Without a password OpenSSL would ask for one on the terminal.
                made.load_cert_chain(self.cert, self.key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigError(
                "--tls-ca, --tls-cert, --tls-key: expected files in PEM, without a password: "
                f"{error}"
            ) from error
        made.set_alpn_protocols(["http/1.1"])
        return made

    def pem(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Authorities, key, certificate."""
        return (
            _content("--tls-ca", self.ca),
            _content("--tls-key", self.key),
            _content("--tls-cert", self.cert),
        )


def _content(flag: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        file = open_regular(path)
        if file is None:
            raise ConfigError(f"{flag}={str(path)!r}: is no regular file")
        with file:
            found = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}={str(path)!r}: cannot be read: {error.strerror}") from error
    if len(found) > MAX_FILE_BYTES:
        raise ConfigError(f"{flag}={str(path)!r}: is longer than {MAX_FILE_BYTES} bytes")
    return found


def read_key(path: Path) -> str:
    """The one line of a file that holds the key of a client."""
    try:
        lines = (_content("--api-key-file", path) or b"").decode("ascii").split()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--api-key-file={str(path)!r}: a key is ASCII") from error
    if len(lines) != 1:
        raise ConfigError(f"--api-key-file={str(path)!r}: expected one key, and nothing else")
    return lines[0]
