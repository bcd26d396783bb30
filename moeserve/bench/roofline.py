"""What the machine allows: weights touched over its bandwidth, or operations over its peak.

A product of ``tokens`` rows with a matrix can be no faster than reading the matrix once, nor than
its multiply-adds; a model's step no faster than the sum over its matrices. Which experts a step
touches, and with how many tokens each, is counted from the routing that happened. Reading the
cache and everything that is not a matrix count as free, so that this is a bound. Letters as in
``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import StepPlan
from moeserve.errors import ConfigError
from moeserve.kernels.matrix import GROUP
from moeserve.kernels.probe import Machine, Rate
from moeserve.models.spec import LayerSpec, ModelSpec, MoeSpec
from moeserve.offload.checkpoint_demand import attention_matrices

# Bytes of one weight, scales of groups included, and the kind of peak its products have.
PRECISIONS: dict[str, tuple[float, str]] = {
    "fp32": (4.0, "fp32"),
    "bf16": (2.0, "bf16"),
    "int8": (1.0, "int8"),
    "int4": (0.5 + 5 / GROUP, "int8"),
}


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds at least, for weights of one precision on one machine."""

    bytes_per_weight: float
    bandwidth: float
    peak: float | None

    def product(self, tokens: int, weights: int) -> float:
        """``tokens`` rows times a matrix of so many weights."""
        memory = weights * self.bytes_per_weight / self.bandwidth
        if self.peak is None:
            return memory
        return max(memory, 2 * tokens * weights / self.peak)


def roofline(machine: Machine, precision: str) -> Roofline:
    """By the best rates: what the machine can do when nothing else runs."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r}: expected one of {sorted(PRECISIONS)}")
    size, kind = PRECISIONS[precision]
    rates: dict[str, Rate | None] = {
        "int8": machine.int8,
        "bf16": machine.bf16,
        "fp32": machine.fp32,
    }
    rate = rates[kind]
    return Roofline(size, machine.read.best, None if rate is None else rate.best)


def experts_seconds(limit: Roofline, tokens_E: Iterable[int], weights: int) -> float:
    """Of one layer's experts of so many ``weights`` each, met by so many tokens each."""
    return sum(limit.product(tokens, weights) for tokens in tokens_E if tokens)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step asked for: its tokens, its rows of logits, and tokens of each expert."""

    tokens: int
    logit_rows: int
    tokens_LE: dict[int, list[int]] = field(default_factory=dict)


class LoadCounter:
    """A ``StepObserver`` that counts what every step touches."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.steps: list[StepLoad] = []

    def begin(self, plan: StepPlan) -> None:
        self.steps.append(StepLoad(plan.num_tokens, sum(c.samples for c in plan.chunks)))

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        mlp = self._spec.layers[layer].mlp
        assert isinstance(mlp, MoeSpec)
        counts = np.bincount(ids_TC.ravel(), minlength=mlp.router.num_experts)
        self.steps[-1].tokens_LE[layer] = counts.tolist()

    def end(self) -> None: ...


def step_seconds(spec: ModelSpec, load: StepLoad, limit: Roofline) -> float:
    """At least, for one step of the whole model."""
    total = limit.product(load.logit_rows, spec.vocab * spec.hidden) if load.logit_rows else 0.0
    for i, layer in enumerate(spec.layers):
        total += sum(limit.product(load.tokens, w) for w in always_read(layer, spec.hidden))
        if isinstance(layer.mlp, MoeSpec):
            weights = 3 * spec.hidden * layer.mlp.intermediate
            total += experts_seconds(limit, load.tokens_LE[i], weights)
    return total


def always_read(layer: LayerSpec, hidden: int) -> Iterator[int]:
    """Weights of each matrix that every token of a step meets."""
    yield from attention_matrices(layer.attention, hidden)
    mlp = layer.mlp
    if isinstance(mlp, MoeSpec):
        yield mlp.router.num_experts * hidden
        yield 3 * mlp.shared * hidden
    else:
        yield 3 * mlp.intermediate * hidden
