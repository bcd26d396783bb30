"""What a model asks of a machine: weights, bytes, and operations. Pure.

Weights are counted, bytes are as held in memory, operations are two for each multiply-add. Which
bytes a checkpoint has is found in ``offload.checkpoint_demand``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeserve.offload.model.distinct import equal_use, expected_distinct, use_alike
from moeserve.offload.model.locality import RoutingHabits


@dataclass(frozen=True, slots=True)
class MatrixDemand:
    """A matrix that rows are multiplied with, or several that are met by the same rows."""

    weights: int
    nbytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class ExpertsDemand:
    """Routed experts of a layer; ``each`` is one of them. ``use[e]`` is the probability that a
    token chooses expert e."""

    each: MatrixDemand
    count: int
    top_k: int
    use: tuple[float, ...] = ()

    @property
    def chosen(self) -> tuple[float, ...]:
        """``use``, equal where it is not known."""
        return self.use or equal_use(self.count, self.top_k)

    @property
    def nbytes(self) -> int:
        return self.count * self.each.nbytes

    def touched(self, tokens: float) -> float:
        """How many of them a step of so many tokens touches, on average."""
        if not self.use:
            return self.count * expected_distinct((self.top_k / self.count,), tokens)
        return expected_distinct(self.use, tokens)


@dataclass(frozen=True, slots=True)
class AttentionDemand:
    """``kv_bytes`` of one token, and the operations of a query token for each position it sees, of
    which there are at most ``window``."""

    kind: str
    kv_bytes: int
    operations: int
    window: int | None = None

    def seen(self, context: float) -> float:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True)
class LayerDemand:
    """``always`` are the matrices that every token meets, norms and biases counted with them."""

    always: tuple[MatrixDemand, ...]
    attention: AttentionDemand
    experts: ExpertsDemand | None = None

    def with_shared(self, shared: float) -> LayerDemand:
        """With a use of experts by which tokens of different requests choose so much alike."""
        if self.experts is None or self.experts.use:
            return self
        use = use_alike(self.experts.count, self.experts.top_k, shared)
        return replace(self, experts=replace(self.experts, use=use))

    @property
    def trunk_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.always)

    @property
    def expert_bytes(self) -> int:
        return 0 if self.experts is None else self.experts.nbytes


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """``layers`` are ``(how many, alike)`` in their order. ``head`` is met by the rows whose logits
    are wanted; of the embedding a token reads one row. ``other_bytes`` are held and not read by a
    step (the MTP block)."""

    layers: tuple[tuple[int, LayerDemand], ...]
    head: MatrixDemand
    embedding_bytes: int
    hidden: int
    vocab: int
    max_positions: int
    other_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return sum(count for count, _ in self.layers)

    @property
    def trunk_bytes(self) -> int:
        return sum(count * layer.trunk_bytes for count, layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        return sum(count * layer.expert_bytes for count, layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        outside = self.head.nbytes + self.embedding_bytes + self.other_bytes
        return outside + self.trunk_bytes + self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(count * layer.attention.kv_bytes for count, layer in self.layers)

    @property
    def record_bytes(self) -> int:
        """Of the largest expert; 0 where nothing is routed."""
        sizes = [layer.experts.each.nbytes for _, layer in self.layers if layer.experts]
        return max(sizes, default=0)

    @property
    def two_layers_of_experts(self) -> int:
        """Bytes of the experts that have to be in memory at least where they are streamed."""
        sizes = [layer.expert_bytes for count, layer in self.layers for _ in range(min(2, count))]
        return sum(sorted(sizes)[-2:])

    @property
    def operations_per_token(self) -> float:
        """Of all products that a token meets in the layers, and one row of the head."""
        total = 2.0 * self.head.weights
        for count, layer in self.layers:
            total += count * sum(2.0 * matrix.weights for matrix in layer.always)
            if layer.experts is not None:
                total += count * 2.0 * layer.experts.top_k * layer.experts.each.weights
        return total

    def touched_bytes(self, tokens: float) -> float:
        """Of weights in the layers and the head, by a step of so many tokens."""
        total = float(self.head.nbytes)
        for count, layer in self.layers:
            total += count * layer.trunk_bytes
            if layer.experts is not None:
                total += count * layer.experts.touched(tokens) * layer.experts.each.nbytes
        return total

    def attention_operations(self, context: float) -> float:
        """Of one query token that sees so many positions in every layer."""
        return sum(
            count * layer.attention.operations * layer.attention.seen(context)
            for count, layer in self.layers
        )

    def with_habits(self, habits: RoutingHabits) -> ModelDemand:
        """The same, whose tokens choose as much alike as was counted, in layers whose use of each
        expert is not known."""
        if not habits.shared:
            return self
        known = tuple((count, layer.with_shared(habits.shared)) for count, layer in self.layers)
        return replace(self, layers=known)

    def with_use(self, use_L: Sequence[tuple[float, ...]]) -> ModelDemand:
        """The same with the use of experts of each layer that routes, in their order."""
        apart = [layer for count, layer in self.layers for _ in range(count)]
        given = iter(use_L)
        known = tuple(
            (1, layer)
            if layer.experts is None
            else (1, replace(layer, experts=replace(layer.experts, use=next(given))))
            for layer in apart
        )
        return replace(self, layers=known)
