"""Who may call: from pages that may, and with a key where there are keys.

A browser sends what any page tells it to, and a page can give its own name this server's address
(DNS rebinding): only ``Host`` and ``Origin`` then tell that the request was not meant for us.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from moeserve.errors import ForbiddenError, UnauthenticatedError
from moeserve.gateway.dashboard.routes import FILES
from moeserve.gateway.http.failures import failed_response
from moeserve.gateway.trust.identity import Tenants, serve_tenant

# Health checks, and a page that says nothing without a key.
_OPEN_PATHS = frozenset({"/health", "/ready", *FILES})
ANY = "*"


class KeyGuard:
    """Lets only ``_OPEN_PATHS`` through without ``authorization: Bearer KEY``, or ``x-api-key:
    KEY`` as Anthropic's clients send it."""

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization") or b"Bearer " + headers.get(b"x-api-key", b"")
        name = self._tenants.of(given)
        if name is None:
            error = UnauthenticatedError("send the api key as header 'Authorization: Bearer KEY'")
            await failed_response(error)(scope, receive, send)
            return
        serve_tenant(name)
        await self._app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class HostRules:
    """Which names clients may have asked for. ``hosts`` None takes any; loopback's own names are
    always taken. ``origins`` are those of pages, as browsers spell them, that may call and read."""

    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()

    def takes_host(self, host: str) -> bool:
        name = _name_of(f"//{host}")
        return self.hosts is None or name in self.hosts or _is_loopback(name)

    def takes_origin(self, origin: str, host: str) -> bool:
        """A page of the host that was asked, of one that may be asked, or one that was named."""
        if ANY in self.origins or origin in self.origins:
            return True
        name = _name_of(origin)
        if not name or "://" not in origin:
            return False
        same = urlsplit(origin).netloc.lower() == host.lower()
        return (self.hosts is None and same) or (
            self.hosts is not None and (name in self.hosts or _is_loopback(name))
        )


class HostGuard:
    """Refuses requests that were meant for another host, or come from a page of another."""

    def __init__(self, app: ASGIApp, rules: HostRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            origin = headers.get(b"origin")
            error = None
            # HTTP/1.0 has no Host, and no browser speaks it.
            if host and not self._rules.takes_host(host):
                error = ForbiddenError(
                    f"host {host!a:.100} is not served here: ask for the address that the server "
                    "listens on, or start it with --allowed-hosts"
                )
            elif origin is not None and not self._rules.takes_origin(
                origin.decode("latin-1"), host
            ):
                error = ForbiddenError(
                    f"pages of {origin.decode('latin-1')!a:.100} may not call this server: start "
                    "it with --allowed-origins"
                )
            if error is not None:
                await failed_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def guarded(app: ASGIApp, tenants: Tenants | None, rules: HostRules) -> ASGIApp:
    """``app`` behind all guards; a preflight is answered without a key, as browsers send none."""
    if tenants is not None:
        app = KeyGuard(app, tenants)
    if rules.origins:
        app = CORSMiddleware(
            app,
            allow_origins=sorted(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id"],
        )
    return HostGuard(app, rules)


def host_rules(
    bound: str, loopback: bool, hosts: Collection[str], origins: Collection[str]
) -> HostRules:
    """For a server that listens on ``bound``. On loopback, and where ``hosts`` are given, only they
    and the address itself are taken; elsewhere the key is what keeps strangers out."""
    names = None if ANY in hosts or not (hosts or loopback) else frozenset(hosts) | {bound}
    return HostRules(
        None if names is None else frozenset(name.lower().strip("[]") for name in names),
        frozenset(origin.rstrip("/") for origin in origins),
    )


def _name_of(address: str) -> str:
    """The host of a URL or of ``//host:port``; empty where there is none."""
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
