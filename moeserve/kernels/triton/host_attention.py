"""The op table of a CUDA device whose attention runs on the host: KV lies in host memory, of which
there is more, and the host's table writes it and attends over it.

What surrounds attention (norms, projections, rotation) and all else is the device's; queries, keys
and values of a step go to the host for each layer, and what was attended to comes back. Experts and
their weights so have the device's memory to themselves (MoE-Lens). Steps are not captured: the host
takes part in each layer. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.fused import attend as composed_attend
from moeserve.kernels.host_kv import (
    HostKv,
    attend_on_host,
    host_cache,
    hosted,
    write_on_host,
)
from moeserve.kernels.ops import (
    AttentionBatch,
    GqaWeights,
    KvCache,
    KvRuns,
    KvShape,
    MlaWeights,
    Ops,
    Part,
    Rope,
    Step,
)
from moeserve.kernels.triton.ops import TritonOps


class HostAttentionOps(TritonOps):
    """``host`` is the table of this host's CPU."""

    name = "triton, attention by the host"
    fallbacks = ("attention: on the host, as was asked for; KV lies in its memory",)

    def __init__(self, device: torch.device, host: Ops) -> None:
        super().__init__(device)
        self.host = host
        self.replays, self._capture = False, None

    def new_kv(self, shape: KvShape) -> KvCache:
        return host_cache(self.host, shape)

    def kv_in_host(self, shape: KvShape) -> bool:
        return True

    def kv_bytes_per_block(self, shape: KvShape) -> int:
        return self.host.kv_bytes_per_block(shape)

    def write_kv(self, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor) -> None:
        write_on_host(self.host, there(cache), k_TGD, v_TGV, slot_T)

    def paged_attention(
        self,
        q_TAD: Tensor,
        cache: KvCache,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        own = there(cache)
        return attend_on_host(
            self.host, q_TAD, own, batch, scale=scale, window=window, sinks_A=sinks_A
        )

    def new_step(
        self, rope: Rope, position_T: Tensor, slot_T: Tensor, attention: AttentionBatch
    ) -> Step:
        """Its slots and blocks stay on the host, where they are used."""
        nothing = torch.zeros(1, dtype=torch.int32)
        none = AttentionBatch(nothing, nothing[:0], attention.blocks_SM[:0])
        step = super().new_step(rope, position_T, slot_T, none)
        return replace(step, slot_T=slot_T, attention=attention)

    def attend(
        self, x_TH: Tensor, part: Part[GqaWeights | MlaWeights], step: Step, cache: KvCache
    ) -> None:
        slots = cache.shape.num_blocks * cache.shape.block_size
        if step.data.least_slot < 0 or step.data.most_slot >= slots:
            raise InternalError(f"attend: slots of {step.attention} do not fit {cache.shape}")
        composed_attend(self, x_TH, part.weights, step, cache)
        cache.data.passes += 1

    def export_kv(self, cache: KvCache, blocks_N: Tensor, out_NX: Tensor | None = None) -> Tensor:
        return self.host.export_kv(there(cache), blocks_N, out_NX)

    def import_kv(self, cache: KvCache, blocks_N: Tensor, data_NX: Tensor) -> None:
        self.host.import_kv(there(cache), blocks_N, data_NX)

    def export_runs(
        self, caches: Sequence[KvCache], blocks_B: Tensor, runs: KvRuns, out_X: Tensor
    ) -> Tensor:
        return self.host.export_runs([there(c) for c in caches], blocks_B, runs, out_X)

    def import_runs(
        self,
        caches: Sequence[KvCache],
        blocks_B: Tensor,
        runs: KvRuns,
        digests_RD: Tensor,
        data_X: Tensor,
    ) -> Tensor:
        own = [there(c) for c in caches]
        return self.host.import_runs(own, blocks_B, runs, digests_RD, data_X)

    def kv_passes(self, cache: KvCache) -> int:
        data: HostKv = cache.data
        return data.passes


def there(cache: KvCache) -> KvCache:
    """The host's; this table makes no other."""
    found = hosted(cache)
    assert found is not None, cache.shape
    return found
