"""What experts that are read from disk cost beside the reading, and how many are foreseen.

Of a packed model real steps of its first layers are timed, with room for the experts of two layers
or a quarter of all: what they take that is no wait for the disk, and is more than the same steps
are predicted to take with all in memory. A machine that others use too is slower at times: so steps
with all in memory are timed just before, and tell by how much. Steps of several sizes tell what a
layer costs from what a record does; it is counted what was read ahead of its layer's choice; and
what steps waited says how much slower than by itself the disk is beside them.

A model that is not packed cannot be streamed. What it would cost once it is, is measured with the
real ``ExpertStream`` over slots of a page each, whose reads are done at once: which experts are
there, which give way, and the waits are as they will be; nothing is computed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

from moeserve.config.options import LoadOptions, RankModelOptions
from moeserve.forecast.habits import UseCounter
from moeserve.forecast.steps import PROMPT, step_seconds
from moeserve.forecast.timing import CallTimer, two_costs
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import Decoder
from moeserve.models.spec import ModelSpec
from moeserve.offload.arena import Arena
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.experts import ExpertStream
from moeserve.offload.load import Streaming
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.halving import last_that
from moeserve.offload.model.locality import RoutingHabits
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.overlap import LEAST_LEFT, Beside, expected_longer
from moeserve.offload.model.predict import StepPredictor, StepWork
from moeserve.offload.model.residency import WeightsInMemory, spread_of
from moeserve.offload.mover import MoverCounts, Read, Ticket
from moeserve.offload.residency import Residency
from moeserve.offload.runner import StreamedLayerRunner

PAGE = 4096
LAYERS = 8
# Of all experts, those that have a slot.
ROOM = 4
# Requests that decode, how many steps of them, and how often.
SIZES = (1, 4, 8)
STEPS = 6
LOOKS = 3
NO_LIMIT = 1 << 50
# Of the time that layers take else: waiting that says nothing of the disk. And how much slower than
# by itself it may be found to be.
HARDLY, SLOWEST = 0.1, 1.5
# Requests, and tokens of their prompts, where habits are counted in a model that is mostly read.
# Behind fewer tokens a request's next ones choose less alike.
FEW, SHORT = 4, 8


@dataclass(frozen=True, slots=True)
class StreamingCost:
    """Seconds of a layer whose experts are streamed, and of each ``record`` that is read for it;
    ``foreseen`` as in ``RoutingHabits``. A read takes ``slower`` times as long as by itself, and
    steps and reads are as fast as that ``beside`` each other."""

    layer: float
    record: float
    foreseen: float = 0.0
    slower: float = 1.0
    beside: Beside = field(default_factory=Beside)


@dataclass(frozen=True, slots=True)
class LayerWait:
    """Of a layer, on average: records read after it chose (``late``) and before (``early``), the
    standard deviation of these, seconds that it took beside waiting, and that it ``waited``."""

    late: float
    early: float
    spread: float
    other: float
    waited: float

    def expected(self, each: float, reading: float) -> float:
        """What it would wait with so many seconds for a record, read at ``reading`` of the whole
        speed while it computes."""
        read = reading * self.other
        longer = expected_longer(read, self.early * each, self.spread * each)
        return self.late * each + longer - read


class ReadingClock:
    """Tells the time without what was waited for the disk, and keeps what was read until then."""

    def __init__(self, stream: ExpertStream, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self.reads: list[int] = []
        self.ahead: list[int] = []
        self.missed: list[int] = []
        self.needed: list[int] = []
        self.waited: list[float] = []

    def __call__(self) -> float:
        moved, counts = self._stream.mover.counts(), self._stream.counts
        self.reads.append(moved.reads - moved.cancelled)
        self.ahead.append(counts.ahead_used)
        self.missed.append(counts.misses + counts.ahead_used)
        self.needed.append(counts.misses + counts.hits)
        self.waited.append(1e-9 * moved.waited_ns)
        return self._clock() - self.waited[-1]

    def median_of(self, counted: Sequence[float], steps: Sequence[int]) -> float:
        """Of what was counted in each of the steps."""
        return median(counted[2 * n + 1] - counted[2 * n] for n in steps)


def streamed_first_layers(
    folder: Path, spec: ModelSpec, ops: Ops, options: LoadOptions, *, room: int = ROOM
) -> tuple[Decoder, StreamedLayerRunner]:
    """The layers of ``spec``, which are the first of the packed model in ``folder``, with slots for
    one of ``room`` experts, and for those of two layers at least."""
    said = {"model": str(folder), "memory": NO_LIMIT, "speculation": "off"}
    asked = RankModelOptions.model_validate(options.model_dump() | said)
    streaming = Streaming.open(folder, ops, asked)
    own = {l: experts for l, experts in streaming.own.items() if l < len(spec.layers)}
    records = replace(streaming.records, count=sum(map(len, own.values())))
    slots = max(records.least, records.count // room * records.nbytes)
    spec = replace(spec, vocab=streaming.decoder.spec.vocab)
    cut = replace(
        streaming,
        decoder=replace(streaming.decoder, spec=spec),
        own=own,
        records=records,
        budget=streaming.fixed.total + slots,
    )
    decoder = cut.load(kv=0)
    assert isinstance(decoder.runner, StreamedLayerRunner), decoder.runner
    return decoder, decoder.runner


def habits_of_all_layers(
    folder: Path, spec: ModelSpec, ops: Ops, options: LoadOptions
) -> RoutingHabits:
    """Counted in steps of few requests through a packed model of which few layers fit in memory."""
    decoder, runner = streamed_first_layers(folder, spec, ops, options, room=NO_LIMIT)
    try:
        counter, told = UseCounter(), ReadingClock(runner.stream, lambda: 0.0)
        step_seconds(decoder, FEW, SHORT, STEPS, told, vocab=spec.vocab, observer=counter)
        ahead, missed = told.ahead[-1] - told.ahead[1], told.missed[-1] - told.missed[1]
        foreseen = foreseen_of(ahead, missed, len(spec.moe_layers))
        return RoutingHabits(counter.repeat, foreseen, counter.shared)
    finally:
        runner.close()


def bytes_to_count(model: ModelDemand) -> float:
    """What ``habits_of_all_layers`` reads of it."""
    nothing_held = WeightsInMemory(0.0)
    prompts = nothing_held.missing_bytes(model, FEW * SHORT)
    return prompts + STEPS * nothing_held.missing_bytes(model, FEW)


def foreseen_of(ahead: int, missed: int, layers: int) -> float:
    """The share of a layer that has one before it, where ``ahead`` of ``missed`` were of all."""
    of_layers = missed * (layers - 1) / layers
    return min(1.0, ahead / of_layers) if of_layers else 0.0


def streaming_cost(
    decoder: Decoder,
    runner: StreamedLayerRunner,
    predictor: StepPredictor,
    clock: Callable[[], float],
    slower_now: Callable[[], float] = lambda: 1.0,
) -> StreamingCost:
    """``predictor`` is of the same layers, all in memory. ``slower_now`` tells how many times as
    long as predicted steps take whose weights are all in memory; it is asked before each look."""
    vocab, stream, layers = decoder.spec.vocab, runner.stream, len(decoder.spec.moe_layers)
    step_seconds(decoder, max(SIZES), PROMPT, 2, clock, vocab=vocab)  # records are checked once
    seen, ahead, missed = list[SeenSteps](), 0, 0
    for look, size in product(range(LOOKS), SIZES):
        slower = slower_now()
        told = ReadingClock(stream, clock)
        steps = step_seconds(decoder, size, PROMPT, STEPS, told, vocab=vocab, seed=look)
        decodes = [n for n, (plan, _) in enumerate(steps) if plan.num_tokens == size and n]
        took = median(steps[n][1] for n in decodes) / layers
        work = StepWork(0, size, size * (PROMPT + STEPS / 2), 0.0, size)
        in_memory = slower * predictor.step(work).total / layers
        reads = told.median_of(told.reads, decodes) / layers
        seen.append(SeenSteps(layer_wait(told, decodes, took, layers), reads, in_memory, slower))
        ahead += sum(told.ahead[2 * n + 1] - told.ahead[2 * n] for n in decodes)
        missed += sum(told.missed[2 * n + 1] - told.missed[2 * n] for n in decodes)
    foreseen = foreseen_of(ahead, missed, layers)
    return cost_of(seen, predictor.machine, predictor.model.record_bytes, foreseen)


@dataclass(frozen=True, slots=True)
class SeenSteps:
    """Of a layer, on average: what it waited, the records that were read for it, and seconds that
    it would have taken ``in_memory`` then, where all took ``slower`` times as long as usual."""

    wait: LayerWait
    reads: float
    in_memory: float
    slower: float


def cost_of(
    seen: Sequence[SeenSteps], machine: MachineModel, record_bytes: int, foreseen: float
) -> StreamingCost:
    """What ``seen`` steps say."""
    each = record_bytes / machine.disk_rate(record_bytes)
    waits = [one.wait for one in seen]
    beside = Beside.of(machine.beside.computing, reading_beside(waits, each, machine.beside))
    costs = [
        (
            one.reads,
            (beside.computed(one.wait.other, one.wait.early * each) - one.in_memory) / one.slower,
            1.0 / one.wait.other,
        )
        for one in seen
    ]
    slower = slower_disk(waits, each, beside.reading)
    return StreamingCost(*two_costs(costs), foreseen, slower, beside)


def layer_wait(told: ReadingClock, steps: Sequence[int], took: float, layers: int) -> LayerWait:
    """By the medians of ``steps``, of which each layer ``took`` so long without waiting."""
    missed, reads = told.median_of(told.missed, steps), told.median_of(told.reads, steps)
    ahead, needed = told.median_of(told.ahead, steps), told.median_of(told.needed, steps)
    early = max(0.0, reads - (missed - ahead))
    spread = spread_of(ahead / layers, needed / layers)
    waited = told.median_of(told.waited, steps)
    return LayerWait((missed - ahead) / layers, early / layers, spread, took, waited / layers)


def reading_beside(waits: Sequence[LayerWait], each: float, products: Beside) -> float:
    """The share of its speed that reading has beside these layers, so that with ``each`` seconds
    for a record they would wait as long as they did; as beside ``products`` where they hardly
    waited for what was read early."""
    waited = sum(one.waited for one in waits)
    late = sum(one.late * each for one in waits)
    if waited - late < HARDLY * sum(one.other for one in waits):
        return products.reading

    def too_slow(reading: float) -> bool:
        return sum(one.expected(each, reading) for one in waits) > waited

    return last_that(too_slow, LEAST_LEFT, 1.0)


def slower_disk(waits: Sequence[LayerWait], each: float, reading: float = 1.0) -> float:
    """How many times as long as ``each`` seconds records take, so that layers would wait as long as
    they did; 1 where they hardly waited, and within 1 and ``SLOWEST``."""
    waited = sum(one.waited for one in waits)
    if waited < HARDLY * sum(one.other for one in waits):
        return 1.0

    def too_fast(slower: float) -> bool:
        return sum(one.expected(slower * each, reading) for one in waits) < waited

    return last_that(too_fast, 1.0, SLOWEST)


class DoneAtOnce:
    """A ``DiskMover`` whose reads take no time and bring nothing."""

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        return [Ticket(n) for n in range(len(reads))]

    def wait(self, ticket: Ticket, deadline_s: float) -> None: ...

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> bool:
        return False

    def counts(self) -> MoverCounts:
        return MoverCounts()

    def close(self) -> None: ...


def account_cost(experts: int, top_k: int, scratch: Path, timer: CallTimer) -> StreamingCost:
    """Of keeping account alone."""
    few, many = top_k, min(experts, 8 * top_k)
    with tempfile.NamedTemporaryFile(dir=scratch) as own:
        own.truncate(PAGE)
        file = DiskFile.open(Path(own.name))
        try:
            one, records = _of_layer(file, experts, few, timer)
            other, more = _of_layer(file, experts, many, timer)
        finally:
            file.close()
    each = max(0.0, other - one) / (more - records) if more > records else 0.0
    return StreamingCost(max(0.0, one - each * records), each)


def _of_layer(file: DiskFile, experts: int, chosen: int, timer: CallTimer) -> tuple[float, float]:
    """Seconds and records read of a layer that needs so many experts."""
    slots = max(2 * experts, LAYERS * experts // ROOM)
    regions = {layer: [DiskRegion(file, 0, PAGE)] * experts for layer in range(LAYERS)}
    stream = ExpertStream(
        regions, Arena(slots, PAGE), Residency([experts] * LAYERS, slots), DoneAtOnce()
    )
    draw = random.Random(chosen)

    def step() -> None:
        stream.begin_step()
        for layer in range(LAYERS):
            needed = np.array(sorted(draw.sample(range(experts), chosen)), np.int64)
            for _ in stream.waves(layer, needed, together=True):
                pass

    took = timer.typical(step) / LAYERS
    return took, stream.counts.misses / max(1, stream.counts.layers)
