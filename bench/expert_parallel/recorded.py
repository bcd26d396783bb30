"""Recorded routing as what ranks replay: sequences with the experts of every token and layer.

A trace has them; half of its sequences fit plans, the other half is replayed. Of counts, tokens are
drawn: every second table fits, the mixture of the others is replayed (of a single one, itself), and
an expert is chosen as often as it was counted, independently of the others of its token. So there
is nothing to group in them.

Letters as in ``placement``; C windows of W tokens each.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import ConfigError, PlacementError
from moeserve.placement.formats import routing_files
from moeserve.placement.routing import Routing, split, workload_of_tokens

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

# Tokens drawn from counts for the solvers that need some.
DRAWN_TO_FIT = 2048
# So many drawn tokens have their experts in one random order.
_ORDERED_ALIKE = 8


@dataclass(frozen=True, slots=True)
class ReplaySource:
    """Files of one model; ``top_k`` is needed where they hold counts. The model that replays them
    has these sizes: hidden state, expert's intermediate."""

    name: str
    files: Sequence[str]
    top_k: int | None
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """``fitted`` is for solvers, with tokens in ``fitted_tokens`` (the same where it has some).
    ``ids_CWLK`` is what is replayed, of tokens that no solver has seen where ``held_out``."""

    source: ReplaySource
    fitted: Routing
    fitted_tokens: Routing
    ids_CWLK: I32
    held_out: bool

    @property
    def num_experts(self) -> int:
        return self.fitted.num_experts

    @property
    def top_k(self) -> int:
        return int(self.ids_CWLK.shape[3])

    @property
    def drawn(self) -> bool:
        return not self.fitted.has_tokens


def parse_source(text: str, hidden: int, intermediate: int) -> ReplaySource:
    """``PATTERN[,PATTERN ...][:k=N][:hidden=N][:intermediate=N]``; named after the folder."""
    patterns, *settings = text.split(":")
    found: dict[str, int] = {"hidden": hidden, "intermediate": intermediate}
    for setting in settings:
        key, _, number = setting.partition("=")
        if key not in ("k", "hidden", "intermediate") or not number.isdigit() or not int(number):
            raise ConfigError(
                f"--replay {text}: {setting!r} is none of k=N, hidden=N, intermediate=N"
            )
        found[key] = int(number)
    files = sorted(f for pattern in patterns.split(",") for f in glob.glob(pattern))
    if not files:
        raise ConfigError(f"--replay {text}: no such file")
    name = Path(files[0]).resolve().parent.name
    return ReplaySource(name, files, found.get("k"), found["hidden"], found["intermediate"])


def record(source: ReplaySource, windows: int, length: int, seed: int = 1) -> Recording:
    """``windows`` of ``length`` tokens; PlacementError where the files do not hold enough."""
    routing = _from_zero(routing_files.read_all(source.files))
    if routing.has_tokens:
        return _of_trace(source, routing, windows, length)
    if source.top_k is None:
        raise ConfigError(f"{source.files[0]} holds counts: say how many experts a token has, :k=N")
    draw = np.random.default_rng(seed)
    loads, layers = routing.workloads, routing.moe_layers
    fitted = Routing(loads[::2], layers)
    unseen = Routing(loads[1::2] or loads, layers)
    tokens_TLK = _drawn(fitted.mixed_LE, source.top_k, DRAWN_TO_FIT, draw)
    lens = np.full(1, len(tokens_TLK), np.int64)
    work = workload_of_tokens("drawn", tokens_TLK, lens, num_experts=routing.num_experts)
    ids_TLK = _drawn(unseen.mixed_LE, source.top_k, windows * length, draw)
    return Recording(
        source,
        fitted,
        Routing((work,), layers),
        ids_TLK.reshape(windows, length, *ids_TLK.shape[1:]),
        len(loads) > 1,
    )


def _from_zero(routing: Routing) -> Routing:
    """The layers that route are all that the replaying model has."""
    return replace(routing, moe_layers=tuple(range(routing.num_layers)))


def _of_trace(source: ReplaySource, routing: Routing, windows: int, length: int) -> Recording:
    fitted, kept = split(routing, 0.5)
    if kept is None:
        raise PlacementError(f"{source.files}: one sequence cannot both fit plans and be replayed")
    if (kept.tokens_TLK < 0).any():
        raise PlacementError(f"{source.files}: a token without choices cannot be replayed")
    starts, at = [], 0
    for n in kept.seq_lens_C.tolist():
        starts += range(at, at + n - length + 1, length)
        at += n
    if len(starts) < windows:
        raise PlacementError(
            f"{source.files}: {len(starts)} windows of {length} tokens to replay; {windows} are "
            "needed: take fewer tokens of a rank, or shorter windows"
        )
    chosen_C = np.array(starts)[np.arange(windows) * len(starts) // windows]
    ids_CWLK = kept.tokens_TLK[chosen_C[:, None] + np.arange(length)]
    return Recording(source, fitted, fitted, ids_CWLK, True)


def _drawn(load_LE: F64, top_k: int, tokens: int, draw: np.random.Generator) -> I32:
    """[T, L, K]: expert e as often as its share of the load says, by systematic sampling over
    experts in random orders; no expert twice in a token."""
    layers, experts = load_LE.shape
    ids_TLK = np.empty((tokens, layers, top_k), np.int32)
    points_K = np.arange(top_k)
    for l, load_E in enumerate(load_LE):
        chance_E = _chances(load_E, top_k)
        for first in range(0, tokens, _ORDERED_ALIKE):
            order_E = draw.permutation(experts)
            ends_E = np.cumsum(chance_E[order_E])
            count = min(_ORDERED_ALIKE, tokens - first)
            at_TK = draw.random((count, 1)) + points_K
            place_TK = np.searchsorted(ends_E, at_TK, side="right").clip(max=experts - 1)
            ids_TLK[first : first + count, l] = order_E[place_TK]
    return ids_TLK


def _chances(load_E: F64, top_k: int) -> F64:
    """[E] that add up to ``top_k``, as the loads but for those that would be above 1."""
    chance_E = load_E / load_E.sum() * top_k
    while (chance_E > 1).any():
        certain_E = chance_E >= 1
        left = top_k - int(certain_E.sum())
        rest_E = np.where(certain_E, 0.0, load_E)
        chance_E = np.where(certain_E, 1.0, rest_E / rest_E.sum() * left)
    return chance_E
