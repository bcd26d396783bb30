"""Measure this host, for a model or for any: a ``MachineModel``. Takes less than a minute.

In order: memory and arithmetic peaks (``kernels.probe``), the disk, products and attention with the
kernels at the model's sizes, what steps cost beside these, looked at in turn with kernels, the disk
again, by itself and beside products, and where experts can be streamed how both are beside each
other in steps. Kinds that the model is not held in are looked at once, and only while there is
time; predictions for them are otherwise refused by name.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from moeserve.config.options import AS_STORED, LoadOptions
from moeserve.forecast.beside import beside_reading
from moeserve.forecast.command import threads_and_isa
from moeserve.forecast.disk import disk_rates, file_to_read
from moeserve.forecast.first_layers import (
    MOST_BYTES,
    cut,
    first_layers,
    load_first_layers,
    streamed_layers,
    with_small_head,
)
from moeserve.forecast.kernel_costs import KernelCosts, joined, measure_for, measure_kind, middle
from moeserve.forecast.kernels import KernelProbe
from moeserve.forecast.rest import share_of_kernels, with_what_is_left
from moeserve.forecast.shapes import ANY_MODEL, USUAL, shapes_of
from moeserve.forecast.steps import (
    StepLooks,
    counted_use,
    python_overheads,
    slowness,
    with_use,
)
from moeserve.forecast.streaming import (
    account_cost,
    bytes_to_count,
    habits_of_all_layers,
    streamed_first_layers,
    streaming_cost,
)
from moeserve.forecast.timing import CallTimer
from moeserve.host import read_cache, read_memory
from moeserve.kernels.ops import Ops
from moeserve.kernels.probe import PROBE_BYTES, probe_machine
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.fingerprint import served_files
from moeserve.models.library import DEMO, resolve_model
from moeserve.models.packed.layout import is_packed
from moeserve.offload.calibrations import host_name
from moeserve.offload.checkpoint_demand import StoredSizes, demand_of, stored_sizes
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.locality import RoutingHabits
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.overheads import Overheads
from moeserve.offload.model.overlap import Beside
from moeserve.offload.model.predict import StepPredictor

SECONDS = 9.0
# Looks at steps, of which the first and every third is one at kernels and long prompts too; none
# but the first begins after so many seconds.
LOOKS, LOOKING_SECONDS = 6, 40.0
OF_STEPS_ALONE = 3
# What counting in all layers of a large model may take to read.
COUNTING_SECONDS = 30.0
USUAL_KINDS = ("bf16", "int8", "int4")
BY_THE_CLOCK = CallTimer()
Report = Callable[[str], None]


def calibrate(
    folder: Path | None,
    scratch: Path,
    *,
    threads: int | None = None,
    options: LoadOptions = AS_STORED,
    kinds: Sequence[str] = USUAL_KINDS,
    seconds: float = SECONDS,
    timer: CallTimer = BY_THE_CLOCK,
    report: Report = lambda _: None,
) -> MachineModel:
    """For the model in ``folder``, or any; ``scratch`` is where a file to read may be made.
    ``kinds`` are measured beside those that the model is held in, while there is time."""
    ops, end = choose_ops(threads=threads), time.monotonic() + seconds
    torch.set_num_threads(1)
    sizes = None if folder is None else stored_sizes(folder, options)
    shapes = USUAL if sizes is None else shapes_of(sizes.spec)
    report("memory")
    count, isa = threads_and_isa(ops)
    cache = read_cache()
    probed = min(PROBE_BYTES, read_memory().available // 16)
    reads = {n: probe_machine(n, size=probed, rounds=3).read for n in sorted({1, count})}
    report("disk")
    files = [] if folder is None else served_files(folder)
    with file_to_read(files, scratch) as file:
        first = disk_rates(file)
    probe, own, costs = KernelProbe(ops, shapes, cache, timer), kinds_of(sizes, options, ops), []
    wanted = dict.fromkeys((*own, *kinds))
    for n, kind in enumerate(wanted):
        if n >= max(1, len(own)) and time.monotonic() > end - 1.0:
            break
        report(f"products in {kind}")
        costs.append(measure_kind(probe, kind, router=n == 0 and "fp32" not in wanted))
    found = joined(costs)
    machine = MachineModel(
        host=host_name(),
        measured=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        shapes=ANY_MODEL if sizes is None else shapes.name,
        threads=count,
        isa=isa,
        cache=cache,
        memory={n: rate.best for n, rate in reads.items()},
        disk=first,
        products=found.products,
        experts=found.experts,
        attention=found.attention,
    )
    report("steps")
    machine, timed = with_steps(machine, folder, sizes, options, ops, timer)
    waits = timer.clock is not time.thread_time  # which stands still meanwhile
    with file_to_read(files, scratch) as file:
        machine = with_disk(machine, file, ops if waits and shapes.experts else None)
    if not shapes.experts:
        return machine
    report("streaming")
    if folder is not None and sizes is not None and timed.own and is_packed(folder) and waits:
        return with_streaming(machine, folder, sizes, timed, options, ops, timer)
    cost = account_cost(shapes.experts, shapes.top_k, scratch, timer)
    overheads = replace(machine.overheads, streamed=cost.layer, record=cost.record)
    return replace(machine, overheads=overheads)


def with_disk(machine: MachineModel, file: Path, ops: Ops | None) -> MachineModel:
    """``machine`` with the mean of its disk and of another look at it; and where products can be
    timed with ``ops`` while others wait, how fast both are at once."""
    again = disk_rates(file)
    rates = {block: fmean((rate, again[block])) for block, rate in machine.disk.items()}
    beside = Beside() if ops is None else beside_reading(file, ops)
    return replace(machine, disk=rates, beside=beside)


def kinds_of(sizes: StoredSizes | None, options: LoadOptions, ops: Ops) -> list[str]:
    """What the model's weights and KV are held in."""
    own: list[str] = []
    if sizes is not None:
        for _, layer in demand_of(sizes, options, ops).layers:
            own += [matrix.kind for matrix in layer.always]
            own += [layer.experts.each.kind] if layer.experts else []
            own.append(layer.attention.kind.removesuffix("-latent"))
    return list(dict.fromkeys(own))


@dataclass(frozen=True, slots=True)
class TimedLayers:
    """The deepest layers that were timed, and whether they are the model's ``own``."""

    decoder: Decoder
    demand: ModelDemand
    own: bool


def with_steps(
    machine: MachineModel,
    folder: Path | None,
    sizes: StoredSizes | None,
    options: LoadOptions,
    ops: Ops,
    timer: CallTimer,
) -> tuple[MachineModel, TimedLayers]:
    """``machine`` with what steps of the model's first layers show, and with the median of what
    kernels were looked at then; where there is no model, or these layers are too large, with steps
    of the model that is shipped, whose kernels are measured at its own sizes."""
    depths = () if sizes is None else first_layers(sizes)
    own = folder is not None and bool(depths)
    if folder is None or not depths:
        folder, options = resolve_model(DEMO), AS_STORED
        depths = first_layers(stored_sizes(folder))
    asked = [demand_of(depth, options, ops) for depth in depths]
    decoder, demands = load_first_layers(folder, depths[-1].spec, ops, options), []
    decoder = with_small_head(decoder, asked[-1].head.kind)
    shallow = [cut(decoder, depth.spec) for depth in depths]
    for demand, layers in zip(asked, shallow, strict=True):
        counter = counted_use(layers, demand.vocab)
        demands.append(with_use(demand, counter))
    looks = StepLooks(shallow, demands)
    probe = KernelProbe(ops, shapes_of(depths[0].spec), machine.cache, timer)
    seen = look_in_turn(looks, probe, demands[-1])
    python = python_overheads(ops, timer.clock, asked[-1].vocab)
    kernels = middle([KernelCosts.in_use(machine), *seen] if own else seen)

    def predictors(of: KernelCosts, overheads: Overheads) -> list[StepPredictor]:
        there = replace(of.in_place_of(machine), overheads=overheads)
        return [StepPredictor(there, demand) for demand in demands]

    first = predictors(kernels, python)
    noise = looks.noise()
    kernels = kernels.times(share_of_kernels(python, looks.steps(first), noise))
    last = predictors(kernels, python)
    overheads = with_what_is_left(python, looks.steps(last), last, noise)
    if sizes is not None and sizes.spec.vocab != asked[-1].vocab:
        sampling = python_overheads(ops, timer.clock, sizes.spec.vocab)
        overheads = overheads.with_ends(python, sampling)
    if own and is_packed(folder) and sizes is not None and sizes.total <= MOST_BYTES:
        # Deeper layers choose more alike, and to map them costs little.
        counter = counted_use(load_decoder(folder, ops, options), sizes.spec.vocab)
    there = kernels.in_place_of(machine) if own else machine
    habits = RoutingHabits(counter.repeat, shared=counter.shared)
    found = replace(there, overheads=overheads, habits=habits)
    return found, TimedLayers(shallow[-1], demands[-1], own)


def look_in_turn(steps: StepLooks, probe: KernelProbe, model: ModelDemand) -> list[KernelCosts]:
    """At steps, and between them at kernels of ``model``, whose looks are returned."""
    costs, begun = [], time.monotonic()
    for n in range(LOOKS):
        until = begun + LOOKING_SECONDS if n else math.inf
        whole = n % OF_STEPS_ALONE == 0
        if whole and time.monotonic() < until:
            costs.append(measure_for(probe, model))
        steps.look(probe.timer.clock, until, long=whole)
    return costs


def with_streaming(
    machine: MachineModel,
    folder: Path,
    sizes: StoredSizes,
    timed: TimedLayers,
    options: LoadOptions,
    ops: Ops,
    timer: CallTimer,
) -> MachineModel:
    """``machine`` with what a packed model's steps cost whose experts are read, by its first
    layers; of a large model habits are counted in all layers, where that is soon done."""
    habits, first = machine.habits, streamed_layers(sizes)
    if sizes.total > MOST_BYTES:  # of others they were counted in all layers
        model = demand_of(sizes, options, ops)
        if bytes_to_count(model) <= COUNTING_SECONDS * machine.disk_rate(model.record_bytes):
            habits = habits_of_all_layers(folder, sizes.spec, ops, options)
    demand = demand_of(first, options, ops).with_habits(habits)
    in_memory = StepPredictor(machine, timed.demand)

    def slower_now() -> float:
        return slowness(timed.decoder, in_memory, timer.clock)

    whole, runner = streamed_first_layers(folder, first.spec, ops, options)
    try:
        decoder = with_small_head(whole, demand.head.kind)
        cost = streaming_cost(
            decoder, runner, StepPredictor(machine, demand), timer.clock, slower_now
        )
    finally:
        runner.close()
    if not habits.foreseen:
        habits = replace(habits, foreseen=cost.foreseen)
    overheads = replace(machine.overheads, streamed=cost.layer, record=cost.record)
    used = replace(machine, overheads=overheads, habits=habits, beside=cost.beside)
    return used.scaled(disk=1.0 / cost.slower)
