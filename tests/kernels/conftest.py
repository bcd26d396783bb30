"""The native backend, once per instruction set that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moeserve.kernels.cpu.ops import CpuOps, _cpu


@pytest.fixture(params=_cpu.isas(), scope="module")
def native(request: pytest.FixtureRequest) -> Iterator[CpuOps]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    assert _cpu.isa() == request.param
    yield CpuOps()
    _cpu.set_isa(before)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Two threads even where there is one core: sharing must be exercised, not fast."""
    before = _cpu.threads()
    _cpu.set_threads(2)
    yield
    _cpu.set_threads(before)
