"""Movers, both, and files of known bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moeserve.offload.mover import DiskMover, NativeMover, PlainMover
from moeserve.offload.native import native_half

BUILT = importlib.util.find_spec("moeserve.offload._mover") is not None

MakeMover = Callable[..., DiskMover]


@pytest.fixture(params=["plain", "native"] if BUILT else ["plain"])
def make_mover(request: pytest.FixtureRequest) -> Iterator[MakeMover]:
    opened: list[DiskMover] = []

    def make(**how: int) -> DiskMover:
        if request.param == "plain":
            opened.append(PlainMover(**how))
        else:
            module, reason = native_half()
            assert module is not None, reason
            opened.append(NativeMover(module, **how))
        return opened[-1]

    yield make
    for mover in opened:
        mover.close()


@pytest.fixture
def mover(make_mover: MakeMover) -> DiskMover:
    return make_mover()


@pytest.fixture
def noise(tmp_path: Path) -> Callable[[int], tuple[Path, bytes]]:
    """A file of so many random bytes, and these."""

    def write(nbytes: int) -> tuple[Path, bytes]:
        data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8).tobytes()
        file = tmp_path / f"noise-{nbytes}.bin"
        file.write_bytes(data)
        return file, data

    return write
