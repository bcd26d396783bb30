"""Members that have the demo model, each a process of its own, and what reaches them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moeserve.comm.control.rpc import Trust
from moeserve.models.library import resolve_model
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.members import Member, Role
from moeserve.pools.weights.manifest import Manifest, manifest_of

HOLDER = Path(__file__).with_name("holder_process.py")
CACHE = Path(__file__).parents[1] / "cache/cache_process.py"


@dataclass
class Holder:
    """A process, and the member that it is."""

    process: subprocess.Popen[str]
    member: Member


StartHolder = Callable[..., Holder]


@pytest.fixture
def start_holder() -> Iterator[StartHolder]:
    """``flips`` chunks change on their way, and each takes ``pause_s``; or a cache member."""
    started: list[subprocess.Popen[str]] = []

    def start(
        name: str, *, flips: int = 0, pause_s: float = 0.0, cache: Path | None = None
    ) -> Holder:
        words = [str(HOLDER), str(resolve_model("demo")), str(flips), str(pause_s)]
        if cache is not None:
            words = [str(CACHE), str(cache), str(256 << 20), str(256 << 20)]
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        role = Role.UNIFIED if cache is None else Role.CACHE
        return Holder(process, Member(name, name, role, f"127.0.0.1:{port}"))

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def demo() -> Manifest:
    return manifest_of(resolve_model("demo"), "demo")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return resolve_model("demo")


@pytest.fixture
def make_channels() -> Callable[[], ChannelPool]:
    """To be made on an event loop."""
    return lambda: ChannelPool(Trust(), b"run")
