"""How fast the native kernels are here: GFLOP/s and GB/s of weights, beside torch.

    python bench/kernels.py [--json] [--threads N]

The best of several rounds counts, since others may use the machine. Weights of one measurement
are larger than the caches, so that few tokens measure memory and many measure arithmetic.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moeserve.kernels import _cpu
from moeserve.kernels.cpu import CpuOps

TOKENS = (1, 16, 256)
HIDDEN, WIDE = 2048, 16384
EXPERTS, INNER, CHOSEN = 32, 512, 4
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """``gb_per_s`` counts every weight that a call needs once."""

    what: str
    tokens: int
    us: float
    gflop_per_s: float
    gb_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=_cpu.threads())
    args = parser.parse_args()
    _cpu.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [*linears(), *moes()]
    if args.json:
        head = {"isa": _cpu.isa(), "threads": args.threads}
        print(json.dumps(head | {"results": [asdict(r) for r in results]}))
        return
    print(f"{_cpu.isa()}, {args.threads} threads")
    print(f"{'':24}{'tokens':>8}{'us':>12}{'GFLOP/s':>12}{'GB/s':>10}")
    for r in results:
        print(f"{r.what:24}{r.tokens:8}{r.us:12.1f}{r.gflop_per_s:12.1f}{r.gb_per_s:10.1f}")


def linears() -> Iterator[Result]:
    ops, weight = CpuOps(), torch.randn(WIDE, HIDDEN) / HIDDEN**0.5
    packed = {dtype: ops.pack_linear(weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    for tokens in TOKENS:
        x, flops = torch.randn(tokens, HIDDEN), 2 * tokens * weight.numel()
        for dtype, matrix in packed.items():
            seconds = best(lambda x=x, matrix=matrix: ops.linear(x, matrix))  # type: ignore[misc]
            name = f"linear {str(dtype).removeprefix('torch.')}"
            yield result(name, tokens, seconds, flops, weight.numel() * dtype.itemsize)
        seconds = best(lambda x=x: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        yield result("torch linear float32", tokens, seconds, flops, weight.numel() * 4)


def moes() -> Iterator[Result]:
    ops = CpuOps()
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5
    for dtype in (torch.float32, torch.bfloat16):
        experts = ops.pack_experts(gate_up.to(dtype), down.to(dtype))
        for tokens in TOKENS:
            x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, CHOSEN)
            ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)]).int()
            seconds = best(lambda: ops.moe_ffn(x, experts, ids, weights))  # noqa: B023
            size = 3 * HIDDEN * INNER
            name = f"moe_ffn {str(dtype).removeprefix('torch.')}"
            loaded = int(ids.flatten().bincount().count_nonzero()) * size * dtype.itemsize
            yield result(name, tokens, seconds, 2 * tokens * CHOSEN * size, loaded)


def result(what: str, tokens: int, seconds: float, flops: int, loaded: int) -> Result:
    return Result(what, tokens, seconds * 1e6, flops / seconds / 1e9, loaded / seconds / 1e9)


def best(call: Callable[[], object]) -> float:
    """Seconds of one call, after one to warm up."""
    call()
    shortest = float("inf")
    for _ in range(ROUNDS):
        begin, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < 0.05 or not calls:
            call()
            calls += 1
        shortest = min(shortest, elapsed / calls)
    return shortest


if __name__ == "__main__":
    main()
