"""SIGHUP makes rank 0 read its plan again; without a plan the signal keeps its usual meaning."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moeserve.config.options import ServeConfig
from moeserve.gateway.server import Server


class LivePlan:
    def __init__(self) -> None:
        self.read: asyncio.Queue[Path] = asyncio.Queue()

    def reread(self, file: Path) -> None:
        self.read.put_nowait(file)


def server_with(live_plan: LivePlan | None, plan: Path | None) -> Server:
    server = Server(ServeConfig(model="demo", plan=plan))
    loaded: Any = SimpleNamespace(live_plan=live_plan)
    server.loaded = loaded
    return server


async def test_a_hangup_reads_the_plan_again() -> None:
    live_plan, file = LivePlan(), Path("plan.json")
    server_with(live_plan, file).reread_plan_on_hangup()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            assert await asyncio.wait_for(live_plan.read.get(), 20) == file
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


@pytest.mark.parametrize(("live_plan", "plan"), [(None, Path("plan.json")), (LivePlan(), None)])
async def test_without_ranks_or_a_plan_nothing_is_caught(
    live_plan: LivePlan | None, plan: Path | None
) -> None:
    server_with(live_plan, plan).reread_plan_on_hangup()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
