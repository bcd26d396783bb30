"""Which part of a model is in memory, and what of it a step has to read from disk. Pure.

What must be there in any case: the trunk of the layers, embedding, head and KV. Of the routed
experts a share may be: the most used ones first (``locality``). What is read for a step goes
through the slots of experts that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moeserve.errors import ConfigError
from moeserve.offload.model.demand import ExpertsDemand, LayerDemand, ModelDemand
from moeserve.offload.model.distinct import expected_distinct, least_used, uses_nearly_all
from moeserve.offload.model.halving import last_that
from moeserve.offload.model.locality import UNKNOWN, RoutingHabits, kept_experts

# Layers whose missing experts take slots while a step runs: one that is computed, one that is read.
BUFFERED_LAYERS = 2
# Of what is read ahead of a layer's choice, the share that has to be used for it to go on.
LEAST_USED = 0.5


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """What a step reads of a layer's experts, on average: those ``missing`` that it needs, of which
    the share ``foreseen`` is known before the layer has chosen, and with those up to ``in_vain``
    that it does not need. ``spread`` is the standard deviation of those that are foreseen, where
    each expert that is needed is there or not by chance. Of a ``whole`` layer that is read ahead
    those in vain are read in any case, since they lie between others."""

    missing: float = 0.0
    foreseen: float = 0.0
    in_vain: float = 0.0
    spread: float = 0.0
    whole: bool = False


def spread_of(mean: float, among: float) -> float:
    """The standard deviation of how many of so many there are, each by the same chance."""
    return math.sqrt(max(0.0, mean * (1 - mean / among))) if among > 0 else 0.0


@dataclass(frozen=True, slots=True)
class WeightsInMemory:
    """There is room for ``share`` of the routed experts' bytes, and for ``window`` of the layers'
    trunks where not all are in memory. ``foreseen`` of the experts that a layer needs are known
    while the layer before computes, ``foreseen_whole`` where a step needs nearly all of them. Of
    the room, which ``routed`` layers share, what a step reads for two layers keeps nothing for the
    next step; 0 is that this is not known. ``repeat`` is how often a choice of a request's token is
    another's too (``locality``); 0 is that nothing is preferred."""

    share: float = 1.0
    window: int | None = None
    foreseen: float = 0.0
    foreseen_whole: float = 0.0
    routed: int = 0
    repeat: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.share, self.foreseen, self.foreseen_whole, self.repeat)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"{self}: shares lie within 0..1")

    @staticmethod
    def of(
        share: float, routed: int, habits: RoutingHabits, window: int | None = None
    ) -> WeightsInMemory:
        """Of a model of so many layers that route, all of which but the first are foreseen."""
        followers = max(0, routed - 1) / max(1, routed)
        foreseen = habits.foreseen * followers
        return WeightsInMemory(share, window, foreseen, followers, routed, habits.repeat)

    @property
    def all(self) -> bool:
        return self.share >= 1 and self.window is None

    def expert_reads(self, experts: ExpertsDemand, tokens: float, made: float) -> ExpertReads:
        """Of a layer in a step of so many tokens, whose requests have run for ``made`` steps."""
        missing, touched = self.missing_experts(experts, tokens, made), experts.touched(tokens)
        idle, absent = experts.count - touched, experts.count * (1 - self.share) - missing
        cold = min(1.0, max(0.0, absent) / idle) if idle > 0 else 0.0
        if uses_nearly_all(tokens, experts.top_k, experts.count):
            foreseen = max(self.foreseen, self.foreseen_whole)
            in_vain = idle * cold if foreseen else 0.0
            spread = spread_of(foreseen * missing, touched)
            return ExpertReads(missing, foreseen, in_vain, spread, whole=True)
        ahead, in_vain = self.foreseen * missing, (1 - self.foreseen) * touched * cold
        if ahead < LEAST_USED * (ahead + in_vain):
            return ExpertReads(missing)
        return ExpertReads(missing, self.foreseen, in_vain, spread_of(ahead, touched))

    def missing_experts(self, experts: ExpertsDemand, tokens: float, made: float = 0.0) -> float:
        """How many experts of a layer, which a step needs, are not there, on average."""
        if self.share >= 1:
            return 0.0
        held = self.share * experts.count
        missed = self._missed_by(experts, tokens, made)
        if not self.routed:
            return missed(held)

        # What is read takes room itself, and more is missing the less room there is.
        def more(than: float) -> bool:
            return missed(max(0.0, held - BUFFERED_LAYERS * than / self.routed)) > than

        return last_that(more, 0.0, experts.touched(tokens))

    def _missed_by(
        self, experts: ExpertsDemand, tokens: float, made: float
    ) -> Callable[[float], float]:
        """Of what a step needs, by how many experts of the layer are kept: by what all requests
        prefer, or by what those that run do, whichever says more."""
        alike = kept_experts(experts.top_k / experts.count, self.repeat, tokens, made)
        touched = experts.touched(tokens)

        def missed(held: float) -> float:
            found = experts.count * alike.hits(held / experts.count)
            if not experts.use:
                return max(0.0, touched - found)
            whole = int(held)
            absent = least_used(experts.chosen, whole)
            # Of the next one a part is there: in some layers it is, in others not.
            part = (held - whole) * expected_distinct(absent[:1], tokens)
            return max(0.0, min(touched - found, expected_distinct(absent, tokens) - part))

        return missed

    def missing_trunk(self, layer: LayerDemand, num_layers: int) -> float:
        """Bytes of a layer's trunk that a step has to read, on average."""
        if self.window is None or self.window >= num_layers:
            return 0.0
        return layer.trunk_bytes * (1 - self.window / num_layers)

    def missing_bytes(self, model: ModelDemand, tokens: float, made: float = 0.0) -> float:
        """Of all layers, in one step of so many tokens, whose requests have run for ``made``."""
        total = 0.0
        for count, layer in model.layers:
            total += count * self.missing_trunk(layer, model.num_layers)
            if layer.experts is not None:
                missed = self.missing_experts(layer.experts, tokens, made)
                total += count * missed * layer.experts.each.nbytes
        return total


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes of everything that is held. ``process`` is the interpreter with its libraries,
    ``scratch`` what a step takes while it runs, ``swap`` is for KV of preempted requests, ``draft``
    are the weights of a model that drafts."""

    process: int
    trunk: int
    embedding: int
    head: int
    experts: int
    kv: int
    scratch: int
    swap: int = 0
    draft: int = 0

    @property
    def total(self) -> int:
        return (
            self.process
            + self.trunk
            + self.embedding
            + self.head
            + self.experts
            + self.kv
            + self.scratch
            + self.swap
            + self.draft
        )


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What of a model a budget holds. ``least`` bytes are needed for the model to run at all:
    everything but experts, and two layers' worth of these. ``budget`` below that does not do."""

    budget: int
    parts: MemoryParts
    weights: WeightsInMemory
    least: int

    @property
    def fits(self) -> bool:
        return self.budget >= self.least

    @property
    def whole(self) -> bool:
        """Nothing has to be streamed."""
        return self.fits and self.weights.all


def fit_memory(
    model: ModelDemand,
    budget: int,
    *,
    process: int,
    kv: int,
    scratch: int,
    swap: int = 0,
    draft: int = 0,
    habits: RoutingHabits = UNKNOWN,
) -> MemoryFit:
    """Of ``budget`` bytes, everything but experts first, then as many experts as there is room."""
    parts = MemoryParts(
        process=process,
        trunk=model.trunk_bytes + model.other_bytes,
        embedding=model.embedding_bytes,
        head=model.head.nbytes,
        experts=0,
        kv=kv,
        scratch=scratch,
        swap=swap,
        draft=draft,
    )
    room = max(0, budget - parts.total)
    held = min(model.expert_bytes, room)
    share = held / model.expert_bytes if model.expert_bytes else 1.0
    least = parts.total + min(model.two_layers_of_experts, model.expert_bytes)
    full = replace(parts, experts=held)
    routed = sum(count for count, layer in model.layers if layer.experts)
    return MemoryFit(budget, full, WeightsInMemory.of(share, routed, habits), least)
