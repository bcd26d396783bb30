"""What runs the layers of a step, and the way to do it in one process.

Others run them over several ranks (``comm.pipeline``), or from weights that are not all in memory.
Whatever runs them, each row's result is the same bits (law 1). Letters as in ``kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from moeserve.kernels.ops import KvCache, Ops, Stack, Step


@dataclass(frozen=True, slots=True)
class GroupRows:
    """In layers ``start .. stop - 1`` the first microbatch has more rows than elsewhere, behind the
    others: there ``step`` is of all of them."""

    start: int
    stop: int
    step: Step


def rows_by_layer(
    layers: int, x_TH: Tensor, step: Step | None, group: GroupRows | None
) -> Sequence[tuple[Tensor, Step | None]]:
    """What a microbatch has in each layer: its rows, and their step."""
    if group is None:
        return ((x_TH, step),) * layers
    elsewhere = x_TH[: 0 if step is None else step.rows], step
    of_group = x_TH, group.step
    return [of_group if group.start <= l < group.stop else elsewhere for l in range(layers)]


class LayerRunner(Protocol):
    """Owns the layers' weights, or knows who does."""

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
        group: GroupRows | None = None,
    ) -> None:
        """Add every layer, each with its cache, to the residual stream x_TH in ``hidden[m]`` of
        each microbatch m; its step is None where it has no rows. With ``group`` that is said of the
        first rows of ``hidden[0]``, as many as ``steps[0]`` has; all of them run in the group.

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
        group: GroupRows | None = None,
    ) -> None:
        for m, (x_TH, step) in enumerate(zip(hidden, steps, strict=True)):
            ids = None if routed is None else routed[m]
            if group is not None and m == 0:
                self._run_group(x_TH, step, caches, ids, group)
            elif step is not None:
                self.ops.forward_layers(x_TH, self.stack, step, caches, ids)

    def _run_group(
        self,
        x_TH: Tensor,
        step: Step | None,
        caches: Sequence[KvCache],
        routed: list[Tensor] | None,
        group: GroupRows,
    ) -> None:
        """The layers before the group, of it, and behind it."""
        borders = (0, group.start, group.stop, len(caches))
        for start, stop in pairwise(borders):
            rows = group.step if start == group.start and stop == group.stop else step
            if rows is None or start == stop:
                continue
            part = self.ops.stack_layers(self.stack.layers[start:stop])
            self.ops.forward_layers(x_TH[: rows.rows], part, rows, caches[start:stop], routed)
