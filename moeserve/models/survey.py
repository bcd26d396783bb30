"""What serving a checkpoint would take, from its headers alone: no weight is read.

A decoder is put together from tensors that have a shape and no data, so whatever loading would
refuse is refused here too. Sizes are bytes, as held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeserve.kernels.reference import ReferenceOps
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import assemble
from moeserve.models.spec import ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class Survey:
    """``active_bytes`` are the weights that one token reads on its way through the layers."""

    spec: ModelSpec
    weight_bytes: int
    active_bytes: int
    kv_bytes_per_token: int


class Headers(Checkpoint):
    """A checkpoint without data; remembers the sizes of what was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.elements: dict[str, int] = {}

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        tensor = super().get(name, shape).to("meta")
        self.elements[name] = tensor.numel()
        return tensor


def survey(path: str | Path, dtype: torch.dtype | None = None) -> Survey:
    """Raises what loading this folder would raise about its config, tensors and shapes."""
    headers = Headers.open(path)
    with torch.device("meta"):
        decoder = assemble(headers, dtype=dtype, ops=ReferenceOps())
    size = decoder.dtype.itemsize
    return Survey(
        decoder.spec,
        sum(headers.elements.values()) * size,
        round(active_elements(headers.elements, decoder.spec) * size),
        decoder.kv_bytes_per_token,
    )


def active_elements(elements: Mapping[str, int], spec: ModelSpec) -> float:
    """All of a layer but the experts not chosen, and the head; of the embedding only a row."""
    active = 0.0
    for name, count in elements.items():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            tied_or_head = "lm_head" in parts or spec.tied_embeddings
            active += count if tied_or_head or "norm" in parts else spec.hidden
        elif int(parts[2]) < len(spec.layers):
            mlp = spec.layers[int(parts[2])].mlp
            if isinstance(mlp, MoeSpec) and "experts" in parts:
                active += count * mlp.router.top_k / mlp.router.num_experts
            else:
                active += count
    return active
