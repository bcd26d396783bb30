"""KV of an accelerator's table that lies in host memory, in a cache of the host's table, which
writes it and attends over it: what a step has of it goes to the host, and the result comes back.

Letters: see ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape, Ops


@dataclass(slots=True)
class HostKv:
    """A cache of the host's table; ``passes`` of attention were done over it."""

    cache: KvCache
    passes: int = 0


def host_cache(host: Ops, shape: KvShape) -> KvCache:
    cache = host.new_kv(shape)
    return KvCache(shape, cache.nbytes, HostKv(cache))


def hosted(cache: KvCache) -> KvCache | None:
    """The host's cache; None where it lies on the device."""
    return cache.data.cache if isinstance(cache.data, HostKv) else None


def write_on_host(
    host: Ops, cache: KvCache, k_TGD: Tensor, v_TGV: Tensor | None, slot_T: Tensor
) -> None:
    """``Ops.write_kv`` of a step on a device; ``cache`` is the host's."""
    value = None if v_TGV is None else v_TGV.cpu()
    host.write_kv(cache, k_TGD.cpu(), value, slot_T.cpu())


def attend_on_host(
    host: Ops,
    q_TAD: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    sinks_A: Tensor | None,
) -> Tensor:
    """``Ops.paged_attention`` of a step on a device, where the result is too; ``cache`` and
    ``batch`` are the host's."""
    sinks = None if sinks_A is None else sinks_A.cpu()
    out_TAV = host.paged_attention(
        q_TAD.cpu(), cache, batch, scale=scale, window=window, sinks_A=sinks
    )
    return out_TAV.to(q_TAD.device)
