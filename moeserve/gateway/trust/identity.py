"""Who a request is from: keys with names, and the tenant that each name is.

A key comes as ``authorization: Bearer KEY``; where there are no keys everybody is the tenant
``""``. Keys are compared by their digests, each with every one, so that time tells nothing.

The tenant of a running request is kept in a context variable, set by the door's guard and read by
the service: what separates tenants then holds for every route, also one that knows nothing of it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from moeserve.errors import ConfigError

MAX_KEYS = 1024
MAX_FILE_BYTES = 1 << 20
MIN_KEY_CHARS = 8
MAX_KEY_CHARS = 512
# The tenant of ``--api-key``.
DEFAULT_TENANT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_KEY = re.compile(r"[!-~]+")
_tenant: ContextVar[str] = ContextVar("tenant", default="")


def tenant() -> str:
    """Whose request this task serves; ``""`` where there are no keys."""
    return _tenant.get()


def serve_tenant(name: str) -> None:
    """This task, and those it starts, serve a request of this tenant; both doors give every
    request a task of its own."""
    _tenant.set(name)


def tenant_salt(name: str, salt: str) -> str:
    """What separates the tenant's prefix cache: of each pair another one, and of no bytes that a
    client chooses the one of another tenant."""
    if not name:
        return salt
    return hashlib.sha256(f"{name}\0{salt}".encode()).hexdigest()


class Tenants:
    """Keys to names. ``replace`` takes effect with the next request."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """``keys`` are by name."""
        self._names: dict[bytes, str] = {}
        self.replace(keys)

    def replace(self, keys: Mapping[str, str]) -> None:
        self._names = {_digest(f"Bearer {key}".encode()): name for name, key in keys.items()}

    def of(self, authorization: bytes) -> str | None:
        """Whose the header is; None where it is nobody's."""
        given, found = _digest(authorization), None
        for digest, name in self._names.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def read_keys(file: Path) -> dict[str, str]:
    """``NAME:KEY`` lines, by name; empty lines and those that begin with ``#`` say nothing.
    ConfigError names file and line, never a key."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
        text = raw.decode()
    except OSError as error:
        raise ConfigError(
            f"api_key_file={str(file)!r}: cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_key_file={str(file)!r}: is not UTF-8") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"api_key_file={str(file)!r}: is longer than {MAX_FILE_BYTES} bytes")
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.partition(":"))
        where = f"api_key_file={str(file)!r}, line {number}"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: expected NAME:KEY, with a name of letters and digits")
        if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{where}: the key of {name!r} must be {MIN_KEY_CHARS} to {MAX_KEY_CHARS} "
                "printable ASCII characters without spaces"
            )
        if name in keys or key in keys.values():
            raise ConfigError(f"{where}: {name!r} or its key is there already; keep one")
        keys[name] = key
    if not 1 <= len(keys) <= MAX_KEYS:
        raise ConfigError(
            f"api_key_file={str(file)!r}: has {len(keys)} keys, expected 1 to {MAX_KEYS}"
        )
    return keys


@dataclass(slots=True)
class TenantUsage:
    """What a tenant has used since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
