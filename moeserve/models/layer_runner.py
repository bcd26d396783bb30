"""What runs the layers of a step, and the way to do it in one process.

Others run them over several ranks (``comm.pipeline``), or from weights that are not all in memory.
Whatever runs them, each row's result is the same bits (law 1). Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeserve.kernels.ops import KvCache, Ops, Stack, Step


class LayerRunner(Protocol):
    """Owns the layers' weights, or knows who does."""

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
    ) -> None:
        """Add every layer, each with its cache, to the residual stream x_TH in ``hidden[m]`` of
        each microbatch m; its step is None where it has no rows.

        The tokens of a sequence stand in microbatches in their order. ids_TC of each layer that
        routes are appended to ``routed[m]``, in order of layers; where a microbatch has no rows
        they may be left out.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalLayerRunner:
    """All layers are in this process; microbatches run one after the other."""

    ops: Ops
    stack: Stack

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
    ) -> None:
        for m, (x_TH, step) in enumerate(zip(hidden, steps, strict=True)):
            if step is not None:
                ids = None if routed is None else routed[m]
                self.ops.forward_layers(x_TH, self.stack, step, caches, ids)
