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

from moeserve.kernels.matrix import tensors_of
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.checkpoint import FLOATS, Checkpoint, Entry
from moeserve.models.decoder import assemble, skeleton_decoder
from moeserve.models.gguf import blocks
from moeserve.models.gguf.block_types import SUFFIXES
from moeserve.models.packed.checkpoint import PackedCheckpoint
from moeserve.models.packed.layout import is_packed
from moeserve.models.spec import ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class Survey:
    """``active_bytes`` are the weights that one token reads on its way through the layers."""

    spec: ModelSpec
    weight_bytes: int
    active_bytes: int
    kv_bytes_per_token: int


class Headers(Checkpoint):
    """A checkpoint without data; remembers what was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: dict[str, Tensor] = {}

    def _mapped(
        self, name: str, shape: tuple[int, ...] | None, kinds: tuple[torch.dtype, ...]
    ) -> Tensor:
        tensor = super()._mapped(name, shape, kinds)
        self.seen[name] = tensor
        return tensor

    def _data(self, entry: Entry, kind: torch.dtype) -> Tensor:
        return torch.empty(entry.shape, dtype=kind, device="meta")

    def held_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Floats in ``dtype``, codes as they are stored, blocks of GGUF as what they become."""
        return {name: _held_bytes(name, tensor, dtype) for name, tensor in self.seen.items()}


def _held_bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    module, _, end = name.rpartition(".")
    if end not in SUFFIXES:
        return tensor.numel() * dtype.itemsize if tensor.dtype in FLOATS else tensor.nbytes
    if module.endswith("embed_tokens"):
        return blocks.to_values(SUFFIXES[end], tensor, dtype).nbytes
    exact = SUFFIXES[end] in blocks.EXACT
    held = (blocks.to_groups if exact else blocks.to_rows)(SUFFIXES[end], tensor)
    return sum(t.nbytes for t in tensors_of(held))


def survey(path: str | Path) -> Survey:
    """Raises what loading this folder would raise about its config, tensors and shapes."""
    if is_packed(Path(path)):
        return _survey_packed(PackedCheckpoint.open(path))
    headers = Headers.open(path)
    with torch.device("meta"):
        decoder = assemble(headers, ReferenceOps())
    sizes = headers.held_bytes(decoder.dtype)
    row = decoder.spec.hidden * decoder.dtype.itemsize
    return Survey(
        decoder.spec,
        sum(sizes.values()),
        round(active_bytes(sizes, decoder.spec, row)),
        decoder.kv_bytes_per_token,
    )


def _survey_packed(checkpoint: PackedCheckpoint) -> Survey:
    """From the sizes of its regions; an embedding that is no head is hardly read."""
    decoder = skeleton_decoder(checkpoint)
    header, spec = checkpoint.header, decoder.spec
    active = header.ends.region.nbytes
    for layer, of in zip(header.layers, spec.layers, strict=False):
        active += layer.trunk.region.nbytes
        if layer.experts is not None and isinstance(of.mlp, MoeSpec):
            active += layer.experts.nbytes * of.mlp.router.top_k
    if not spec.tied_embeddings:
        active -= decoder.embedding_WH.nbytes
    return Survey(spec, checkpoint.total_bytes, active, decoder.kv_bytes_per_token)


def active_bytes(sizes: Mapping[str, int], spec: ModelSpec, row: int) -> float:
    """All of a layer but the experts not chosen, and the head; of the embedding only a ``row``."""
    active = 0.0
    for name, count in sizes.items():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            tied_or_head = "lm_head" in parts or spec.tied_embeddings
            active += count if tied_or_head or "norm" in parts else row
        elif int(parts[2]) < len(spec.layers):
            mlp = spec.layers[int(parts[2])].mlp
            if isinstance(mlp, MoeSpec) and "experts" in parts:
                active += count * mlp.router.top_k / mlp.router.num_experts
            else:
                active += count
    return active
