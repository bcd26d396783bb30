"""The probe measures every way this machine has, and no way that it lacks."""

from __future__ import annotations

import pytest

from moeserve.kernels import probe
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.probe import KINDS, probe_machine

SMALL = 8 << 20
SLOWEST, FASTEST = 1e6, 1e16  # of any machine that runs this, per second
WAYS = [(kind, way) for kind in KINDS for way in _cpu.probe_ways(kind)]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_each_way_gives_a_sane_rate_per_round(kind: str, way: str) -> None:
    for threads in (1, 2, 3):
        rates = _cpu.probe(kind, way, threads, 2, 0.0, SMALL)
        assert len(rates) == 2
        assert all(SLOWEST < rate < FASTEST for rate in rates), (threads, rates)


def test_the_portable_way_is_everywhere_and_last() -> None:
    assert {kind: _cpu.probe_ways(kind)[-1] for kind in KINDS} == dict.fromkeys(KINDS, "portable")


def test_a_way_this_machine_lacks_is_refused_not_tried() -> None:
    with pytest.raises(ValueError, match="'sse9' is not one of"):
        _cpu.probe("int8", "sse9", 1, 1, 0.0, SMALL)
    with pytest.raises(ValueError, match="'fp4' is not read"):
        _cpu.probe_ways("fp4")


@pytest.mark.parametrize(("threads", "rounds", "size"), [(0, 1, SMALL), (1, 0, SMALL), (3, 1, 2)])
def test_a_probe_of_nothing_is_refused(threads: int, rounds: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        _cpu.probe("read", "portable", threads, rounds, 0.0, size)


def test_a_machine_is_probed_by_its_best_instructions() -> None:
    machine = probe_machine(2, size=SMALL, rounds=2, seconds=0.0)
    assert machine.threads == 2
    for kind, rate in zip(KINDS[1:], (machine.int8, machine.bf16, machine.fp32), strict=True):
        assert rate is not None
        assert rate.way == _cpu.probe_ways(kind)[0]
        assert SLOWEST < rate.median <= rate.best < FASTEST


def test_without_the_native_half_numpy_measures_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "native_half", lambda: None)
    machine = probe_machine(2, size=SMALL, rounds=3)
    assert machine.read.way == "numpy"
    assert SLOWEST < machine.read.median <= machine.read.best
    assert machine.int8 is machine.bf16 is machine.fp32 is None
