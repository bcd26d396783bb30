"""What doctor says beforehand, and the measurements that it says it with."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.config.options import EngineOptions, LoadOptions, RankModelOptions, StepOptions
from moeserve.engine.draft_loading import load_draft
from moeserve.errors import ConfigError
from moeserve.forecast.disk import disk_rates, file_to_read
from moeserve.forecast.drafts import draft_sizes
from moeserve.forecast.first_layers import cut, first_layers, load_first_layers
from moeserve.forecast.kernel_costs import KernelCosts, middle
from moeserve.forecast.kernels import KernelProbe
from moeserve.forecast.predictions import ForecastQuestion, ForecastReport, forecast
from moeserve.forecast.rest import not_falling, share_of_kernels, with_what_is_left
from moeserve.forecast.shapes import ANY_MODEL, KernelShapes, shapes_of
from moeserve.forecast.shown import tables
from moeserve.forecast.step_costs import predicted_steps
from moeserve.forecast.steps import (
    KINDS,
    LONG,
    SHALLOW_KINDS,
    STEPS,
    AnsweringDecoder,
    ProbedStep,
    TimedStep,
    counted_use,
    seconds_of,
    with_use,
)
from moeserve.forecast.streaming import (
    LayerWait,
    account_cost,
    bytes_to_count,
    habits_of_all_layers,
    slower_disk,
    streamed_first_layers,
    streaming_cost,
)
from moeserve.forecast.targets import missed_targets
from moeserve.forecast.timing import CallTimer
from moeserve.host import read_cache
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.models.packed.writer import pack_model
from moeserve.models.survey import survey
from moeserve.offload.calibrations import file_of, find, host_name, keep, read_calibration
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.machine import AttentionCost, MachineModel, ProductCurve
from moeserve.offload.model.overheads import Overheads, RestCurve
from moeserve.offload.model.predict import StepPredictor

Tiny = Callable[[str], Path]
MIB = 1 << 20
QUICK = CallTimer(seconds=0.0005)
TINY = KernelShapes(64, 96, 8, 2, 32, 4, 2, 16, 16, latent=False)


def a_machine(**changes: Any) -> MachineModel:
    """Of this host; everything is ten times as fast in 8 bits as in 16."""
    kinds = {"fp32": 4.0, "bf16": 2.0, "int8": 0.2, "int4": 0.1}
    rows = (1.0, 8.0, 64.0, 512.0)
    curves = {}
    for kind, factor in kinds.items():
        seconds = tuple(factor * max(1e-10, r * 1e-11) for r in rows)
        curves[kind] = ProductCurve(rows, seconds, seconds)
    attention = {
        f"{kind}{latent}": AttentionCost(2e-10 * kinds[kind], 1e-10 * kinds[kind], 1e-11)
        for kind in ("fp32", "bf16", "int8")
        for latent in ("", "-latent")
    }
    machine = MachineModel(
        host=host_name(),
        measured="2026-01-01 00:00 UTC",
        shapes=ANY_MODEL,
        threads=1,
        isa="avx2",
        cache=1 << 20,
        memory={1: 20e9},
        disk={1 << 20: 1e9},
        products=curves,
        experts=curves,
        attention=attention,
        overheads=Overheads(step=1e-4, layer=1e-5),
    )
    return dataclasses.replace(machine, **changes)


def asked(budget: int = 1 << 30, **options: Any) -> ForecastQuestion:
    return ForecastQuestion(64, 16, (1, 8), budget, 100 * MIB, RankModelOptions(**options))


@pytest.fixture(scope="module")
def ops() -> Ops:
    return choose_ops(threads=1)


def predicted(ops: Ops, question: ForecastQuestion, machine: MachineModel | None) -> ForecastReport:
    return forecast(stored_sizes(resolve_model("demo")), question, ops, machine)


# --- what a checkpoint asks for ---


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v2_lite", "qwen2_moe", "qwen3_moe", "mixtral_llama3"]
)
def test_what_a_model_asks_for_is_what_its_survey_says(
    tiny_checkpoint: Tiny, ops: Ops, family: str
) -> None:
    folder = tiny_checkpoint(family)
    found, sizes = survey(folder), stored_sizes(folder)
    demand = demand_of(sizes, LoadOptions(), ops)
    assert sizes.total - (sizes.head if found.spec.tied_embeddings else 0) == found.weight_bytes
    assert demand.num_layers == len(found.spec.layers)
    assert demand.max_positions == found.spec.max_positions
    assert demand.touched_bytes(1) == pytest.approx(found.active_bytes, rel=0.02)
    assert demand.kv_bytes_per_token == found.kv_bytes_per_token


def test_a_packed_folder_asks_for_what_its_source_asks_for(
    tiny_checkpoint: Tiny, ops: Ops, tmp_path: Path
) -> None:
    for family in ("qwen2_moe", "deepseek_v3"):
        source, packed = tiny_checkpoint(family), tmp_path / family
        pack_model(source, packed, ops, LoadOptions())
        plain, same = stored_sizes(source), stored_sizes(packed)
        assert same.spec == plain.spec
        assert same.floats == plain.floats
        assert (same.embedding, same.head) == (plain.embedding, plain.head)
        for of, other in zip(same.layers, plain.layers, strict=True):
            assert of.keys() == other.keys()
            # Records are whole pages, norms go with what they are packed beside.
            assert {p: of[p] for p in of if p != "experts"} == pytest.approx(
                {p: other[p] for p in of if p != "experts"}, rel=0.05
            )
            assert of.get("experts", 0) >= other.get("experts", 0)


def test_rounding_changes_what_is_rounded(tiny_checkpoint: Tiny, ops: Ops) -> None:
    folder = tiny_checkpoint("qwen3_moe")

    def of(**options: Any) -> tuple[str, str, str, int]:
        given = LoadOptions(**options)
        demand = demand_of(stored_sizes(folder, given), given, ops)
        layer = next(layer for _, layer in demand.layers if layer.experts)
        assert layer.experts
        return (
            layer.always[0].kind, layer.experts.each.kind, demand.head.kind, demand.weight_bytes
        )  # fmt: skip

    assert of()[:3] == ("fp32", "fp32", "fp32")
    assert of(dtype="bfloat16")[:3] == ("bf16", "bf16", "bf16")
    assert of(quantization="int8")[:3] == ("int8", "int8", "int8")
    assert of(quantization="int4")[:3] == ("int8", "int4", "int8")
    assert of(quantization="int8", quantize_attention=False)[0] == "fp32"
    sizes_of = [of()[3], of(dtype="bfloat16")[3], of(quantization="int8")[3]]
    assert sizes_of == sorted(sizes_of, reverse=True)


# --- predictions ---


def test_a_forecast_says_what_fits_and_how_fast(ops: Ops) -> None:
    report = predicted(ops, asked(), a_machine())
    assert report.fits
    assert report.in_memory == 1
    assert report.parts.total <= report.budget
    assert report.calibration == a_machine().name
    assert [w.batch for w in report.workloads] == [1, 8]
    for w in report.workloads:
        assert 0 < w.generated_per_s <= w.bound
        assert w.seconds == pytest.approx(w.batch * 16 / w.generated_per_s)
    told = json.loads(json.dumps(report.to_json()))
    assert told["workloads"][1]["generated_per_s"] == report.workloads[1].generated_per_s
    assert told["total"] == report.parts.total


def test_targets_that_would_be_missed_are_said(ops: Ops) -> None:
    report = predicted(ops, asked(), a_machine())
    none = StepOptions(ttft_target=3_600_000, tpot_target=3_600_000)
    assert list(missed_targets(report, none)) == list(missed_targets(report, StepOptions())) == []
    one, many = report.workloads
    between = StepOptions(tpot_target=500 * (one.tpot_s + many.tpot_s))
    (said,) = missed_targets(report, between)
    assert said.startswith(f"--tpot-target {between.tpot_target:g}: 8 requests at once")
    assert len(list(missed_targets(report, StepOptions(ttft_target=1e-6)))) == 2


def test_without_a_calibration_only_sizes_are_said(ops: Ops) -> None:
    report = predicted(ops, asked(), None)
    assert report.fits
    assert report.workloads == ()
    assert any("--calibrate" in part for part in tables(report) if isinstance(part, str))


def test_the_least_budget_is_named_and_does(ops: Ops) -> None:
    short = predicted(ops, asked(120 * MIB, kv_memory=4 * MIB), a_machine())
    assert not short.fits
    assert short.workloads == ()
    least = predicted(ops, asked(short.least, kv_memory=4 * MIB), a_machine())
    assert least.fits
    assert 0 < least.in_memory < 1
    assert least.workloads[0].busy["disk"] > 0
    assert not predicted(ops, asked(short.least - 2 * MIB, kv_memory=4 * MIB), a_machine()).fits


def test_a_draft_model_takes_what_serving_it_takes(ops: Ops) -> None:
    """Its weights, and a share of the room for KV; a demo that drafts for itself has both twice."""
    demo, fixed = resolve_model("demo"), {"num_blocks": 64}
    options = RankModelOptions(speculation="draft", draft_model="demo", **fixed)
    loaded = load_draft(options, open_checkpoint(demo), ops)
    sizes = draft_sizes(options, demo, ops)
    assert sizes.kv_bytes_per_token == loaded.kv_bytes_per_token
    alone, question = predicted(ops, asked(**fixed), None), asked(**fixed)
    beside = predicted(ops, dataclasses.replace(question, draft=sizes), None).parts
    stored = stored_sizes(demo)
    module = stored.drafts + stored.draft_experts  # which a draft model is without
    assert beside.kv == 2 * alone.parts.kv
    assert beside.draft == pytest.approx(loaded.weights - module, rel=0.01)
    assert beside.total == alone.parts.total + beside.draft + alone.parts.kv
    for wrong in ({"speculation": "mtp"}, {"draft_model": None}, {"draft_model": "/none"}):
        with pytest.raises(ConfigError):
            draft_sizes(options.model_copy(update=wrong), demo, ops)


def test_a_smaller_budget_streams_and_is_slower(ops: Ops) -> None:
    roomy = predicted(ops, asked(kv_memory=4 * MIB), a_machine())
    budget = roomy.parts.total - roomy.parts.experts // 2
    tight = predicted(ops, asked(budget, kv_memory=4 * MIB), a_machine())
    assert tight.in_memory == pytest.approx(0.5, abs=0.01)
    assert tight.workloads[1].generated_per_s < roomy.workloads[1].generated_per_s
    more = {other.change for other in tight.alternatives}
    assert "twice the memory" in more
    assert "twice the memory" not in {other.change for other in roomy.alternatives}


@pytest.mark.parametrize(
    ("machine", "binds"),
    [
        (a_machine(overheads=Overheads()), "memory bandwidth"),
        (a_machine(overheads=Overheads(step=1.0)), "fixed cost of steps"),
        (a_machine(memory={1: 1e15}, overheads=Overheads()), "compute"),
    ],
)
def test_what_binds_is_what_half_of_costs_most(ops: Ops, machine: MachineModel, binds: str) -> None:
    report = predicted(ops, asked(), machine)
    assert report.workloads[0].binding == binds


def test_a_disk_that_binds_is_named_and_moves_the_prediction(ops: Ops) -> None:
    slow = a_machine(disk={1 << 20: 1e7}, overheads=Overheads())
    question = asked(kv_memory=4 * MIB)
    whole = predicted(ops, question, slow)
    budget = whole.parts.total - whole.parts.experts // 2
    found = predicted(ops, dataclasses.replace(question, budget=budget), slow).workloads[1]
    assert found.binding == "disk"
    halved = predicted(ops, dataclasses.replace(question, budget=budget), slow.scaled(disk=0.5))
    assert halved.workloads[1].generated_per_s < 0.6 * found.generated_per_s


def test_the_best_changes_come_first_and_only_those_that_pay(ops: Ops) -> None:
    report = predicted(ops, asked(), a_machine())
    gains = [other.gain for other in report.alternatives]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) >= 1.05
    # These machines have 8 bits ten times as fast.
    assert report.alternatives[0].change in ("--quantization int8", "--quantization int4")
    measured_in_16 = a_machine(
        products={k: c for k, c in a_machine().products.items() if k in ("bf16", "fp32")}
    )
    others = predicted(ops, asked(), measured_in_16).alternatives
    assert not any("int4" in other.change for other in others)


def test_a_request_that_kv_never_holds_is_refused(ops: Ops) -> None:
    question = dataclasses.replace(asked(kv_memory=MIB), prompt=1000, output=500)
    with pytest.raises(ConfigError, match="kv-memory"):
        predicted(ops, question, a_machine())


# --- calibrations that are kept ---


def test_a_calibration_is_found_for_its_model_then_for_any(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "calibration"
    assert find(folder, host_name(), 1, "shapes", ANY_MODEL) is None
    keep(a_machine(), folder)
    assert find(folder, host_name(), 1, "shapes", ANY_MODEL) == a_machine()
    keep(a_machine(shapes="shapes"), folder)
    found = find(folder, host_name(), 1, "shapes", ANY_MODEL)
    assert found is not None
    assert found.shapes == "shapes"
    assert find(folder, host_name(), 2, "shapes", ANY_MODEL) is None
    assert find(folder, "another host", 1, "shapes", ANY_MODEL) is None
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"null", b"\xff\xfe", b'{"version": 1}', b" " * (2 << 20)],
)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=str(file)):
        read_calibration(file)


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    file = file_of(tmp_path, host_name(), 1, ANY_MODEL)
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="not a regular file"):
        find(tmp_path, host_name(), 1, ANY_MODEL)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        keep(a_machine(), tmp_path / "file" / "calibration")


# --- measurements ---


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_products_are_measured_in_every_kind(ops: Ops, kind: str) -> None:
    probe = KernelProbe(ops, TINY, 1 << 16, QUICK)
    for curve in (probe.products(kind), probe.experts(kind)):
        assert curve.rows[0] == 1
        assert curve.at(64, 1.0) >= curve.at(1, 1.0) >= curve.at(1, 0.0) > 0


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("latent", [False, True])
def test_attention_is_measured_in_every_kind(ops: Ops, kind: str, latent: bool) -> None:
    shapes = TINY
    if latent:
        shapes = dataclasses.replace(TINY, kv_heads=1, head_size=24, value_size=16, latent=True)
    cost = KernelProbe(ops, shapes, 1 << 16, QUICK).attention(kind)
    assert min(cost.decode_cold, cost.decode_warm, cost.prefill) > 0


def test_shapes_are_those_of_the_model(tiny_checkpoint: Tiny) -> None:
    shapes = shapes_of(survey(tiny_checkpoint("qwen3_moe")).spec)
    assert (shapes.hidden, shapes.experts, shapes.top_k, shapes.inner) == (64, 8, 3, 32)
    assert (shapes.heads, shapes.kv_heads, shapes.head_size) == (4, 2, 32)
    latent = shapes_of(survey(tiny_checkpoint("deepseek_v3")).spec)
    assert (latent.kv_heads, latent.head_size, latent.value_size) == (1, 40, 32)
    assert shapes.name != latent.name


def test_a_disk_is_read_by_the_size_of_a_read(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(12 * MIB))
    with file_to_read([file], tmp_path) as read:
        rates = disk_rates(read)
    assert set(rates) == {256 << 10, 1 << 20, 4 << 20}
    assert min(rates.values()) > 0
    assert [f.name for f in tmp_path.iterdir()] == ["weights"]


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="cannot be measured"),
        file_to_read([], tmp_path / "absent"),
    ):
        pass


def test_steps_are_those_of_the_scheduler(ops: Ops) -> None:
    ticks = iter(range(1_000_000))
    # One tick between two looks at the clock, whatever the machine does meanwhile.
    took = seconds_of(AnsweringDecoder(ops, 4), ProbedStep(4, 8), lambda: float(next(ticks)), 64)
    assert took == [1.0] * (STEPS - 1)


@cache
def demo_depths() -> tuple[ModelDemand, ModelDemand]:
    """What the first layers of the shipped model ask for, of both depths."""
    sizes, ops = stored_sizes(resolve_model("demo")), choose_ops(threads=1)
    few, more = (demand_of(one, LoadOptions(), ops) for one in first_layers(sizes))
    return few, more


@settings(max_examples=25)
@given(
    st.tuples(*[st.just(0.0) | st.floats(1e-7, 1e-3)] * 4),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.booleans(),
)
def test_what_steps_cost_is_found_again(
    parts: tuple[float, ...], attention: float, two_depths: bool
) -> None:
    """Steps that take just what some overheads say are predicted to take that."""
    step, row, layer, each = parts
    decode = RestCurve((256.0, 12288.0, 32768.0), (each, 2 * each, 9 * each))
    prompt = RestCurve((4096.0, 131072.0), (each, 40 * each))
    real = a_machine(overheads=Overheads(step, row, layer, decode, prompt, attention))
    bare = a_machine(overheads=Overheads())
    few, more = demo_depths()
    steps = []
    for model, kinds in ((few, SHALLOW_KINDS), (more, KINDS))[not two_depths :]:
        for kind in kinds:
            took = StepPredictor(real, model).step(kind.work).total
            left = took - StepPredictor(bare, model).step(kind.work).total
            steps.append(TimedStep(kind, model.num_layers, model.hidden, took, left))
    found = with_what_is_left(
        Overheads(), steps, [StepPredictor(bare, few), StepPredictor(bare, more)], noise=0.0
    )
    assert found.attention == pytest.approx(attention, rel=0.1)  # as far as it is not noise
    again = StepPredictor(a_machine(overheads=found), more)
    for one in steps:
        if one.layers == more.num_layers:
            assert again.step(one.kind.work).total == pytest.approx(one.seconds, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_are_not_seen_clearly_are_taken_to_be_as_all_are(seed: int) -> None:
    """What is predicted is nearer to what steps take than the looks at them were."""
    noise, draw = 0.1, random.Random(seed)
    few, more = demo_depths()
    level = RestCurve((256.0, 131072.0), (2e-7, 2e-7 * 512))
    real = a_machine(overheads=Overheads(2e-4, 1e-5, 3e-5, level, level))
    bare = a_machine(overheads=Overheads())
    steps, true = [], {}
    for model, kinds in ((few, SHALLOW_KINDS), (more, KINDS)):
        for kind in kinds:
            true[model, kind] = StepPredictor(real, model).step(kind.work).total
            took = true[model, kind] * draw.gauss(1.0, noise)
            left = took - StepPredictor(bare, model).step(kind.work).total
            steps.append(TimedStep(kind, model.num_layers, model.hidden, took, left))
    predictors = [StepPredictor(bare, few), StepPredictor(bare, more)]
    found = with_what_is_left(Overheads(), steps, predictors, noise)
    again = StepPredictor(a_machine(overheads=found), more)
    apart, seen_apart = (
        [
            seconds(one) / true[more, one.kind] - 1
            for one in steps
            if one.layers == more.num_layers and one.kind.prompt != LONG
        ]
        for seconds in (
            lambda one: again.step(one.kind.work).total,
            lambda one: one.seconds,
        )
    )
    assert sum(map(abs, apart)) < 0.8 * sum(map(abs, seen_apart))


def test_steps_that_took_less_than_was_predicted_cost_nothing_beside() -> None:
    _, model = demo_depths()
    steps = [TimedStep(kind, 8, 256, 1e-3, -1e-4) for kind in KINDS if kind.prompt != LONG]
    found = with_what_is_left(Overheads(), steps, [StepPredictor(a_machine(), model)], noise=0.0)
    assert (found.step, found.row, found.layer, found.attention) == (0.0, 0.0, 0.0, 1.0)
    assert set(found.decode.seconds + found.prompt.seconds) == {0.0}


@given(st.floats(1.0, 1.5), st.floats(0.5, 6.0), st.floats(0.0, 6.0))
def test_a_disk_is_as_much_slower_as_layers_wait_longer(
    slower: float, late: float, early: float
) -> None:
    each, other = 1e-3, 1e-3
    waits = [LayerWait(n * late, n * early, n * early / 4, other, 0.0) for n in (1, 2, 4)]
    waits = [dataclasses.replace(one, waited=one.expected(slower * each, 1.0)) for one in waits]
    assert slower_disk(waits, each) == pytest.approx(slower, rel=1e-3)
    idle = [dataclasses.replace(one, waited=0.01 * other) for one in waits]
    assert slower_disk(idle, each) == 1.0


@pytest.mark.parametrize("faster", [1.3, 1.0, 0.8, 0.6])
def test_kernels_take_as_long_as_steps_have_for_them(faster: float) -> None:
    """Where a machine was slower or faster as kernels were looked at, steps say by how much."""
    _, model = demo_depths()
    python, seen = Overheads(1e-4, 1e-6), KernelCosts.in_use(a_machine())
    slow = StepPredictor(a_machine(overheads=python), model)
    real = StepPredictor(
        seen.times(faster).in_place_of(a_machine(overheads=Overheads(1e-4, 1e-6, 2e-7))), model
    )
    steps = []
    for kind in KINDS:
        took = real.step(kind.work).total
        left = took - slow.step(kind.work).total
        steps.append(TimedStep(kind, model.num_layers, model.hidden, took, left))
    share = share_of_kernels(python, steps, noise=0.01)
    assert share == pytest.approx(faster, rel=0.02)
    assert share_of_kernels(python, steps[:0], noise=0.01) == 1.0


def test_of_several_looks_the_middle_counts() -> None:
    quick, slow = ProductCurve((1.0, 2.0, 4.0), (1e-9, 2e-9, 4e-9), (1e-9, 1e-9, 2e-9)), 3.0
    seen = KernelCosts({"int8": quick}, {}, {"bf16": AttentionCost(3e-9, 2e-9, 1e-9)})
    short = KernelCosts({"int8": ProductCurve((1.0, 2.0), (2e-9, 3e-9), (1e-9, 2e-9))}, {}, {})
    found = middle([seen, seen.times(slow), short])
    assert found.products["int8"] == ProductCurve((1.0, 2.0), (2e-9, 3e-9), (1e-9, 2e-9))
    assert found.attention["bf16"] == AttentionCost(6e-9, 4e-9, 2e-9)
    assert middle([seen]) == seen


@given(st.lists(st.floats(-1.0, 1.0), max_size=12))
def test_the_nearest_values_that_do_not_fall(values: list[float]) -> None:
    found = not_falling(values)
    assert list(found) == sorted(found)
    assert sum(found) == pytest.approx(sum(values))
    assert not_falling(found) == pytest.approx(found)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_first_layers_of_a_model_run_by_themselves(
    tiny_checkpoint: Tiny, ops: Ops, family: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    sizes = stored_sizes(folder)
    few, more = first_layers(sizes)
    assert 1 <= len(few.layers) < len(more.layers) <= len(sizes.layers)
    assert few.spec.moe_layers
    packed = tmp_path / "packed"
    pack_model(folder, packed, ops, LoadOptions())
    for source in (folder, packed):
        decoder = load_first_layers(source, more.spec, ops, LoadOptions())
        assert decoder.spec.layers == sizes.spec.layers[: len(more.layers)]
        for of, kind in ((cut(decoder, few.spec), ProbedStep(2, 8)), (decoder, ProbedStep(0, 8))):
            assert min(seconds_of(of, kind, time.perf_counter, 64)) > 0
        counter = counted_use(decoder, decoder.spec.vocab)
        counted = with_use(demand_of(more, LoadOptions(), ops), counter)
        assert all(x.experts.use for _, x in counted.layers if x.experts)
        assert 0 < counter.repeat <= 1
    streamed, runner = streamed_first_layers(packed, more.spec, ops, LoadOptions())
    try:
        predictor = StepPredictor(a_machine(), counted)
        cost = streaming_cost(streamed, runner, predictor, time.perf_counter)
    finally:
        runner.close()
    assert min(cost.layer, cost.record) >= 0
    assert 0 <= cost.foreseen <= 1
    assert runner.stream.mover.counts().reads > 0
    habits = habits_of_all_layers(packed, sizes.spec, ops, LoadOptions())
    assert 0 < habits.repeat <= 1
    assert bytes_to_count(counted) > 0


def test_keeping_account_of_experts_takes_time(tmp_path: Path) -> None:
    cost = account_cost(8, 2, tmp_path, QUICK)
    assert cost.layer + cost.record > 0 <= min(cost.layer, cost.record)
    assert cost.foreseen == 0.0
    assert not any(tmp_path.iterdir())


def test_a_cache_is_read_from_the_system(tmp_path: Path) -> None:
    assert read_cache(tmp_path) == 0
    for index, text in enumerate(("48K", "1024K", "32M", "odd", "")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{text}\n")
    assert read_cache(tmp_path) == 32 * MIB


def test_a_scheduler_begins_with_what_was_measured_for_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "moeserve" / "calibration"
    options = EngineOptions(model="demo", threads=1, objective="throughput")
    assert predicted_steps(options) is None
    keep(a_machine(), folder)  # of usual sizes, which is not this model
    assert predicted_steps(options) is None
    shapes = shapes_of(stored_sizes(resolve_model("demo")).spec).name
    keep(a_machine(shapes=shapes), folder)
    assert predicted_steps(options.model_copy(update={"objective": "latency"})) is None
    cost = predicted_steps(options)
    assert cost is not None
    assert cost.seconds(512, 4, 400) > cost.seconds(0, 4, 400) > 0
    keep(a_machine(shapes=shapes, attention={"int8": AttentionCost(1e-10, 1e-10, 1e-10)}), folder)
    assert predicted_steps(options) is None
    assert "were not measured" in caplog.text


# --- the command ---


def doctor(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    ports = {"MOESERVE_HTTP_PORT": "0", "MOESERVE_GRPC_PORT": "0"}
    return subprocess.run(
        [sys.executable, "-m", "moeserve", "doctor", *words],
        env={**os.environ, **ports, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.long
def test_doctor_predicts_from_outside(tmp_path: Path) -> None:
    keep(a_machine(), tmp_path / "moeserve" / "calibration")
    words = ("--model", "demo", "--prompt", "64", "--output", "16", "--batch", "1,4")
    done = doctor(tmp_path, *words, "--threads", "1", "--memory", "2GiB", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["forecast"]
    assert found["calibration"] == a_machine().name
    assert found["budget"] == 2 << 30
    assert [w["batch"] for w in found["workloads"]] == [1, 4]
    assert found["workloads"][1]["generated_per_s"] > 0

    for file in (tmp_path / "moeserve" / "calibration").iterdir():
        file.write_text("{")
    broken = doctor(tmp_path, *words, "--threads", "1", "--json")
    assert broken.returncode == 0, broken.stderr
    told = json.loads(broken.stdout)
    assert told["forecast"]["calibration"] is None
    assert any("not a calibration" in note["found"] for note in told["notes"])

    short = doctor(tmp_path, *words, "--threads", "1", "--memory", "64MiB")
    assert short.returncode == 1
    assert "are the least, of 64.0 MiB" in short.stdout


@pytest.mark.long
def test_doctor_measures_keeps_and_predicts(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--model", "demo", "--calibrate", "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "kept in" in done.stderr
    (file,) = (tmp_path / "moeserve" / "calibration").iterdir()
    machine = read_calibration(file)
    found = json.loads(done.stdout)["forecast"]
    assert found["calibration"] == machine.name
    assert {"bf16", "fp32"} <= set(machine.products)
    assert machine.disk_rate(1 << 20) > 0
    assert 0 < machine.habits.repeat <= 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "5"), "--prompt needs --model"),
        (("--model", "demo", "--batch", "1,x"), "--batch='1,x': expected numbers"),
        (("--model", "demo", "--memory", "much"), "--memory='much': not a size"),
        (("--model", "demo", "--block-size", "0"), "block_size"),
    ],
)
def test_doctor_refuses_what_it_cannot_read(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = doctor(tmp_path, *words)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
