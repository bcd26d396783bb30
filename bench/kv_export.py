"""How fast KV blocks leave and enter a cache as bytes, beside copying as many bytes.

    python bench/kv_export.py [--json] [--blocks N] [--quick]

One thread each, as beside steps that run, by the processor time of that thread: others may use the
machine. Blocks lie in random places of a cache that is larger than the processor's; so do those of
the copy. Rounds take turns, and the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.ops import KvCache, KvShape, Ops
from moeserve.kernels.select import choose_ops

BLOCK = 16
CACHE_BYTES = 192 << 20
HEADS = {
    "gqa 4 x 128": (4, 128, 128, False),
    "gqa 4 x 64": (4, 64, 64, False),
    "mla 512+64": (1, 576, 512, True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True, slots=True)
class Row:
    """GB/s, where a byte that is read and written counts once."""

    what: str
    dtype: str
    block_bytes: int
    leaves: float
    enters: float
    memcpy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=64, help="in one call")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops, rows = choose_ops(), []
    for name, (heads, size, value_size, latent) in HEADS.items():
        for dtype in DTYPES:
            shape = KvShape(1, BLOCK, heads, size, value_size, dtype, latent)
            rows.append(measure(ops, name, shape, args.blocks, 5 if args.quick else 25))
            if not args.json:
                show(rows[-1])
    if args.json:
        print(json.dumps({"ops": ops.name, "blocks": args.blocks, "rows": [*map(asdict, rows)]}))


def measure(ops: Ops, what: str, one: KvShape, blocks: int, rounds: int) -> Row:
    layout = KvBlockLayout.of(one)
    count = max(2 * blocks, CACHE_BYTES // ops.kv_bytes_per_block(one))
    shape = KvShape(
        count, BLOCK, one.kv_heads, one.head_size, one.value_size, one.dtype, one.latent
    )
    cache = filled(ops, shape)
    plain = torch.zeros(count, layout.nbytes, dtype=torch.uint8)
    data = torch.zeros(blocks, layout.nbytes, dtype=torch.uint8)
    places = [order.clone() for order in torch.randperm(count).split(blocks)]
    if len(places[-1]) < blocks:
        places.pop()

    def copy(place: Tensor) -> None:
        torch.index_select(plain, 0, place, out=data)

    calls: dict[str, Callable[[Tensor], object]] = {
        "leaves": lambda place: ops.export_kv(cache, place, data),
        "enters": lambda place: ops.import_kv(cache, place, data),
        "memcpy": copy,
    }
    best = dict.fromkeys(calls, 0.0)
    for i in range(rounds):
        for name, call in calls.items():
            rate = rate_of(call, places, i, data.nbytes)
            best[name] = max(best[name], rate)
    return Row(what, str(one.dtype).removeprefix("torch."), layout.nbytes, **best)


def rate_of(
    call: Callable[[Tensor], object], places: list[Tensor], first: int, nbytes: int
) -> float:
    """GB/s of some calls, each with other places."""
    begun, calls = time.thread_time(), 0
    while (elapsed := time.thread_time() - begun) < 0.01:
        call(places[(first * 31 + calls) % len(places)])
        calls += 1
    return calls * nbytes / elapsed / 1e9


def filled(ops: Ops, shape: KvShape) -> KvCache:
    """Two blocks of random numbers, again and again."""
    cache, rows = ops.new_kv(shape), 2 * shape.block_size
    k = torch.randn(rows, shape.kv_heads, shape.head_size)
    v = None if shape.latent else torch.randn(rows, shape.kv_heads, shape.value_size)
    for first in range(0, shape.num_blocks // 2 * rows, rows):
        ops.write_kv(cache, k, v, torch.arange(first, first + rows))
    return cache


def show(r: Row) -> None:
    print(
        f"{r.what:12} {r.dtype:9}{r.block_bytes:8} B a block: out {r.leaves:6.2f} GB/s, "
        f"in {r.enters:6.2f} GB/s, memcpy {r.memcpy:6.2f} GB/s "
        f"({r.leaves / r.memcpy:4.0%} and {r.enters / r.memcpy:4.0%})",
        flush=True,
    )


if __name__ == "__main__":
    main()
