"""Which part of a model is in memory, and what of it a step has to read from disk. Pure.

What must be there in any case: the trunk of the layers, embedding, head and KV. Of the routed
experts a share may be: the most used ones first. What is read for a step goes through the slots of
experts that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.errors import ConfigError
from moeserve.offload.model.demand import ExpertsDemand, LayerDemand, ModelDemand
from moeserve.offload.model.distinct import expected_distinct, least_used, uses_nearly_all

# Layers whose chosen experts take slots while a step runs: one that is computed, one that is read.
BUFFERED_LAYERS = 2


@dataclass(frozen=True, slots=True)
class WeightsInMemory:
    """There is room for ``share`` of the routed experts' bytes, and for ``window`` of the layers'
    trunks where not all are in memory. ``foreseen`` of the missing experts' bytes are read while
    the layer before computes, for the rest the layer waits; ``foreseen_whole`` where a step needs
    nearly all experts of a layer. Of the room, which ``routed`` layers share, what a step's experts
    of two layers take keeps nothing for the next step; 0 is that this is not known."""

    share: float = 1.0
    window: int | None = None
    foreseen: float = 0.0
    foreseen_whole: float = 0.0
    routed: int = 0

    def __post_init__(self) -> None:
        shares = (self.share, self.foreseen, self.foreseen_whole)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"{self}: shares lie within 0..1")

    def foreseen_by(self, experts: ExpertsDemand | None, tokens: float) -> float:
        """Of what a layer's step of so many tokens misses."""
        if experts is None or not uses_nearly_all(tokens, experts.top_k, experts.count):
            return self.foreseen
        return max(self.foreseen, self.foreseen_whole)

    @property
    def all(self) -> bool:
        return self.share >= 1 and self.window is None

    def missing_experts(self, experts: ExpertsDemand, tokens: float) -> float:
        """How many experts of a layer a step of so many tokens has to read, on average."""
        if self.share >= 1:
            return 0.0
        held, touched = self.share * experts.count, experts.touched(tokens)
        if self.routed:
            held = max(0.0, held - BUFFERED_LAYERS * touched / self.routed)
        if not experts.use:
            return touched * (1 - held / experts.count)
        whole = int(held)
        absent = least_used(experts.chosen, whole)
        missed = expected_distinct(absent, tokens)
        # Of the next one a part is there: in some layers it is, in others not.
        return missed - (held - whole) * expected_distinct(absent[:1], tokens)

    def missing_trunk(self, layer: LayerDemand, num_layers: int) -> float:
        """Bytes of a layer's trunk that a step has to read, on average."""
        if self.window is None or self.window >= num_layers:
            return 0.0
        return layer.trunk_bytes * (1 - self.window / num_layers)

    def missing_bytes(self, model: ModelDemand, tokens: float) -> float:
        """Of all layers, in one step of so many tokens."""
        total = 0.0
        for count, layer in model.layers:
            total += count * self.missing_trunk(layer, model.num_layers)
            if layer.experts is not None:
                missed = self.missing_experts(layer.experts, tokens)
                total += count * missed * layer.experts.each.nbytes
        return total


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes of everything that is held. ``process`` is the interpreter with its libraries,
    ``scratch`` what a step takes while it runs."""

    process: int
    trunk: int
    embedding: int
    head: int
    experts: int
    kv: int
    scratch: int

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
    model: ModelDemand, budget: int, *, process: int, kv: int, scratch: int, foreseen: float = 0.0
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
    )
    room = max(0, budget - parts.total)
    held = min(model.expert_bytes, room)
    share = held / model.expert_bytes if model.expert_bytes else 1.0
    least = parts.total + min(model.two_layers_of_experts, model.expert_bytes)
    full = MemoryParts(
        parts.process, parts.trunk, parts.embedding, parts.head, held, parts.kv, parts.scratch
    )
    routed = sum(count for count, layer in model.layers if layer.experts)
    return MemoryFit(budget, full, WeightsInMemory(share, None, foreseen, 1.0, routed), least)
