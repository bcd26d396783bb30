"""The routes of the dashboard.

The page itself is the same for everybody and says nothing: it needs no key. What it shows comes by
``/dashboard/events``, behind the same guards as any other route. A browser sends no key by itself,
so the page asks for one where it is refused, and keeps it for as long as its tab is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeserve.errors import UnavailableError
from moeserve.gateway.dashboard.feed import SnapshotFeed
from moeserve.gateway.http.failures import Endpoint, failed_response

PAGE = "/dashboard"
EVENTS = "/dashboard/events"
FILES: Mapping[str, tuple[str, str]] = {
    PAGE: ("page.html", "text/html; charset=utf-8"),
    "/dashboard/page.css": ("page.css", "text/css; charset=utf-8"),
    "/dashboard/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# Nothing but the page's own files, whatever a member calls itself.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def dashboard_routes(feed: SnapshotFeed) -> list[tuple[str, str, Endpoint]]:
    """Method, path and endpoint of each."""

    async def events(_: Request) -> Response:
        return SnapshotStream(feed)

    files = [("GET", path, _file(name, kind)) for path, (name, kind) in FILES.items()]
    return [*files, ("GET", EVENTS, events)]


def _file(name: str, kind: str) -> Endpoint:
    content = resources.files("moeserve.gateway.dashboard").joinpath(name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, headers={**HEADERS, "content-type": kind})

    return endpoint


class SnapshotStream(Response):
    """Server-sent events, each a snapshot, for as long as the client listens."""

    def __init__(self, feed: SnapshotFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._tell(scope, receive, send))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            left.cancel()
            await asyncio.wait({work, left})
        if not work.cancelled():
            work.result()

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        snapshots = self._feed.watch()
        started = False
        try:
            async for snapshot in snapshots:
                if not started:
                    started = True
                    await send(_head())
                body = f"event: snapshot\ndata: {snapshot}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except UnavailableError as error:
            await failed_response(error)(scope, receive, send)
            return
        finally:
            await snapshots.aclose()
        if started:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await failed_response(UnavailableError("the server stops"))(scope, receive, send)


def _head() -> dict[str, object]:
    headers = {
        **HEADERS,
        "content-type": "text/event-stream; charset=utf-8",
        "x-accel-buffering": "no",
    }
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": named}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
