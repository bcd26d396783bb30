"""How near paged attention is to this machine's limits: bytes over bandwidth, operations over peak.

    python bench/attention.py [--json] [--threads N] [--quick]

Bandwidth and peak are measured in the same run, by reading a buffer larger than the caches and by
multiplying registers. A decode row is one new token per sequence; a prefill row is one chunk of
512 over its past. Caches of one measurement rotate, so that every step reads memory. The best of
several rounds counts, since others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.ops import AttentionBatch, KvCache, KvShape

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
CONTEXTS = (1024, 4096, 32768)
CHUNK = 512
BLOCK = 16
# Two caches of a row, at least, and as many as it takes to leave a 32 MB cache.
ROTATED = 96 << 20
MOST = 3 << 30


@dataclass(frozen=True, slots=True)
class Heads:
    name: str
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    latent: bool = False


HEADS = (
    Heads("gqa 32/4 x 128", 32, 4, 128, 128),
    Heads("gqa 16/4 x 64", 16, 4, 64, 64),
    Heads("mla 16 x 512+64", 16, 1, 576, 512, latent=True),
    Heads("mla 4 x 512+64", 4, 1, 576, 512, latent=True),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the threads in use: bytes and, by kind of cache, operations per second."""

    bytes_per_s: float
    ops_per_s: dict[torch.dtype, float]


@dataclass(frozen=True, slots=True)
class Result:
    """``ratio`` is time over roofline; ``bound`` says which limit makes the roofline."""

    what: str
    dtype: str
    batch: int
    context: int
    new: int
    us: float
    gb_per_s: float
    gop_per_s: float
    bound: str
    ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=_cpu.threads())
    parser.add_argument("--quick", action="store_true", help="fewer rounds, contexts up to 4096")
    args = parser.parse_args()
    _cpu.set_threads(args.threads)
    torch.manual_seed(0)
    rounds = 5 if args.quick else 15
    limits = measure_limits(args.threads, rounds)
    results = []
    for result in rows(limits, CONTEXTS[: 2 if args.quick else None], rounds):
        results.append(result)
        if not args.json:
            show(result)
    peaks = {name(d): ops for d, ops in limits.ops_per_s.items()}
    head = {"isa": _cpu.isa(), "threads": args.threads, "bytes_per_s": limits.bytes_per_s}
    if args.json:
        print(json.dumps(head | {"ops_per_s": peaks, "results": [asdict(r) for r in results]}))


def rows(limits: Limits, contexts: tuple[int, ...], rounds: int) -> Iterator[Result]:
    for heads in HEADS:
        for dtype in DTYPES:
            for batch in (1, 8):
                for context in contexts:
                    yield measure(heads, dtype, batch, context, 1, limits, rounds)
            yield measure(heads, dtype, 1, CHUNK, CHUNK, limits, rounds)
            yield measure(heads, dtype, 1, 4096, CHUNK, limits, rounds)


def measure(
    heads: Heads,
    dtype: torch.dtype,
    batch: int,
    context: int,
    new: int,
    limits: Limits,
    rounds: int,
) -> Result:
    ops, blocks = CpuOps(), context // BLOCK
    sizes = (heads.kv_heads, heads.head_size, heads.value_size)
    shape = KvShape(batch * blocks, BLOCK, *sizes, dtype, heads.latent)
    nbytes = shape.num_blocks * ops.kv_bytes_per_block(shape)
    count = 1 if new > 1 else max(1, min(-(-ROTATED // nbytes), MOST // nbytes))
    caches = [filled(ops, shape) for _ in range(count)]
    tables = torch.randperm(shape.num_blocks).int().view(batch, blocks)
    starts = torch.arange(batch + 1, dtype=torch.int32) * new
    step = AttentionBatch(starts, torch.full((batch,), context, dtype=torch.int32), tables)
    q = torch.randn(batch * new, heads.heads, heads.head_size)

    def call(i: int) -> None:
        ops.paged_attention(q, caches[i % count], step, scale=heads.head_size**-0.5)

    seconds = best(call, count, rounds)
    pairs = batch * (new * (context - new) + new * (new + 1) // 2)
    work = 2 * pairs * heads.heads * (heads.head_size + heads.value_size)
    by_bytes, by_ops = nbytes / limits.bytes_per_s, work / limits.ops_per_s[dtype]
    return Result(
        heads.name,
        name(dtype),
        batch,
        context,
        new,
        seconds * 1e6,
        nbytes / seconds / 1e9,
        work / seconds / 1e9,
        "bytes" if by_bytes > by_ops else "ops",
        seconds / max(by_bytes, by_ops),
    )


def filled(ops: CpuOps, shape: KvShape) -> KvCache:
    """Two blocks of random numbers, again and again."""
    cache, rows = ops.new_kv(shape), 2 * shape.block_size
    k = torch.randn(rows, shape.kv_heads, shape.head_size)
    v = None if shape.latent else torch.randn(rows, shape.kv_heads, shape.value_size)
    for first in range(0, shape.num_blocks * shape.block_size, rows):
        ops.write_kv(cache, k, v, torch.arange(first, first + rows))
    return cache


def measure_limits(threads: int, rounds: int) -> Limits:
    def fastest(what: str) -> float:
        ways = _cpu.probe_ways(what)
        return max(max(_cpu.probe(what, way, threads, rounds, 0.02, 512 << 20)) for way in ways)

    kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
    return Limits(fastest("read"), {dtype: fastest(what) for dtype, what in kinds.items()})


def best(call: Callable[[int], object], count: int, rounds: int) -> float:
    """Seconds of one call, after one to warm up; ``call`` gets its number."""
    call(0)
    shortest, number = float("inf"), 1
    for _ in range(rounds):
        begin, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < 0.003 or calls < count:
            call(number)
            number, calls = number + 1, calls + 1
        shortest = min(shortest, elapsed / calls)
    return shortest


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(r: Result) -> None:
    print(
        f"{r.what:16} {r.dtype:9} batch {r.batch} context {r.context:6} new {r.new:4}"
        f"{r.us:11.1f} us{r.gb_per_s:8.1f} GB/s{r.gop_per_s:8.0f} GOP/s  {r.ratio:5.2f}x {r.bound}",
        flush=True,
    )


if __name__ == "__main__":
    main()
