"""A cluster that was made up, shown at a real door; and a browser that looks at it."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from moeserve.gateway.dashboard.history import SloTargets
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.dashboard.snapshot import ExpertLoads, Flow
from moeserve.gateway.http.app import http_app
from moeserve.gateway.http.server import HttpServer
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.service import InferenceService
from moeserve.observe.requests import OK, RequestRecord
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms

PATIENCE_S = 60.0


class MadeUpCluster:
    """A ``SnapshotSource`` whose numbers a test sets; each ``refresh`` moves some more KV."""

    def __init__(self) -> None:
        self.names = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.CACHE: "cache"}
        self.moved = 0
        self.heat: ExpertLoads | None = ExpertLoads(
            (1, 2, 3), np.random.default_rng(3).integers(1, 90, (3, 16))
        )

    async def refresh(self) -> None:
        self.moved += 3 << 20

    def reports(self) -> Sequence[Report]:
        return [
            Report(
                Member(
                    id=f"{role}-{number}",
                    instance=f"{self.names[role]}-{number}",
                    role=role,
                    address=f"10.0.0.{number}:7000",
                    terms=ServedTerms("made-up"),
                ),
                MemberLoad(
                    running=2 + number,
                    waiting=number,
                    waiting_tokens=300 * number,
                    free_blocks=100 * number,
                    total_blocks=512,
                    prefill_rate=1234.5,
                    step_s=0.021,
                    draining=role is Role.DECODE and number == 1,
                    stored_bytes=900 << 20,
                    capacity_bytes=2 << 30,
                ),
            )
            for role in self.names
            for number in (0, 1)
        ]

    def flows(self) -> Sequence[Flow]:
        pairs = [(s, t) for s in (0, 1) for t in (0, 1)]
        return [Flow(f"prefill-{s}", f"decode-{t}", self.moved, self.moved >> 16) for s, t in pairs]

    def experts(self) -> ExpertLoads | None:
        return self.heat

    def counts(self) -> Mapping[str, float]:
        return {"requests_resumed": 3, "migrations": 2}


class Stage:
    """A door with nothing behind it but the dashboard, on its own thread; it may be opened again at
    the same port."""

    def __init__(self) -> None:
        self.cluster = MadeUpCluster()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="stage")
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        service = InferenceService(Mailbox(self._loop))
        dashboard = Dashboard(service, SloTargets(1.0, 0.1))
        dashboard.show(self.cluster)
        dashboard.on_request(RequestRecord("x", "made-up", OK, 2.0, ttft_s=0.5, tpot_s=0.05))
        dashboard.on_request(RequestRecord("y", "made-up", OK, 9.0, ttft_s=5.0, tpot_s=0.05))
        app = http_app(service, None, _no_metrics, dashboard=dashboard.feed)
        server = HttpServer(app, "127.0.0.1", self.port, 1.0)
        self.port = server.port
        server.open()
        dashboard.open()
        self._ready.set()
        await self._end.wait()
        await dashboard.close()
        await server.close()
        await service.texts.close()


async def _no_metrics() -> tuple[bytes, str]:
    return b"", "text/plain"


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.open()
    try:
        yield stage
    finally:
        stage.close()


class Window:
    """A page of the browser, and all that it asked for and complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._said)

    def until(self, condition: str) -> None:
        """Waits for a condition of JavaScript. Playwright's own way to do so is one that the page's
        policy forbids."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"not in time: {condition}"
            self.page.wait_for_timeout(50)

    def watch(self, url: str) -> None:
        """Opens the dashboard and waits for its first snapshot."""
        self.page.goto(f"{url}/dashboard")
        self.until("document.getElementById('link').textContent === 'live'")

    def text(self, element: str) -> str:
        return str(self.page.locator(f"#{element}").inner_text())

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium is installed here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture
def new_window(chromium: Any) -> Iterator[Callable[..., Window]]:
    """A window of a browser that remembers nothing; settings are Playwright's of a context."""
    contexts: list[Any] = []

    def build(**settings: Any) -> Window:
        contexts.append(chromium.new_context(**settings))
        return Window(contexts[-1].new_page())

    yield build
    for context in contexts:
        context.close()
