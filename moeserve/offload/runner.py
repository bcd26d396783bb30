"""Layers run over experts that are read from disk as they are needed.

Layer by layer, all microbatches: attention from the trunk, routing, then the chosen experts, while
those that the next layer will likely choose are read ahead (``foresight``). Many rows whose experts
nobody foresaw are computed in waves as records come (``experts``); few rows, which are done sooner
than a wave begins, and those that were foreseen wait for all of them; so do all rows on a device,
which computes far faster than experts reach it. The results are the bits of a model that is all in
memory. Of a device's results the host looks at the ids of the chosen experts alone.
Letters: see ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.errors import ConfigError
from moeserve.kernels.host_copy import to_host
from moeserve.kernels.ops import (
    KvCache,
    Layer,
    MoeWeights,
    Ops,
    Part,
    Routed,
    RouterWeights,
    Step,
)
from moeserve.kernels.wire import Combine
from moeserve.models.layer_runner import GroupRows, rows_by_layer
from moeserve.offload.experts import ExpertStream, Ids
from moeserve.offload.foresight import PredictionGate
from moeserve.offload.model.distinct import uses_nearly_all
from moeserve.offload.rank_experts import RankExperts
from moeserve.offload.waves import PartedMixture
from moeserve.offload.window import TrunkWindow

# Choices of a layer's tokens from which on waves gain more than they cost.
PARTS_FROM = 256
Moe = tuple[Part[RouterWeights], Part[MoeWeights]]


class StreamedLayerRunner:
    """A ``models.layer_runner.LayerRunner``. The experts of every layer are the slots of
    ``stream.arena``; without ``window`` all trunks are in memory. ``first`` is what the stream
    calls the first of ``layers``: a step begins with layer 0, what runs others goes on with it."""

    def __init__(
        self,
        ops: Ops,
        layers: Sequence[Layer],
        stream: ExpertStream,
        gate: PredictionGate,
        window: TrunkWindow | None = None,
        on_close: Callable[[], None] = lambda: None,
        *,
        first: int = 0,
    ) -> None:
        self._layers = dict(enumerate(layers, first))
        routing = [l for l, layer in self._layers.items() if isinstance(layer.mlp, tuple)]
        for layer in layers:
            if isinstance(layer.mlp, tuple) and layer.mlp[1].weights.combine is Combine.FAST:
                raise ConfigError(
                    "combine='fast' adds in the order in which experts come from disk: with "
                    "--memory take 'exact', which is the default, or 'ordered'"
                )
        self.stream, self.gate, self.window = stream, gate, window
        self._ops, self._on_close = ops, on_close
        self._next = dict(pairwise(routing))
        self._predicted: int | None = None  # the layer whose experts were
        self._foreseen: int | None = None  # the layer all of whose experts are read ahead

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
        group: GroupRows | None = None,
    ) -> None:
        ops, window = self._ops, self.window
        rows_ML = [
            rows_by_layer(len(caches), x_TH, step, None if m else group)
            for m, (x_TH, step) in enumerate(zip(hidden, steps, strict=True))
        ]
        if group is None and all(step is None for step in steps):
            return
        if 0 in self._layers:
            self.stream.begin_step()
        self.gate.begin_step()
        for i, ((l, layer), cache) in enumerate(zip(self._layers.items(), caches, strict=True)):
            rows = [
                (rows_L[i][0], step, None if routed is None else routed[m])
                for m, rows_L in enumerate(rows_ML)
                if (step := rows_L[i][1]) is not None
            ]
            if not rows:
                continue
            if window is not None:
                window.need(l)
            for x_TH, step, _ in rows:
                ops.attend(x_TH, layer.attention, step, cache)
            if isinstance(layer.mlp, Part):
                for x_TH, _, _ in rows:
                    ops.dense(x_TH, layer.mlp)
            else:
                self._mix(l, layer.mlp, rows)
            if window is not None:
                window.done(l)

    def of_rank(self) -> dict[int, RankExperts]:
        """The experts of each layer that routes, for a rank of several, which runs the layers
        itself. All trunks must be in memory."""
        assert self.window is None, self.window
        layers = self._layers.items()
        first = min((l for l, x in layers if isinstance(x.mlp, tuple)), default=0)
        made = {}
        for l, layer in layers:
            if isinstance(layer.mlp, tuple):
                router, part = layer.mlp
                wire = self._ops.wire(part, router.weights.spec.top_k)
                following = self._next.get(l)
                made[l] = RankExperts(self._ops, part, wire, self.stream, l, following, l == first)
        return made

    def close(self) -> None:
        """Ends what is being read, and closes the files. After the last step."""
        self.stream.mover.close()
        self._on_close()

    def _mix(
        self, l: int, mlp: Moe, rows: Sequence[tuple[Tensor, Step, list[Tensor] | None]]
    ) -> None:
        router, part = mlp
        predicted, whole = self._predicted == l, self._foreseen == l
        foreseen = self._foresee(l, rows)  # before routing: a step has one result of it at a time
        chosen = [self._ops.route(x_TH, router, step) for x_TH, step, _ in rows]
        for (_, _, seen), of in zip(rows, chosen, strict=True):
            if seen is not None:
                seen.append(of.ids_TC.clone())
        ids_TC = [to_host(of.ids_TC) for of in chosen]
        needed = np.unique(np.concatenate([ids.ravel() for ids in ids_TC])).astype(np.int64)
        few = sum(ids.size for ids in ids_TC) < PARTS_FROM or self._ops.device.type != "cpu"
        before = replace(self.stream.counts)
        mixtures: list[PartedMixture] = []
        with closing(self.stream.waves(l, needed, together=few or whole)) as waves:
            for n, wave in enumerate(waves):
                if n == 0 and foreseen is not None:
                    self.stream.read_ahead(self._next[l], foreseen, l)
                if not len(wave):
                    continue
                slot_E = self._slots_of(l, wave)
                if len(wave) == len(needed):
                    self._mix_at_once(part, rows, chosen, [slot_E[ids] for ids in ids_TC])
                    continue
                if not mixtures:
                    mixtures = [
                        PartedMixture(self._ops, part, x_TH, of)
                        for (x_TH, _, _), of in zip(rows, chosen, strict=True)
                    ]
                for mixture, ids in zip(mixtures, ids_TC, strict=True):
                    mixture.add(slot_E[ids])
        for mixture, (x_TH, _, _) in zip(mixtures, rows, strict=False):
            mixture.finish(x_TH)
        after = self.stream.counts
        used = after.ahead_used - before.ahead_used
        self.gate.miss(after.misses - before.misses + used)
        if predicted:
            self.gate.count(used, after.ahead_wasted - before.ahead_wasted)

    def _mix_at_once(
        self,
        part: Part[MoeWeights],
        rows: Sequence[tuple[Tensor, Step, list[Tensor] | None]],
        chosen: Sequence[Routed],
        slots: Sequence[NDArray[np.int32]],
    ) -> None:
        """``slots`` has those of each batch's choices."""
        for (x_TH, _, _), of, slots_TC in zip(rows, chosen, slots, strict=True):
            there_TC = torch.from_numpy(slots_TC).to(of.ids_TC.device)
            self._ops.moe(x_TH, part, replace(of, ids_TC=there_TC))

    def _slots_of(self, layer: int, wave: Ids) -> NDArray[np.int32]:
        """The slot of each expert of the wave, -1 of all others."""
        of_layer_E = self.stream.residency.slot_LE[layer]
        slot_E = np.full(len(of_layer_E), -1, np.int32)
        slot_E[wave] = of_layer_E[wave]
        return slot_E

    def _foresee(
        self, l: int, rows: Sequence[tuple[Tensor, Step, list[Tensor] | None]]
    ) -> Ids | None:
        """What the next layer that routes will need, as far as that can be told."""
        self._predicted, following = None, self._next.get(l)
        self._foreseen = None
        if following is None:
            return None
        mlp = self._layers[following].mlp
        assert isinstance(mlp, tuple), following
        spec = mlp[0].weights.spec
        if uses_nearly_all(sum(step.rows for _, step, _ in rows), spec.top_k, spec.num_experts):
            self._foreseen = following
            return np.arange(spec.num_experts)
        if not self.gate.open or not (self.window is None or self.window.has(following)):
            return None
        self._predicted = following
        ids = [to_host(self._ops.route(x_TH, mlp[0], step).ids_TC) for x_TH, step, _ in rows]
        return np.unique(np.concatenate([i.ravel() for i in ids])).astype(np.int64)
