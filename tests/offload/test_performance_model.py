"""The performance model: the paper's numbers, its limits, and which way it bends."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.offload.model.bound import (
    Resource,
    attention_compute,
    effective_kv,
    intensity,
    memory_traffic,
    parallelism_memory_efficiency,
    saturating_tokens,
    streamed_a_step,
    streamed_bound,
    throughput_bound,
)
from moeserve.offload.model.demand import (
    AttentionDemand,
    ExpertsDemand,
    LayerDemand,
    MatrixDemand,
    ModelDemand,
)
from moeserve.offload.model.distinct import (
    common_use,
    equal_use,
    expected_distinct,
    least_used,
    use_alike,
    use_of,
)
from moeserve.offload.model.locality import LONG, RoutingHabits
from moeserve.offload.model.machine import (
    AttentionCost,
    MachineModel,
    ProductCurve,
    rising,
)
from moeserve.offload.model.overheads import Overheads, RestCurve
from moeserve.offload.model.overlap import expected_longer
from moeserve.offload.model.predict import StepPredictor, StepWork
from moeserve.offload.model.residency import WeightsInMemory, fit_memory
from moeserve.offload.model.schedule import predict_batch, steps_of
from moeserve.offload.model.steady import begin_per_step, blocks_over_life, steady
from moeserve.offload.model.workload import ServerBounds, UniformWorkload

GB = 1e9


def a_curve(read: float, multiply: float) -> ProductCurve:
    """A roofline: bf16 weights read at ``read`` bytes/s, or ``multiply`` weights x rows per
    second."""
    rows = tuple(float(2**i) for i in range(11))
    seconds = tuple(max(2 / read, r / multiply) for r in rows)
    return ProductCurve(rows, seconds, tuple(r / multiply for r in rows))


def a_machine(**changes: Any) -> MachineModel:
    curve = a_curve(40 * GB, 200 * GB)
    machine = MachineModel(
        host="a host",
        measured="2026-01-01",
        shapes="any model",
        threads=2,
        isa="avx2",
        cache=32 << 20,
        memory={1: 25 * GB, 2: 40 * GB},
        disk={1 << 20: 1 * GB, 4 << 20: 2 * GB},
        products={"bf16": curve, "fp32": curve},
        experts={"bf16": curve},
        attention={"bf16": AttentionCost(2e-11, 1e-11, 1e-11)},
        overheads=Overheads(
            1e-4, 1e-6, 1e-5, RestCurve((1024.0,), (1e-7,)), RestCurve((1024.0,), (5e-8,))
        ),
    )
    return dataclasses.replace(machine, **changes)


def a_model(layers: int = 8, window: int | None = None) -> ModelDemand:
    each = MatrixDemand(1 << 20, 2 << 20, "bf16")
    layer = LayerDemand(
        (MatrixDemand(2 << 20, 4 << 20, "bf16"), MatrixDemand(1 << 14, 1 << 16, "fp32")),
        AttentionDemand("bf16", 1024, 4096, window),
        ExpertsDemand(each, 32, 4),
    )
    head = MatrixDemand(1 << 24, 1 << 25, "bf16")
    return ModelDemand(((layers, layer),), head, 1 << 25, 1024, 32000, 4096)


# --- the paper's numbers ---


def test_saturation_and_intensity_are_those_of_the_paper() -> None:
    """Table 2: an A40 with 150 TFLOPS behind 32 GB/s; Mixtral-8x7B takes 2 of 8 experts."""
    assert saturating_tokens(150e12, 32e9, experts=8, top_k=2) == pytest.approx(18750)
    assert saturating_tokens(312e12, 32e9, experts=8, top_k=2) == pytest.approx(39000)
    # Experts of 3.5 times the hidden size dominate: nearly n N_k / N_e.
    found = intensity(1000, experts=8, top_k=2, ratio=3.5, group=4)
    assert 250 < found < 265


@pytest.mark.parametrize(
    ("g", "n", "generated"), [(32, 19.0e3, 972), (64, 10.4e3, 852), (128, 5.8e3, 684)]
)
def test_mixtral_with_70_gb_of_kv(g: int, n: float, generated: float) -> None:
    """94 GB of weights at 19.5 GB/s, KV of 128 KiB a token, prompts of 98."""
    kv_tokens = 70e9 / (128 << 10)
    delta = 94e9 / 19.5e9
    rate, tokens = streamed_bound(98, g, kv_tokens=kv_tokens, delta=delta, compute=1e9)
    assert tokens == pytest.approx(n, rel=0.01)
    assert rate * g / (98 + g) == pytest.approx(generated, rel=0.01)
    if g == 32:
        assert parallelism_memory_efficiency(98, g) == pytest.approx(0.0356, abs=5e-5)
        assert tokens / (98 + g) == pytest.approx(146, abs=0.6)
        assert rate == pytest.approx(3948, rel=0.005)


def test_arithmetic_caps_what_the_stream_would_allow() -> None:
    assert streamed_bound(98, 32, kv_tokens=1e6, delta=1.0, compute=100.0)[0] == 100.0
    assert streamed_bound(98, 32, kv_tokens=1e6, delta=0.0, compute=100.0)[0] == 100.0


def test_the_other_equations() -> None:
    assert effective_kv(98, 256) == pytest.approx(1.57, abs=0.005)
    assert attention_compute(44e9, 4) == pytest.approx(176e9)
    assert memory_traffic(3e9, 4e9) == 7e9
    with pytest.raises(ConfigError, match="an answer of 0"):
        parallelism_memory_efficiency(98, 0)


# --- distinct experts ---


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.randoms())
def test_distinct_experts_are_those_counted_one_by_one(
    experts: int, top_k: int, tokens: int, draw: Any
) -> None:
    """Over every choice of every token, each without replacement and weighed as it is likely."""
    top_k = min(top_k, experts)
    choices = list(itertools.combinations(range(experts), top_k))
    weights = [draw.random() + 0.01 for _ in choices]
    likely = [w / sum(weights) for w in weights]
    use = [sum(w for c, w in zip(choices, likely, strict=True) if e in c) for e in range(experts)]
    if len(choices) ** tokens > 20_000:
        tokens = 2
    counted = 0.0
    for chosen in itertools.product(range(len(choices)), repeat=tokens):
        touched = set[int]().union(*(choices[c] for c in chosen))
        counted += len(touched) * math.prod(likely[c] for c in chosen)
    assert expected_distinct(use, tokens) == pytest.approx(counted)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64), st.integers(1, 8))
def test_use_adds_up_and_keeps_the_order_of_counts(counts: list[int], top_k: int) -> None:
    if sum(c > 0 for c in counts) < top_k:
        with pytest.raises(ConfigError, match="fewer than"):
            use_of(counts, top_k)
        return
    use = use_of(counts, top_k)
    assert sum(use) == pytest.approx(top_k)
    assert all(0 <= p <= 1 for p in use)
    pairs = sorted(zip(counts, use, strict=True))
    assert [p for _, p in pairs] == sorted(p for _, p in pairs)


def test_uneven_use_touches_fewer_experts() -> None:
    uneven = use_of([100, 50, 20, 10, 5, 5, 5, 5], 2)
    for tokens in (2, 8, 64):
        assert expected_distinct(uneven, tokens) < expected_distinct(equal_use(8, 2), tokens)
    assert least_used(uneven, 6) == pytest.approx(sorted(uneven)[:2])


def test_only_what_both_halves_prefer_is_preferred() -> None:
    one, other = [90, 10, 50, 50], [60, 30, 70, 40]
    assert common_use(one, one, 2) == pytest.approx(use_of(one, 2))
    assert common_use([90, 10, 50, 50], [10, 90, 50, 50], 2) == pytest.approx(equal_use(4, 2))
    assert common_use([5, 5, 5, 5], one, 2) == pytest.approx(equal_use(4, 2))
    mostly = common_use(one, other, 2)
    assert sum(mostly) == pytest.approx(2)
    assert use_of([150, 40, 120, 90], 2)[0] > mostly[0] > 0.5


@given(st.integers(2, 128), st.integers(1, 8), st.floats(0, 0.9))
def test_use_that_is_shared_so_much(experts: int, top_k: int, shared: float) -> None:
    use = use_alike(experts, top_k, shared)
    if top_k >= experts:
        assert use == equal_use(experts, top_k)
        return
    assert sum(use) == pytest.approx(top_k)
    assert list(use) == sorted(use, reverse=True)
    found = sum(p * p for p in use) / top_k
    assert found == pytest.approx(max(shared, top_k / experts), rel=0.02, abs=0.02)


def test_habits_say_how_experts_are_used_where_they_were_not_counted() -> None:
    habits = RoutingHabits(shared=0.5)
    equal, alike = a_model(), a_model().with_habits(habits)
    assert alike.touched_bytes(16) < equal.touched_bytes(16)
    assert equal.with_habits(RoutingHabits()) == equal
    assert alike.with_habits(RoutingHabits(shared=0.3)) == alike


@given(st.floats(0.1, 10), st.floats(0, 10), st.floats(0, 5))
def test_the_longer_of_both_is_that_of_draws(one: float, mean: float, spread: float) -> None:
    found = expected_longer(one, mean, spread)
    assert found >= max(one, mean) - 1e-9
    steps = 2000
    at = [statistics.NormalDist().inv_cdf((i + 0.5) / steps) for i in range(steps)]
    assert found == pytest.approx(
        statistics.fmean(max(one, mean + spread * z) for z in at), rel=1e-3
    )


@pytest.mark.parametrize("wrong", [[-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_impossible_counts_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite"):
        use_of(wrong, 1)


# --- steps ---


def test_a_scheduler_asks_for_the_seconds_of_a_step() -> None:
    cost = StepPredictor(a_machine(), a_model())
    assert cost.seconds(0, 0, 0) == pytest.approx(1e-4)
    assert cost.seconds(0, 8, 8 * 100) > cost.seconds(0, 0, 0)


@given(
    st.integers(0, 600),
    st.integers(0, 300),
    st.integers(0, 100_000),
    st.sampled_from(["prefill", "decode", "context"]),
    st.sampled_from([1.0, 0.6, 0.1]),
    st.sampled_from([None, 128]),
)
def test_more_work_never_takes_less(
    prefill: int, decode: int, context: int, more: str, share: float, window: int | None
) -> None:
    cost = StepPredictor(a_machine(), a_model(window=window), WeightsInMemory(share, None, 0.5))
    grown = {
        "prefill": (prefill + 7, decode, context),
        "decode": (prefill, decode + 3, context),
        "context": (prefill, decode, context + 500),
    }[more]
    assert cost.seconds(*grown) >= cost.seconds(prefill, decode, context) * (1 - 1e-9)


@given(
    st.sampled_from(["memory", "compute", "disk"]),
    st.floats(1.0, 8.0),
    st.integers(0, 512),
    st.integers(1, 256),
    st.sampled_from([1.0, 0.5, 0.05]),
)
def test_a_faster_machine_never_takes_longer(
    resource: str, times: float, prefill: int, decode: int, share: float
) -> None:
    held = WeightsInMemory(share, None, 0.3)
    usual = StepPredictor(a_machine(), a_model(), held)
    faster = StepPredictor(a_machine().scaled(**{resource: times}), a_model(), held)
    asked = (prefill, decode, decode * 300)
    assert faster.seconds(*asked) <= usual.seconds(*asked) * (1 + 1e-9)


def test_what_binds_a_step_is_what_makes_it_faster() -> None:
    model = a_model()
    few, many = StepWork(0, 1, 64, 0, 1), StepWork(512, 0, 0, 512 * 256, 1)
    machine = a_machine(overheads=Overheads())
    for work, binds, does_not in ((few, "memory", "compute"), (many, "compute", "memory")):
        usual = StepPredictor(machine, model).step(work)
        assert usual.share(binds) > 0.95 > usual.share(does_not)
        halved = StepPredictor(machine.scaled(**{binds: 0.5}), model).step(work)
        other = StepPredictor(machine.scaled(**{does_not: 0.9}), model).step(work)
        assert halved.total == pytest.approx(2 * usual.total, rel=0.06)
        assert other.total < 1.06 * usual.total


def test_experts_that_are_streamed_are_accounted_for() -> None:
    model, held = a_model(), WeightsInMemory(0.5, None, 0.0, 1.0, 8)
    work = StepWork(0, 4, 400, 0, 4)
    costs = (Overheads(), Overheads(streamed=1e-3, record=1e-4))
    machines = [a_machine(overheads=one) for one in costs]
    without, accounted = (StepPredictor(m, model, held).step(work) for m in machines)
    ((count, layer),) = model.layers
    assert layer.experts is not None
    more = count * (1e-3 + 1e-4 * held.missing_experts(layer.experts, 4))
    assert accounted.total == pytest.approx(without.total + more)
    assert accounted.fixed == pytest.approx(without.fixed + more)


def test_streaming_is_read_from_disk_as_far_as_it_is_missing() -> None:
    model, machine = a_model(), a_machine()
    work = StepWork(0, 64, 64 * 100, 0, 64)
    experts = model.layers[0][1].experts
    assert experts is not None
    all_of_them = 8 * experts.touched(64) * experts.each.nbytes
    for share in (0.0, 0.25, 0.5):
        step = StepPredictor(machine, model, WeightsInMemory(share)).step(work)
        assert step.disk_bytes == pytest.approx(all_of_them * (1 - share))
        assert step.disk == pytest.approx(step.disk_bytes / machine.disk_rate(experts.each.nbytes))
    behind = StepPredictor(machine, model, WeightsInMemory(0.0)).step(work)
    ahead = StepPredictor(machine, model, WeightsInMemory(0.0, None, 1.0)).step(work)
    assert behind.total > ahead.total >= ahead.disk
    assert StepPredictor(machine, model, WeightsInMemory(1.0)).step(work).disk == 0


def test_a_step_that_needs_nearly_all_experts_reads_them_beside_the_layer_before() -> None:
    """Few tokens wait for the reads."""
    model, machine = a_model(), a_machine()
    held = [WeightsInMemory(0.25, None, 0.0, whole) for whole in (0.0, 1.0)]
    for tokens, gains in ((1, False), (512, True)):
        work = StepWork(0, tokens, tokens * 100, 0, tokens)
        late, early = (StepPredictor(machine, model, one).step(work) for one in held)
        assert (early.total < late.total) == gains
        assert late.disk_bytes == early.disk_bytes
        assert max(early.disk, late.disk) <= early.total <= late.total
        alone = StepPredictor(machine, model).step(work).total
        assert late.total == pytest.approx(alone + late.disk)


def test_what_a_step_reads_for_two_layers_keeps_nothing_for_the_next() -> None:
    """640 experts share the room; what is missing takes slots, so that more is missing."""
    experts = ExpertsDemand(MatrixDemand(1 << 20, 1 << 20, "int8"), 32, 4)
    room = WeightsInMemory(0.15, routed=20)
    for tokens, touched in ((1000, 32), (1, 4)):
        missing = room.missing_experts(experts, tokens)
        assert missing == pytest.approx(touched * (1 - (96 - 2 * missing) / 640), rel=1e-5)
    assert WeightsInMemory(0.05, routed=20).missing_experts(experts, 1000) == pytest.approx(32)
    assert WeightsInMemory(1.0, routed=20).missing_experts(experts, 1000) == 0.0


def test_a_read_is_as_fast_as_those_of_its_size() -> None:
    machine = a_machine(disk={1 << 20: 1 * GB, 4 << 20: 2 * GB})
    sizes = (1, 1 << 20, 5 << 19, 4 << 20, 1 << 30)
    assert [machine.disk_rate(size) / GB for size in sizes] == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert a_machine(disk={}).disk_rate(1 << 20) == 0.0


def test_what_is_foreseen_is_read_beside_the_layer_before() -> None:
    """The layer waits for the rest; what is read in vain takes the disk, and no more than began."""
    model, work = a_model(), StepWork(0, 4, 400, 0, 4, 20)
    slow = a_machine(disk={4 << 20: 1e7})
    late, early = (WeightsInMemory(0.3, None, seen, 0.0, 8, 0.4) for seen in (0.0, 0.8))
    before, after = (StepPredictor(slow, model, held).step(work) for held in (late, early))
    assert before.disk_bytes < after.disk_bytes < 1.05 * before.disk_bytes
    assert before.total > after.total >= after.disk
    fast = a_machine(disk={4 << 20: 1e12})
    without, beside = (StepPredictor(fast, model, held).step(work) for held in (late, early))
    layer = model.layers[0][1].experts
    assert layer is not None
    in_vain = early.expert_reads(layer, 4, 20).in_vain
    assert beside.disk_bytes == pytest.approx(without.disk_bytes + 8 * in_vain * layer.each.nbytes)


def test_the_experts_used_most_are_kept() -> None:
    model = a_model().with_use([use_of([64, 32, 16, *([1] * 29)], 4)] * 8)
    work = StepWork(0, 4, 400, 0, 4)
    held = WeightsInMemory(0.25)
    known = StepPredictor(a_machine(), model, held).step(work)
    assert (
        known.disk_bytes < 0.5 * StepPredictor(a_machine(), a_model(), held).step(work).disk_bytes
    )


def test_a_window_of_layers_reads_the_other_trunks() -> None:
    model = a_model()
    held = WeightsInMemory(1.0, 2)
    assert held.missing_bytes(model, 10) == pytest.approx(model.trunk_bytes * 6 / 8)


def test_memory_is_given_to_experts_last() -> None:
    model = a_model()
    parts = {"process": 100 << 20, "kv": 50 << 20, "scratch": 10 << 20}
    outside = model.weight_bytes - model.expert_bytes + (160 << 20)
    whole = fit_memory(model, outside + model.expert_bytes, **parts)
    assert whole.whole
    assert whole.parts.total == whole.budget
    half = fit_memory(model, outside + model.expert_bytes // 2, **parts)
    assert half.fits
    assert not half.whole
    assert half.weights.share == pytest.approx(0.5)
    least = outside + model.two_layers_of_experts
    assert half.least == least
    assert fit_memory(model, least, **parts).fits
    assert not fit_memory(model, least - 1, **parts).fits


# --- schedules ---


@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(1, 40), st.integers(40, 300),
    st.integers(1, 32), st.integers(20, 400),
)  # fmt: skip
def test_a_schedule_computes_every_token_once(
    requests: int, prompt: int, output: int, budget: int, block: int, blocks: int
) -> None:
    work = UniformWorkload(requests, prompt, output)
    bounds = ServerBounds(32, budget, block, blocks)
    if blocks * block < work.length - 1:
        with pytest.raises(ConfigError, match="kv-memory"):
            list(steps_of(work, bounds))
        return
    steps = list(steps_of(work, bounds))
    assert sum(s.work.prefill_tokens for s in steps) == requests * prompt
    assert sum(s.work.decode_tokens for s in steps) == requests * (output - 1)
    assert sum(s.firsts for s in steps) == sum(s.ends for s in steps) == requests
    assert sum(s.work.rows for s in steps) == requests * output
    pairs = sum(s.work.prefill_pairs for s in steps)
    assert pairs == pytest.approx(requests * prompt * (prompt + 1) / 2)
    contexts = sum(s.work.decode_context for s in steps)
    assert contexts == pytest.approx(requests * sum(prompt + made for made in range(1, output)))
    assert all(s.work.tokens <= budget for s in steps)


def test_latencies_follow_from_the_steps() -> None:
    predictor = StepPredictor(a_machine(), a_model())
    bounds = ServerBounds(64, 512, 16, 4096)
    one = predict_batch(predictor, UniformWorkload(1, 512, 8), bounds)
    assert one.steps == 8
    assert one.ttft_s == one.worst_ttft_s == one.prefill_s
    assert one.seconds == pytest.approx(one.ttft_s + 7 * one.tpot_s)
    assert one.busy.total == pytest.approx(one.seconds)
    two = predict_batch(predictor, UniformWorkload(2, 512, 8), bounds)
    assert two.ttft_s < two.worst_ttft_s
    assert two.generated_per_s > one.generated_per_s


def test_less_kv_means_fewer_at_once_and_less_throughput() -> None:
    predictor = StepPredictor(a_machine(), a_model())
    work = UniformWorkload(64, 128, 32)
    roomy = predict_batch(predictor, work, ServerBounds(64, 512, 16, 640))
    tight = predict_batch(predictor, work, ServerBounds(64, 512, 16, 100))
    assert (roomy.concurrent, tight.concurrent) == (64, 10)
    assert tight.generated_per_s < roomy.generated_per_s


@pytest.mark.parametrize("block", [1, 3, 16])
def test_blocks_over_a_life_are_those_of_each_step(block: int) -> None:
    work = UniformWorkload(1, 13, 21)
    each = [-(-(13 + j) // block) for j in range(21)]
    assert blocks_over_life(work, block) == sum(each)


def streaming(memory: float = 1e12) -> tuple[MachineModel, ModelDemand, WeightsInMemory]:
    """The disk alone takes time."""
    curve = ProductCurve((1.0, 1e6), (1e-18, 1e-18), (1e-18, 1e-18))
    machine = a_machine(
        products={"bf16": curve, "fp32": curve},
        experts={"bf16": curve},
        attention={"bf16": AttentionCost(1e-22, 1e-22, 1e-22)},
        memory={2: memory},
        overheads=Overheads(),
    )
    return machine, a_model(), WeightsInMemory(0.0, None, 1.0)


def test_stage_2_becomes_stage_1() -> None:
    """As the number of requests grows and a block is one token."""
    machine, model, held = streaming()
    kv_tokens, p, g = 3_000_000, 98, 512
    predictor = StepPredictor(machine, model, held)
    delta = model.expert_bytes / machine.disk_rate(model.record_bytes)
    bound, n = streamed_bound(p, g, kv_tokens=kv_tokens, delta=delta, compute=math.inf)
    reached = []
    for requests in (100, 1_000, 100_000, 1_000_000):
        bounds = ServerBounds(1 << 30, 1 << 30, 1, kv_tokens)
        found = steady(predictor, UniformWorkload(requests, p, g), bounds)
        reached.append(found.tokens_per_s / bound)
    assert reached == sorted(reached)
    assert reached[0] < 0.2
    assert reached[-1] == pytest.approx(1.0, abs=0.01)
    assert begin_per_step(
        UniformWorkload(1_000_000, p, g), ServerBounds(1 << 30, 1 << 30, 1, kv_tokens)
    ) * (p + g) == pytest.approx(n, rel=0.01)
    coarse = ServerBounds(1 << 30, 1 << 30, 256, kv_tokens // 256)
    assert steady(predictor, UniformWorkload(1_000_000, p, g), coarse).tokens_per_s < 0.95 * bound


def test_stage_1_is_a_bound_of_stage_2() -> None:
    model = a_model()
    for machine, share, requests in itertools.product(
        (a_machine(), a_machine(overheads=Overheads())), (1.0, 0.3), (1, 8, 64)
    ):
        held = WeightsInMemory(share, None, 1.0)
        bounds = ServerBounds(64, 512, 16, 4096)
        work = UniformWorkload(requests, 128, 64)
        found = predict_batch(StepPredictor(machine, model, held), work, bounds)
        limit = throughput_bound(
            machine, model, 128, 64,
            kv_tokens=bounds.kv_tokens, concurrency=requests, weights=held,
        )  # fmt: skip
        assert found.tokens_per_s <= limit.tokens_per_s
        assert limit.tokens_per_s == limit.limits[limit.binding]


def test_the_bound_names_what_binds() -> None:
    model = a_model()
    asked: dict[str, Any] = {"kv_tokens": 1e6, "weights": WeightsInMemory(0.1)}
    small = throughput_bound(a_machine(), model, 128, 64, concurrency=1, **asked)
    assert small.binding is Resource.DISK
    assert not small.kv_limited
    in_memory = {"kv_tokens": 1e6, "concurrency": 1}
    assert throughput_bound(a_machine(), model, 1, 64, **in_memory).binding == "memory bandwidth"
    many = throughput_bound(a_machine(), model, 512, 8, kv_tokens=1e6, concurrency=500)
    assert many.binding is Resource.COMPUTE
    short = throughput_bound(a_machine(), model, 512, 8, kv_tokens=700, concurrency=500)
    assert short.kv_limited


# --- what was measured ---


@pytest.mark.parametrize("g", [1, 3, LONG + 4])
def test_the_bound_reads_what_prompts_and_unsettled_requests_miss(g: int) -> None:
    model, held = a_model(), WeightsInMemory(0.4, routed=20, repeat=0.5)
    found = streamed_a_step(model, held, 4, 8, g)
    steps = [held.missing_bytes(model, 32)]
    steps += [held.missing_bytes(model, 4, min(made, LONG)) for made in range(g - 1)]
    assert found == pytest.approx(sum(steps) / g)
    assert streamed_a_step(model, WeightsInMemory(), 4, 8, g) == 0.0


def test_a_calibration_comes_back_as_it_was() -> None:
    machine = a_machine()
    again = MachineModel.from_json(json.loads(json.dumps(machine.to_json())))
    assert again == machine
    assert again.name == "a host, 2 threads, measured 2026-01-01 for any model"


@given(st.data())
def test_a_hostile_calibration_is_refused(data: Any) -> None:
    """One value anywhere in it is something else."""
    said = json.loads(json.dumps(a_machine().to_json()))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(said)
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(
        st.sampled_from([None, [], {}, "x\0", -1, 0, math.inf, math.nan, True, [[]], "9" * 500])
    )
    with contextlib.suppress(ConfigError):
        MachineModel.from_json(said)


@pytest.mark.parametrize("said", [None, [], "text", 3, {}, {"version": 2}])
def test_what_is_no_calibration_is_refused(said: object) -> None:
    with pytest.raises(ConfigError, match="not a calibration"):
        MachineModel.from_json(said)


def test_a_kind_that_was_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match="'int4' were not measured on a host"):
        a_machine().expert("int4")


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=12))
def test_measured_seconds_rise(seconds: list[float]) -> None:
    found = rising(seconds)
    assert list(found) == sorted(found)
    assert all(f <= s for f, s in zip(found, seconds, strict=True))
    assert found[-1] == seconds[-1]


def test_a_cache_that_holds_all_is_warm() -> None:
    machine = a_machine()
    assert machine.coldness(1 << 20) == 0
    assert machine.coldness(1 << 30) == 1
    assert 0 < machine.coldness(32 << 20) < 1
