"""The tensors and matrices of a decoder's part: listed by name, and put in again.

A part's weights are dataclasses of tensors, packed matrices, packed experts, numbers, and others of
their kind; a name is the way to a field, such as ``attention.qkv``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from moeserve.kernels.ops import Experts, Layer, Linear, Part, PartWeights

Value = Tensor | Linear | Experts
T = TypeVar("T")
# Of a layer; they lie in records of their own.
ROUTED = "moe.experts"


def parts_of(layer: Layer) -> dict[str, PartWeights]:
    """The weights of a layer's parts, by what they are called here."""
    if isinstance(layer.mlp, Part):
        return {"attention": layer.attention.weights, "dense": layer.mlp.weights}
    router, mixture = layer.mlp
    return {
        "attention": layer.attention.weights,
        "router": router.weights,
        "moe": mixture.weights,
    }


def leaves_of(parts: Mapping[str, object]) -> dict[str, Value]:
    """In a fixed order."""
    return {
        name: value
        for part, weights in parts.items()
        for name, value in _leaves(weights, part)
        if name != ROUTED
    }


def with_leaves(weights: T, name: str, found: Mapping[str, Value]) -> T:
    """The same with every leaf of ``found`` in its place; what is not there stays."""
    if name in found:
        return found[name]  # type: ignore[return-value]
    if not _has_fields(weights):
        return weights
    held: Any = weights
    changed = {
        f.name: with_leaves(getattr(held, f.name), f"{name}.{f.name}", found) for f in fields(held)
    }
    return replace(held, **changed)  # type: ignore[no-any-return]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Value]]:
    if isinstance(value, Tensor | Linear | Experts):
        yield name, value
    elif _has_fields(value):
        for f in fields(value):
            yield from _leaves(getattr(value, f.name), f"{name}.{f.name}")


def _has_fields(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
