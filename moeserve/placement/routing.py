"""What was routed where: recorded token by token, or only counted. Plain, validated data.

A ``Workload`` is one kind of traffic. With tokens it has ``topk_TLK`` (-1 where a token used fewer
than K experts) cut into sequences; without, only its loads. ``Routing`` is several workloads of
one model: a plan fitted on it is meant to hold for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.files import require_size

MOST_WEIGHT = 1e12
# Ids that are looked at together: memory for their copies.
_CHUNK_IDS = 1 << 20
Loads = NDArray[np.float64]
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    name: str
    load_LE: Loads
    weight: float = 1.0
    topk_TLK: Ids | None = None
    seq_lens_C: NDArray[np.int64] | None = None
    domain_C: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.load_LE.ndim != 2 or not self.load_LE.size:
            raise PlacementError(f"{self.name}: loads must be [layers, experts], not empty")
        if not np.isfinite(self.load_LE).all():
            l, e = np.argwhere(~np.isfinite(self.load_LE))[0]
            raise PlacementError(
                f"{self.name}: load of layer {l}, expert {e} is {self.load_LE[l, e]}; "
                "loads must be finite"
            )
        if (self.load_LE < 0).any():
            l, e = np.argwhere(self.load_LE < 0)[0]
            raise PlacementError(f"{self.name}: load of layer {l}, expert {e} is negative")
        with np.errstate(over="ignore"):
            total = self.load_LE.sum()
        if not np.isfinite(total):
            raise PlacementError(f"{self.name}: loads add up to more than a number holds")
        silent_L = np.flatnonzero(self.load_LE.sum(axis=1) <= 0)
        if len(silent_L):
            raise PlacementError(f"{self.name}: layer {silent_L[0]} has no load at all")
        if not 0 < self.weight <= MOST_WEIGHT:
            raise PlacementError(
                f"{self.name}: weight {self.weight} must be positive, at most {MOST_WEIGHT:g}"
            )

    @property
    def tokens(self) -> Ids:
        """``topk_TLK``, where the caller needs it."""
        if self.topk_TLK is None:
            raise PlacementError(
                f"{self.name} holds counts only; this needs per-token routing "
                "(topk_ids [tokens, layers, k] with seq_lens)"
            )
        return self.topk_TLK

    @property
    def lengths(self) -> NDArray[np.int64]:
        if self.seq_lens_C is None:
            return np.array([len(self.tokens)], np.int64)
        return self.seq_lens_C


def counted(topk_TLK: Ids, num_experts: int) -> Loads:
    """How often each layer chose each expert."""
    layers = topk_TLK.shape[1]
    load_LE = np.zeros((layers, num_experts))
    base_L = np.arange(layers, dtype=np.int64)[:, None] * num_experts
    for some_TLK in _chunks(topk_TLK):
        flat_TLK = some_TLK + base_L
        hits = np.bincount(flat_TLK[some_TLK >= 0].ravel(), minlength=layers * num_experts)
        load_LE += hits.reshape(layers, num_experts)
    return load_LE


def _chunks(topk_TLK: Ids) -> Iterator[Ids]:
    """Of some tokens each."""
    step = max(1, _CHUNK_IDS // max(1, topk_TLK.shape[1] * topk_TLK.shape[2]))
    for begin in range(0, len(topk_TLK), step):
        yield topk_TLK[begin : begin + step]


def workload_of_tokens(
    name: str,
    topk_TLK: NDArray[np.integer],
    seq_lens: NDArray[np.integer] | None,
    *,
    num_experts: int | None = None,
    domain_ids: NDArray[np.integer] | None = None,
    weight: float = 1.0,
) -> Workload:
    """Check a trace and count its loads."""
    if topk_TLK.ndim != 3 or not topk_TLK.size:
        raise PlacementError(
            f"{name}: topk_ids has shape {topk_TLK.shape}, expected [tokens, layers, k]"
        )
    if not np.issubdtype(topk_TLK.dtype, np.integer):
        raise PlacementError(f"{name}: topk_ids is {topk_TLK.dtype}, expected integers")
    least, most = int(topk_TLK.min()), int(topk_TLK.max())
    experts = most + 1 if num_experts is None else num_experts
    if most >= experts or least < -1:
        wrong = most if most >= experts else least
        raise PlacementError(f"{name}: unknown expert {wrong}; the model has {experts} per layer")
    require_size(name, topk_TLK.shape[1], experts)
    ids_TLK = np.ascontiguousarray(topk_TLK, dtype=np.int32)
    _require_distinct(name, ids_TLK)
    lens_C = _lengths(name, seq_lens, len(ids_TLK))
    if domain_ids is not None and not np.issubdtype(domain_ids.dtype, np.integer):
        raise PlacementError(f"{name}: domain_ids is {domain_ids.dtype}, expected integers")
    domain_C = None if domain_ids is None else domain_ids.astype(np.int64)
    if domain_C is not None and domain_C.shape != lens_C.shape:
        raise PlacementError(
            f"{name}: {domain_C.shape} domain_ids for {len(lens_C)} sequences; give one each"
        )
    return Workload(name, counted(ids_TLK, experts), weight, ids_TLK, lens_C, domain_C)


def _require_distinct(name: str, ids_TLK: Ids) -> None:
    first = 0
    for some_TLK in _chunks(ids_TLK):
        sorted_TLK = np.sort(some_TLK, axis=2)
        twice = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]) & (sorted_TLK[:, :, 1:] >= 0)
        if twice.any():
            t, l, _ = np.argwhere(twice)[0]
            raise PlacementError(f"{name}: token {first + t} chose one expert twice in layer {l}")
        first += len(some_TLK)


def _lengths(name: str, seq_lens: NDArray[np.integer] | None, tokens: int) -> NDArray[np.int64]:
    if seq_lens is None:
        return np.array([tokens], np.int64)
    lens_C = np.asarray(seq_lens)
    if lens_C.ndim != 1 or not np.issubdtype(lens_C.dtype, np.integer) or (lens_C < 0).any():
        raise PlacementError(f"{name}: seq_lens must be a list of lengths")
    if (lens_C > tokens).any() or int(lens_C.sum()) != tokens:
        raise PlacementError(
            f"{name}: ragged trace: seq_lens do not add up to the {tokens} tokens that there are"
        )
    return lens_C.astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Workloads of one model; ``moe_layers[l]`` is the model's own number of layer ``l``."""

    workloads: tuple[Workload, ...]
    moe_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.workloads:
            raise PlacementError("no routing given; pass at least one --routing file")
        shapes = {w.load_LE.shape for w in self.workloads}
        if len(shapes) > 1:
            raise PlacementError(
                f"workloads differ in [layers, experts]: {sorted(shapes)}; "
                "all must come from one model"
            )
        if len(self.moe_layers) != self.num_layers:
            raise PlacementError(
                f"{len(self.moe_layers)} layer numbers for {self.num_layers} layers of load"
            )

    @property
    def num_layers(self) -> int:
        return int(self.workloads[0].load_LE.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.workloads[0].load_LE.shape[1])

    @property
    def has_tokens(self) -> bool:
        return all(w.topk_TLK is not None for w in self.workloads)

    @property
    def share_LEW(self) -> Loads:
        """Each workload's loads as shares: every layer adds up to 1."""
        return np.stack(
            [w.load_LE / w.load_LE.sum(axis=1, keepdims=True) for w in self.workloads], axis=2
        )

    @property
    def mix_W(self) -> Loads:
        """Part of each workload in the mixture: its weight, for traces times its tokens."""
        weight_W = np.array([w.weight for w in self.workloads], np.float64)
        if self.has_tokens:
            weight_W *= [len(w.tokens) for w in self.workloads]
        weight_W /= weight_W.sum()
        return weight_W

    @property
    def mixed_LE(self) -> Loads:
        """Shares of the weighted mixture of workloads."""
        mixed_LE: Loads = self.share_LEW @ self.mix_W
        return mixed_LE

    @property
    def tokens_TLK(self) -> Ids:
        """All workloads' tokens in order."""
        width = max(w.tokens.shape[2] for w in self.workloads)
        padded = [
            np.pad(w.tokens, ((0, 0), (0, 0), (0, width - w.tokens.shape[2])), constant_values=-1)
            for w in self.workloads
        ]
        return np.concatenate(padded)

    @property
    def token_weight_T(self) -> Loads:
        """Weight of each token: its workload's, scaled to mean 1."""
        weight_T = np.concatenate([np.full(len(w.tokens), w.weight) for w in self.workloads])
        weight_T /= weight_T.mean()
        return weight_T

    @property
    def seq_lens_C(self) -> NDArray[np.int64]:
        return np.concatenate([w.lengths for w in self.workloads])


def take_sequences(workload: Workload, chosen_C: NDArray[np.bool_]) -> Workload:
    """The part of a trace made of the chosen sequences."""
    of_token_T = np.repeat(chosen_C, workload.lengths)
    topk_TLK = workload.tokens[of_token_T]
    if not len(topk_TLK):
        raise PlacementError(f"{workload.name}: the chosen sequences hold no tokens")
    return replace(
        workload,
        load_LE=counted(topk_TLK, workload.load_LE.shape[1]),
        topk_TLK=topk_TLK,
        seq_lens_C=workload.lengths[chosen_C],
        domain_C=None if workload.domain_C is None else workload.domain_C[chosen_C],
    )


def split(routing: Routing, held_out: float) -> tuple[Routing, Routing | None]:
    """Every ``1 / held_out``-th sequence of each trace apart; None where nothing can be spared.

    Workloads without tokens, or with fewer than two sequences, stay whole on the first side.
    """
    if not 0 <= held_out < 1:
        raise PlacementError(f"held-out share {held_out} must be at least 0 and below 1")
    fitted: list[Workload] = []
    kept: list[Workload] = []
    for workload in routing.workloads:
        sequences = len(workload.lengths) if workload.topk_TLK is not None else 0
        apart_C = np.floor(np.arange(1, sequences + 1) * held_out) > np.floor(
            np.arange(sequences) * held_out
        )
        if not apart_C.any() or apart_C.all():
            fitted.append(workload)
            continue
        fitted.append(take_sequences(workload, ~apart_C))
        kept.append(take_sequences(workload, apart_C))
    held = Routing(tuple(kept), routing.moe_layers) if kept else None
    return Routing(tuple(fitted), routing.moe_layers), held


def joined(parts: Sequence[Routing]) -> Routing:
    """Several files' workloads as one routing."""
    layers = {part.moe_layers for part in parts}
    if len(layers) > 1:
        raise PlacementError(f"files name different MoE layers: {sorted(layers)[:2]}")
    return Routing(tuple(w for part in parts for w in part.workloads), parts[0].moe_layers)
