"""How long a step takes on a machine, and what of it which resource is busy. Pure.

Stage 2's step: for each layer the products, by curves measured on this machine, attention over the
KV that is there, and what is read from disk meanwhile; then the head. docs/performance_model.md has
the equations. Of every product and every scan of KV two bounds are known, reading its bytes and its
arithmetic; the measured seconds are charged to the greater, which is what a machine with other
bandwidth or arithmetic would change.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.offload.model.demand import AttentionDemand, LayerDemand, MatrixDemand, ModelDemand
from moeserve.offload.model.locality import LONG
from moeserve.offload.model.machine import MachineModel, ProductCurve
from moeserve.offload.model.residency import ExpertReads, WeightsInMemory

ALL_IN_MEMORY = WeightsInMemory()
NONE = ExpertReads()
# Steps whose layers are remembered, so that a scheduler asks cheaply.
MOST_REMEMBERED = 4096
# Steps that sequences are taken to have decoded where nobody says.
SETTLED = 32


@dataclass(frozen=True, slots=True)
class StepWork:
    """``prefill_pairs`` are the (query, position) pairs that attention of the prompts' tokens has,
    ``decode_context`` the tokens of KV that the decoding sequences hold, ``rows`` those whose
    logits are wanted. The sequences have decoded for ``made`` steps before. A mean over steps need
    not be whole."""

    prefill_tokens: float
    decode_tokens: float
    decode_context: float
    prefill_pairs: float
    rows: float
    made: float = 0.0

    @property
    def tokens(self) -> float:
        return self.prefill_tokens + self.decode_tokens


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """``total`` of a step. The others overlap: how long each resource would be busy by itself, and
    ``fixed``, which is neither."""

    total: float = 0.0
    memory: float = 0.0
    compute: float = 0.0
    disk: float = 0.0
    fixed: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: StepSeconds) -> StepSeconds:
        return StepSeconds(
            self.total + other.total,
            self.memory + other.memory,
            self.compute + other.compute,
            self.disk + other.disk,
            self.fixed + other.fixed,
            self.disk_bytes + other.disk_bytes,
        )

    def times(self, count: float) -> StepSeconds:
        return StepSeconds(
            self.total * count,
            self.memory * count,
            self.compute * count,
            self.disk * count,
            self.fixed * count,
            self.disk_bytes * count,
        )

    def share(self, resource: str) -> float:
        """Of the total, 0..1, how long ``resource`` ("memory", "compute", "disk", "fixed") is
        busy."""
        seconds: float = getattr(self, resource)
        return min(1.0, seconds / self.total) if self.total > 0 else 0.0


LayerParts = tuple[StepSeconds, ExpertReads]


class StepPredictor:
    """Predicts steps of one model on one machine; ``seconds`` is what a scheduler asks.

    Remembers what layers cost for numbers of tokens it was asked about, and is otherwise without
    state: threads may share it.
    """

    def __init__(
        self,
        machine: MachineModel,
        model: ModelDemand,
        weights: WeightsInMemory = ALL_IN_MEMORY,
    ) -> None:
        self.machine = machine
        self.model = model
        self.weights = weights
        self._parts: dict[tuple[float, ...], tuple[LayerParts, ...]] = {}

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        """Of a step with so many tokens of prompts, taken for one prompt from its beginning, and
        the newest token of each of ``decode_tokens`` sequences, which together hold
        ``context_tokens`` tokens of KV. It does not fall as any of the three grows."""
        pairs = prefill_tokens * (prefill_tokens + 1) / 2
        rows = decode_tokens + (prefill_tokens > 0)
        work = StepWork(prefill_tokens, decode_tokens, context_tokens, pairs, rows, SETTLED)
        return self.step(work).total

    def step(self, work: StepWork) -> StepSeconds:
        """Of all layers, the head, and what a step costs in any case."""
        overheads = self.machine.overheads
        fixed = overheads.step + overheads.row * work.rows
        total = StepSeconds(total=fixed, fixed=fixed)
        if not work.tokens:
            return total
        coldness = self._coldness(work)
        parts = self._parts_of(work.tokens, work.made, coldness)
        for (count, layer), (product, reads) in zip(self.model.layers, parts, strict=True):
            computed = self._layer(layer, work, product, coldness)
            total += self._with_reads(layer, computed, reads).times(count)
        if work.rows:
            total += self._matrix(self.model.head, work.rows, coldness)
        return total

    def _coldness(self, work: StepWork) -> float:
        """Rounded, so that what layers cost is remembered."""
        kv = work.decode_context * self.model.kv_bytes_per_token
        touched = self.model.touched_bytes(work.tokens) + kv
        return round(self.machine.coldness(touched), 2)

    def _parts_of(self, tokens: float, made: float, coldness: float) -> tuple[LayerParts, ...]:
        """Of each kind of layer, all that depends on the number of tokens and, where experts are
        read, on the steps before."""
        made = 0.0 if self.weights.share >= 1 else min(LONG, round(made))
        key = (tokens, made, coldness)
        found = self._parts.get(key)
        if found is None:
            found = tuple(
                (self._products(layer, tokens, coldness), self._reads(layer, tokens, made))
                for _, layer in self.model.layers
            )
            if len(self._parts) >= MOST_REMEMBERED:
                self._parts.clear()
            self._parts[key] = found
        return found

    def _products(self, layer: LayerDemand, tokens: float, coldness: float) -> StepSeconds:
        overheads = self.machine.overheads
        total = StepSeconds(total=overheads.layer, fixed=overheads.layer)
        for matrix in layer.always:
            total += self._matrix(matrix, tokens, coldness)
        if layer.experts is not None:
            experts = layer.experts
            touched = experts.touched(tokens)
            curve = self.machine.expert(experts.each.kind)
            rows = tokens * experts.top_k / touched
            total += self._product(experts.each, curve, rows, coldness).times(touched)
            if self.weights.share < 1:
                total += StepSeconds(total=overheads.streamed, fixed=overheads.streamed)
        return total

    def _reads(self, layer: LayerDemand, tokens: float, made: float) -> ExpertReads:
        if layer.experts is None or self.weights.share >= 1:
            return NONE
        return self.weights.expert_reads(layer.experts, tokens, made)

    def _with_reads(
        self, layer: LayerDemand, computed: StepSeconds, reads: ExpertReads
    ) -> StepSeconds:
        """Memory's bandwidth is shared by what the disk writes and the products read. What is
        foreseen is read while the layer before computes, and so is the trunk; for the others the
        layer waits. What is read in vain has begun before the layer chose: as much as there was
        time for, or all that lies between others. Of layers that miss more or less than the mean
        each takes what both take beside each other."""
        trunk = self.weights.missing_trunk(layer, self.model.num_layers)
        if not reads.missing and not trunk:
            return computed
        record = 0 if layer.experts is None else layer.experts.each.nbytes
        each = self._disk_seconds(record)
        ahead = (reads.foreseen * reads.missing + reads.in_vain) * each
        begun = min(1.0, computed.total / ahead) if ahead > 0 and not reads.whole else 1.0
        count = reads.missing + reads.in_vain * begun
        disk = count * each + self._disk_seconds(trunk)
        account = self.machine.overheads.record * count
        nbytes = count * record + trunk
        memory = computed.memory + nbytes / self.machine.memory_bytes_per_s
        late = (1 - reads.foreseen) * reads.missing * each
        beside, spread = self.machine.beside, each * reads.spread
        total = late + beside.seconds(computed.total + account, disk - late, spread)
        fixed = computed.fixed + account
        return StepSeconds(max(total, memory), memory, computed.compute, disk, fixed, nbytes)

    def _disk_seconds(self, nbytes: float) -> float:
        """Of one read."""
        rate = self.machine.disk_rate(nbytes)
        return nbytes / rate if rate else float("inf")

    def _layer(
        self, layer: LayerDemand, work: StepWork, product: StepSeconds, coldness: float
    ) -> StepSeconds:
        overheads, a = self.machine.overheads, layer.attention
        hidden = self.model.hidden
        rest = overheads.of_layer(work.decode_tokens * hidden, work.prefill_tokens * hidden)
        total = product + StepSeconds(total=rest, fixed=rest)
        if work.decode_tokens:
            context = work.decode_tokens * a.seen(work.decode_context / work.decode_tokens)
            total += self._attention(a, context, context * a.kv_bytes, coldness)
        if work.prefill_tokens:
            pairs = work.prefill_tokens * a.seen(work.prefill_pairs / work.prefill_tokens)
            seconds = pairs * a.operations * self.machine.attend(a.kind).prefill
            seconds *= self.machine.slower_compute
            total += StepSeconds(total=seconds, compute=seconds)
        return total

    def _attention(
        self, a: AttentionDemand, pairs: float, nbytes: float, coldness: float
    ) -> StepSeconds:
        cost = self.machine.attend(a.kind)
        warm = min(cost.decode_warm, cost.decode_cold)
        per_operation = warm + coldness * (cost.decode_cold - warm)
        per_operation *= self.machine.overheads.attention
        operations = pairs * a.operations
        reads = nbytes * coldness * self.machine.slower_memory / self._memory_rate
        return self._charged(operations * per_operation, reads, operations * cost.prefill)

    @property
    def _memory_rate(self) -> float:
        """As it was measured."""
        return self.machine.memory[self.machine.threads]

    def _matrix(self, matrix: MatrixDemand, rows: float, coldness: float) -> StepSeconds:
        return self._product(matrix, self.machine.product(matrix.kind), rows, coldness)

    def _product(
        self, matrix: MatrixDemand, curve: ProductCurve, rows: float, coldness: float
    ) -> StepSeconds:
        measured = matrix.weights * curve.at(rows, coldness)
        reads = matrix.nbytes * coldness / self._memory_rate
        arithmetic = matrix.weights * rows * curve.per_row(coldness)
        return self._charged(measured, reads * self.machine.slower_memory, arithmetic)

    def _charged(self, measured: float, reads: float, arithmetic: float) -> StepSeconds:
        """``measured`` seconds stretch with whichever of the two bounds is the greater; ``reads``
        is stretched already, the others are as they were measured."""
        machine = self.machine
        as_measured = reads / machine.slower_memory
        if as_measured >= arithmetic:
            memory, compute = measured * machine.slower_memory, arithmetic
            compute *= machine.slower_compute
        else:
            memory, compute = reads, measured * machine.slower_compute
        return StepSeconds(total=max(memory, compute), memory=memory, compute=compute)
