"""What kernels of one shape cost, by kind of weights and KV: looked at again and again.

A machine that others use too is slower for seconds, then faster again. What is looked at once is
seen in one of these states; so kernels and steps take turns, and the median of each figure counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import TypeVar

from moeserve.forecast.kernels import KernelProbe
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.machine import AttentionCost, MachineModel, ProductCurve

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KernelCosts:
    """By kind."""

    products: Mapping[str, ProductCurve] = field(default_factory=dict)
    experts: Mapping[str, ProductCurve] = field(default_factory=dict)
    attention: Mapping[str, AttentionCost] = field(default_factory=dict)

    @staticmethod
    def in_use(machine: MachineModel) -> KernelCosts:
        """Those that ``machine`` has."""
        return KernelCosts(machine.products, machine.experts, machine.attention)

    def in_place_of(self, machine: MachineModel) -> MachineModel:
        """``machine`` with these instead of its own."""
        return replace(
            machine, products=self.products, experts=self.experts, attention=self.attention
        )

    def times(self, factor: float) -> KernelCosts:
        """With so many times the seconds."""

        def curve(one: ProductCurve) -> ProductCurve:
            cold, warm = (tuple(factor * s for s in seconds) for seconds in (one.cold, one.warm))
            return ProductCurve(one.rows, cold, warm)

        def attention(one: AttentionCost) -> AttentionCost:
            return AttentionCost(*(factor * getattr(one, f.name) for f in fields(one)))

        return KernelCosts(
            {kind: curve(one) for kind, one in self.products.items()},
            {kind: curve(one) for kind, one in self.experts.items()},
            {kind: attention(one) for kind, one in self.attention.items()},
        )


def measure_kind(probe: KernelProbe, kind: str, *, router: bool) -> KernelCosts:
    """With a ``router``, products in fp32 too, in which every model has its routers."""
    shapes = probe.shapes
    products = {kind: probe.products(kind)}
    experts = {kind: probe.experts(kind)} if shapes.experts else {}
    attention = {}
    if kind != "int4":
        attention[f"{kind}-latent" if shapes.latent else kind] = probe.attention(kind)
    if router and kind != "fp32":
        of_router = replace(probe, shapes=replace(shapes, linear=max(8, shapes.experts)))
        products["fp32"] = of_router.products("fp32")
    return KernelCosts(products, experts, attention)


def measure_for(probe: KernelProbe, model: ModelDemand) -> KernelCosts:
    """Those that steps of ``model`` run, once."""
    layers = [layer for _, layer in model.layers]
    always = [matrix.kind for layer in layers for matrix in layer.always]
    routed = [layer.experts.each.kind for layer in layers if layer.experts is not None]
    attention = dict.fromkeys(layer.attention.kind for layer in layers)
    return KernelCosts(
        {kind: probe.products(kind) for kind in dict.fromkeys((*always, model.head.kind))},
        {kind: probe.experts(kind) for kind in dict.fromkeys(routed)},
        {kind: probe.attention(kind.removesuffix("-latent")) for kind in attention},
    )


def joined(costs: Iterable[KernelCosts]) -> KernelCosts:
    """Of kinds that were measured apart; of a kind that comes again the last one counts."""
    products: dict[str, ProductCurve] = {}
    experts: dict[str, ProductCurve] = {}
    attention: dict[str, AttentionCost] = {}
    for one in costs:
        products |= one.products
        experts |= one.experts
        attention |= one.attention
    return KernelCosts(products, experts, attention)


def middle(looks: Sequence[KernelCosts]) -> KernelCosts:
    """The median of each figure, of as many looks as have it."""
    return KernelCosts(
        {kind: middle_curve(of) for kind, of in by_kind(one.products for one in looks)},
        {kind: middle_curve(of) for kind, of in by_kind(one.experts for one in looks)},
        {kind: middle_attention(of) for kind, of in by_kind(one.attention for one in looks)},
    )


def by_kind(looks: Iterable[Mapping[str, T]]) -> Iterable[tuple[str, list[T]]]:
    found: dict[str, list[T]] = {}
    for look in looks:
        for kind, one in look.items():
            found.setdefault(kind, []).append(one)
    return found.items()


def middle_curve(looks: Sequence[ProductCurve]) -> ProductCurve:
    """On the rows that all have: a look at a slow moment has fewer."""
    rows = min((one.rows for one in looks), key=len)
    cold, warm = (
        tuple(median(seconds[i] for seconds in of) for i in range(len(rows)))
        for of in ([one.cold for one in looks], [one.warm for one in looks])
    )
    return ProductCurve(rows, cold, warm)


def middle_attention(looks: Sequence[AttentionCost]) -> AttentionCost:
    return AttentionCost(
        *(median(getattr(one, f.name) for one in looks) for f in fields(AttentionCost))
    )
