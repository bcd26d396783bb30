"""What a model would do on this host, before it is loaded: what fits, what binds, how fast.

A prediction is made of a ``MachineModel``, the model's ``ModelDemand`` and a budget of memory. The
resource that binds is the one of which half would cost most; what to do next is every change that
was tried and gives more. Sizes are bytes. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from moeserve.config.options import RankModelOptions
from moeserve.engine.kv_size import size_kv
from moeserve.engine.policies.layered import most_kept
from moeserve.errors import ConfigError
from moeserve.kernels.ops import Ops
from moeserve.models.spec import ModelSpec
from moeserve.offload.checkpoint_demand import StoredSizes, demand_of
from moeserve.offload.model.bound import Resource, throughput_bound
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.locality import UNKNOWN, RoutingHabits
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.predict import StepPredictor
from moeserve.offload.model.residency import MemoryFit, MemoryParts, fit_memory
from moeserve.offload.model.schedule import BatchPrediction, predict_batch
from moeserve.offload.model.workload import ServerBounds, UniformWorkload
from moeserve.offload.process_memory import LATER, kept_bytes, scratch_of

# Of a resource, what it has to cost when it is halved to be said to bind.
BINDS = 1.02
# Of throughput, what a change has to give to be worth saying.
WORTH = 1.05


@dataclass(frozen=True, slots=True)
class DraftSizes:
    """What a draft model takes of memory: its weights, and KV for each token of KV."""

    weights: int = 0
    kv_bytes_per_token: int = 0


NO_DRAFT = DraftSizes()


@dataclass(frozen=True, slots=True)
class ForecastQuestion:
    """Requests of ``prompt`` and ``output`` tokens, so many at once as each of ``batches`` says.
    ``budget`` is what the process may take in all, of which ``process`` is taken before the model.
    """

    prompt: int
    output: int
    batches: tuple[int, ...]
    budget: int
    process: int
    options: RankModelOptions
    draft: DraftSizes = NO_DRAFT


@dataclass(frozen=True, slots=True)
class WorkloadForecast:
    """Of ``batch`` requests at once, of which ``concurrent`` run together. Seconds and tokens per
    second; ``busy`` are shares of the time. ``bound`` is stage 1's throughput, of answers alone."""

    batch: int
    concurrent: int
    generated_per_s: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    seconds: float
    binding: str
    busy: Mapping[str, float]
    bound: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A change, and what it makes of each batch's generated tokens per second."""

    change: str
    generated_per_s: tuple[float, ...]
    gain: float


@dataclass(frozen=True, slots=True)
class ForecastReport:
    """``calibration`` names what predictions were made with; None where this host has not been
    measured: then there are none. ``least`` is the smallest budget that would do."""

    calibration: str | None
    budget: int
    parts: MemoryParts
    least: int
    fits: bool
    in_memory: float
    kv_tokens: int
    prompt: int
    output: int
    workloads: tuple[WorkloadForecast, ...]
    alternatives: tuple[Alternative, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.parts.total}


@dataclass(frozen=True, slots=True)
class _Setup:
    """Everything that a prediction is made of."""

    machine: MachineModel
    model: ModelDemand
    fit: MemoryFit
    bounds: ServerBounds

    @property
    def predictor(self) -> StepPredictor:
        return StepPredictor(self.machine, self.model, self.fit.weights)


def forecast(
    sizes: StoredSizes, question: ForecastQuestion, ops: Ops, machine: MachineModel | None
) -> ForecastReport:
    """ConfigError where what is asked contradicts itself, such as a prompt that KV never holds."""
    habits = UNKNOWN if machine is None else machine.habits
    model = demand_of(sizes, question.options, ops).with_habits(habits)
    fit, bounds = divide_memory(model, question, sizes.spec, habits)
    workloads: tuple[WorkloadForecast, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    if machine is not None and fit.fits:
        setup = _Setup(machine, model, fit, bounds)
        workloads = tuple(predict_workload(setup, work) for work in asked(question))
        found = alternatives_to(sizes, question, ops, machine, workloads)
        alternatives = tuple(sorted(found, key=lambda one: -one.gain))
    return ForecastReport(
        calibration=None if machine is None else machine.name,
        budget=fit.budget,
        parts=fit.parts,
        least=fit.least,
        fits=fit.fits,
        in_memory=fit.weights.share,
        kv_tokens=bounds.kv_tokens,
        prompt=question.prompt,
        output=question.output,
        workloads=workloads,
        alternatives=alternatives,
    )


def asked(question: ForecastQuestion) -> Iterator[UniformWorkload]:
    for batch in question.batches:
        yield UniformWorkload(batch, question.prompt, question.output)


def divide_memory(
    model: ModelDemand, question: ForecastQuestion, spec: ModelSpec, habits: RoutingHabits
) -> tuple[MemoryFit, ServerBounds]:
    """KV as ``serve`` sizes it, from what the weights leave of the budget; where these do not fit,
    from what the least of them leaves."""
    o = question.options
    kept = most_kept(o.max_num_batched_tokens, o.prefill_mode)
    scratch = scratch_of(spec, o.max_num_batched_tokens + kept, o.max_num_seqs)
    scratch += kept_bytes(kept, spec.hidden)
    outside = question.process + LATER
    fit_with = partial(
        fit_memory,
        model,
        question.budget,
        process=outside,
        scratch=scratch,
        swap=o.swap_memory,
        draft=question.draft.weights,
        habits=habits,
    )
    nothing = fit_with(kv=0)
    whole = nothing.parts.total - nothing.parts.experts + model.expert_bytes
    per_token = model.kv_bytes_per_token + question.draft.kv_bytes_per_token
    block = per_token * o.block_size
    room = question.budget - whole
    if room < block:
        room = question.budget - nothing.least
    least_blocks = -(-(question.prompt + question.output) // o.block_size)
    if o.num_blocks is not None or o.kv_memory is not None:
        blocks = least_blocks = o.num_blocks or (o.kv_memory or 0) // block
    elif room >= 2 * block:
        blocks = size_kv(per_token, model.max_positions, o, room).num_blocks
    else:
        blocks = 0
    fit = fit_with(kv=blocks * block)
    if not blocks:
        least = nothing.least + least_blocks * block
        fit = replace(fit, least=max(least, question.budget + 1))
    return fit, ServerBounds(o.max_num_seqs, o.max_num_batched_tokens, o.block_size, blocks)


def predict_workload(setup: _Setup, work: UniformWorkload) -> WorkloadForecast:
    found = predict_batch(setup.predictor, work, setup.bounds)
    bound = throughput_bound(
        setup.machine,
        setup.model,
        work.prompt,
        work.output,
        kv_tokens=setup.bounds.kv_tokens,
        concurrency=found.concurrent,
        weights=setup.fit.weights,
    )
    return WorkloadForecast(
        batch=work.requests,
        concurrent=found.concurrent,
        generated_per_s=found.generated_per_s,
        tokens_per_s=found.tokens_per_s,
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        seconds=found.seconds,
        binding=binding_resource(setup, work, found),
        busy={name: found.busy.share(name) for name in ("memory", "compute", "disk", "fixed")},
        bound=bound.generated_per_s,
    )


def binding_resource(setup: _Setup, work: UniformWorkload, found: BatchPrediction) -> str:
    """Of which half would cost most; ``Resource.FIXED`` where half of nothing costs anything."""
    costs = {
        resource: found.generated_per_s / with_half(setup, work, resource)
        for resource in halved(setup)
    }
    worst = max(costs, key=lambda resource: costs[resource])
    fixed = found.busy.share("fixed")
    # Steps' own cost doubled would cost 1 + its share.
    if costs[worst] < BINDS or 1 + fixed > costs[worst]:
        return Resource.FIXED
    return worst


def halved(setup: _Setup) -> Iterator[Resource]:
    yield from (Resource.MEMORY_BANDWIDTH, Resource.COMPUTE)
    if setup.fit.weights.share < 1:
        yield from (Resource.DISK, Resource.MEMORY_SIZE)
    yield Resource.KV_CAPACITY


def with_half(setup: _Setup, work: UniformWorkload, resource: Resource) -> float:
    """Generated tokens per second with half of a resource; 0 where that would not do at all."""
    machine, fit, bounds = setup.machine, setup.fit, setup.bounds
    if resource is Resource.MEMORY_BANDWIDTH:
        machine = machine.scaled(memory=0.5)
    elif resource is Resource.COMPUTE:
        machine = machine.scaled(compute=0.5)
    elif resource is Resource.DISK:
        machine = machine.scaled(disk=0.5)
    elif resource is Resource.MEMORY_SIZE:
        fit = replace(fit, weights=replace(fit.weights, share=fit.weights.share / 2))
    else:
        bounds = replace(bounds, num_blocks=bounds.num_blocks // 2)
    less = _Setup(machine, setup.model, fit, bounds)
    try:
        return predict_batch(less.predictor, work, less.bounds).generated_per_s
    except ConfigError:
        return 1e-9


Change = Callable[[ForecastQuestion], ForecastQuestion]


def alternatives_to(
    sizes: StoredSizes,
    question: ForecastQuestion,
    ops: Ops,
    machine: MachineModel,
    now: tuple[WorkloadForecast, ...],
) -> Iterator[Alternative]:
    """Changes that give any of the batches more; those of kinds not measured here are left out."""
    for name, change in changes_of(question, sizes):
        other = change(question)
        try:
            model = demand_of(sizes, other.options, ops).with_habits(machine.habits)
            fit, bounds = divide_memory(model, other, sizes.spec, machine.habits)
            if not fit.fits:
                continue
            setup = _Setup(machine, model, fit, bounds)
            rates = tuple(
                predict_batch(setup.predictor, work, bounds).generated_per_s
                for work in asked(other)
            )
        except ConfigError:
            continue
        gain = max(rate / before.generated_per_s for rate, before in zip(rates, now, strict=True))
        if gain >= WORTH:
            yield Alternative(name, rates, gain)


def changes_of(question: ForecastQuestion, sizes: StoredSizes) -> Iterator[tuple[str, Change]]:
    def loading(**update: Any) -> Change:
        return lambda q: replace(q, options=q.options.model_copy(update=update))

    for bits in ("int8", "int4"):
        if question.options.quantization != bits:
            yield f"--quantization {bits}", loading(quantization=bits)
    if question.options.kv_dtype != "int8":
        yield "--kv-dtype int8", loading(kv_dtype="int8")
    yield "twice the memory", lambda q: replace(q, budget=2 * q.budget)
    more = 4 * question.options.max_num_batched_tokens
    if max(question.batches) > 1:
        yield f"--max-num-batched-tokens {more}", loading(max_num_batched_tokens=more)
    if max(question.batches) > question.options.max_num_seqs:
        seqs = max(question.batches)
        tokens = max(question.options.max_num_batched_tokens, seqs)
        yield (
            f"--max-num-seqs {seqs}",
            loading(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        )
