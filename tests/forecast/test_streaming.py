"""What is measured of streamed steps: each figure is found again where it is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moeserve.config.options import LoadOptions
from moeserve.forecast.beside import beside_reading
from moeserve.forecast.first_layers import first_layers, load_first_layers, with_small_head
from moeserve.forecast.steps import ProbedStep, seconds_of, slowness
from moeserve.forecast.streaming import LayerWait, SeenSteps, cost_of
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.model.machine import AttentionCost, MachineModel, ProductCurve
from moeserve.offload.model.overlap import Beside
from moeserve.offload.model.predict import StepPredictor

Tiny = Callable[[str], Path]
MIB = 1 << 20
EACH = 1e-3
ROWS = 64


@pytest.fixture(scope="module")
def ops() -> Ops:
    return choose_ops(threads=1)


def a_machine(beside: Beside) -> MachineModel:
    """A disk that reads a record of 1 MiB in a millisecond."""
    curve = ProductCurve((1.0, 64.0), (1e-10, 1e-9), (1e-10, 1e-9))
    return MachineModel(
        host="a host",
        measured="2026-01-01",
        shapes="any model",
        threads=1,
        isa="avx2",
        cache=MIB,
        memory={1: 1e10},
        disk={MIB: MIB / EACH},
        products={"fp32": curve, "bf16": curve},
        experts={"fp32": curve, "bf16": curve},
        attention={"fp32": AttentionCost(1e-10, 1e-10, 1e-10), "bf16": AttentionCost(*[1e-10] * 3)},
        beside=beside,
    )


@given(
    st.floats(0.3, 1.0),
    st.floats(0.7, 1.0),
    st.floats(0.0, 1e-3),
    st.floats(0.0, 2e-4),
    st.floats(1.0, 1.5),
)
def test_what_streaming_costs_is_found_again(
    computing: float, reading: float, layer: float, record: float, slower: float
) -> None:
    """From layers that read more than they have time for, on a host that is slower now."""
    real = Beside.of(computing, reading)
    seen = []
    for late, early in ((1.0, 4.0), (2.0, 9.0), (4.0, 16.0)):
        in_memory = EACH * early / 8
        own = slower * (in_memory + layer + record * (late + early))
        whole = late * EACH + real.seconds(own, early * EACH)
        took = min(own / real.computing, own + (1 - real.computing) / real.reading * early * EACH)
        assume(whole - took > (late + early / 4) * EACH)  # or nothing is seen of it
        wait = LayerWait(late, early, 0.0, took, whole - took)
        seen.append(SeenSteps(wait, late + early, slower * in_memory, slower))
    machine = a_machine(Beside.of(computing, 0.5))  # of reading it is the steps that tell
    found = cost_of(seen, machine, MIB, 0.7)
    assert found.beside.reading == pytest.approx(real.reading, abs=1e-3)
    assert found.layer == pytest.approx(layer, abs=2e-5)
    assert found.record == pytest.approx(record, abs=2e-6)
    assert (found.foreseen, found.slower) == (0.7, pytest.approx(1.0, abs=1e-3))


def test_products_and_reads_are_looked_at_beside_each_other(tmp_path: Path, ops: Ops) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(12 * MIB))
    found = beside_reading(file, ops)  # within what there may be, or it would be refused
    assert found.computing + found.reading >= 1


def test_a_large_head_does_not_hide_what_layers_take(
    tiny_checkpoint: Tiny, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are fewer, in what runs and in what is predicted of that."""
    folder = tiny_checkpoint("qwen3_moe")
    sizes = stored_sizes(folder)
    assert sizes.spec.vocab > ROWS
    monkeypatch.setattr("moeserve.forecast.first_layers.HEAD_ROWS", ROWS)
    deepest = first_layers(sizes)[-1]
    demand = demand_of(deepest, LoadOptions(), ops)
    assert demand.vocab == ROWS
    assert demand.head.weights == ROWS * sizes.spec.hidden
    whole = load_first_layers(folder, deepest.spec, ops, LoadOptions())
    assert whole.spec.vocab == sizes.spec.vocab
    decoder = with_small_head(whole, demand.head.kind)
    assert decoder.spec.vocab == ROWS
    assert with_small_head(decoder, demand.head.kind) is decoder
    assert min(seconds_of(decoder, ProbedStep(2, 8), time.perf_counter, ROWS)) > 0
    ticks = iter(range(1_000_000))
    predictor = StepPredictor(a_machine(Beside()), demand)
    slow = slowness(decoder, predictor, lambda: float(next(ticks)))
    twice = replace(predictor.machine.scaled(compute=0.5, memory=0.5))
    assert slow == pytest.approx(2 * slowness(decoder, StepPredictor(twice, demand), time_of(1.0)))


def time_of(step: float) -> Callable[[], float]:
    """A clock that is ``step`` further each time it is looked at."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step
        return now

    return clock
