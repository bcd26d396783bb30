"""All layers of a step over the ranks, one or more microbatches at a time.

Each microbatch walks through its layers by itself and stops wherever it would wait; the walks take
turns, so that the communication of one hides behind attention and experts of the others
(CloudMatrix-Infer, 4.2.3). All ranks take the same turns, whatever they have to compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from moeserve.comm.dispatcher import Dispatcher, ShardedExperts
from moeserve.kernels.ops import (
    DenseWeights,
    KvCache,
    Layer,
    Ops,
    Part,
    Routed,
    RouterWeights,
    Step,
)
from moeserve.models.layer_runner import GroupRows, rows_by_layer
from moeserve.observe.progress import Progress


class ParallelLayerRunner:
    """A ``models.layer_runner.LayerRunner`` that owns where experts lie.

    ``sharded`` is by layer, None where nothing is routed, and may be changed between steps, on all
    ranks between the same two.
    """

    def __init__(
        self,
        ops: Ops,
        layers: Sequence[Layer],
        sharded: Sequence[ShardedExperts | None],
        dispatcher: Dispatcher,
        progress: Progress,
    ) -> None:
        self.sharded = list(sharded)
        self.dispatcher = dispatcher
        self._progress = progress
        self._ops = ops
        self._halves = tuple((x.attention, without_experts(x)) for x in layers)

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
        group: GroupRows | None = None,
    ) -> None:
        """As ``LayerRunner.run``; ids_TC are appended also where a microbatch has no rows."""
        walks = deque(
            self._walk(
                lane,
                rows_by_layer(len(caches), x_TH, steps[lane], None if lane else group),
                caches,
                None if routed is None else routed[lane],
            )
            for lane, x_TH in enumerate(hidden)
        )
        while walks:
            walk = walks.popleft()
            if next(walk, False):
                walks.append(walk)
        self._progress.rest()

    def _walk(
        self,
        lane: int,
        rows_L: Sequence[tuple[Tensor, Step | None]],
        caches: Sequence[KvCache],
        routed: list[Tensor] | None,
    ) -> Generator[bool, None, None]:
        ops, progress = self._ops, self._progress
        for l, ((attention, half), sharded, cache, (x_TH, step)) in enumerate(
            zip(self._halves, self.sharded, caches, rows_L, strict=True)
        ):
            progress.at(l, lane)
            progress.begin("attention")
            if step is not None:
                ops.attend(x_TH, attention, step, cache)
            if isinstance(half.weights, DenseWeights):
                if step is not None:
                    ops.dense(x_TH, half)
                continue
            assert sharded is not None, l
            router = half
            chosen = route_no_rows(x_TH, router) if step is None else ops.route(x_TH, router, step)
            if routed is not None:
                routed.append(chosen.ids_TC.clone())
            for _ in self.dispatcher.moe(lane, sharded, x_TH, chosen):
                progress.pause()
                yield True
                progress.at(l, lane)
        progress.pause()


def without_experts(layer: Layer) -> Part[DenseWeights] | Part[RouterWeights]:
    """The half after attention without experts, which only ``sharded`` holds: they may go."""
    return layer.mlp if isinstance(layer.mlp, Part) else layer.mlp[0]


def route_no_rows(x_TH: Tensor, router: Part[RouterWeights]) -> Routed:
    """What ``Ops.route`` gives for no rows."""
    top_k = router.weights.spec.top_k
    return Routed(x_TH, x_TH.new_empty(0, top_k, dtype=torch.int32), x_TH.new_empty(0, top_k))
