"""The KV of a runner as bytes: blocks of one layer go out and come in (``kernels.kv_layout``), and
runs of many layers at once (``kernels.kv_runs``).

Any thread may call, while steps run: the copies release the interpreter's lock, and a call that
finds the kernels' threads at work does all by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.core import BlockId
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.step_progress import StepProgress
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.ops import KvCache, KvRuns, Ops
from moeserve.models.decoder import ModelKvCache


@dataclass(frozen=True, slots=True)
class KvTensors:
    """A runner's KV, one cache per layer, the table that reads and writes it, and how far the
    runner's step is."""

    ops: Ops
    caches: tuple[KvCache, ...]
    progress: StepProgress

    @property
    def layouts(self) -> tuple[KvBlockLayout, ...]:
        return tuple(KvBlockLayout.of(cache.shape) for cache in self.caches)

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        cache = self.caches[layer]
        self.ops.export_kv(cache, torch.tensor(blocks, dtype=torch.int64), out_NX)

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        cache = self.caches[layer]
        self.ops.import_kv(cache, torch.tensor(blocks, dtype=torch.int64), data_NX)

    def export_runs(self, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
        return self.ops.export_runs(
            self.caches, torch.tensor(blocks, dtype=torch.int64), runs, out_X
        )

    def import_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
    ) -> Tensor:
        table = torch.tensor(blocks, dtype=torch.int64)
        return self.ops.import_runs(self.caches, table, runs, digests_RD, data_X)


def watch_kv(runner: ModelRunner[ModelKvCache], ops: Ops) -> KvTensors:
    """The KV of a runner of decoder layers that has run no step yet."""
    caches = runner.cache.layers
    runner.watcher = progress = StepProgress(ops, caches)
    return KvTensors(ops, caches, progress)
