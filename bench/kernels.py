"""How fast the products of the native kernels are here, as time over the machine's roofline.

    python bench/kernels.py [--json] [--threads 1 2] [--kinds int8 bf16] [--tokens 1 16] [--quick]

The roofline of a call is, summed over the experts (or the one matrix) it needs, the greater of
weight bytes over read bandwidth and operations over the peak of the kind. Bandwidth and peak are
probed in the same run, before every measurement and after it. ``best`` is the shortest call,
``median`` the middle one; both have their ratio. Every call takes other experts, so that few
tokens measure memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.matrix import Int8Matrix, Matrix, to_int4
from moeserve.kernels.ops import Experts, Linear
from moeserve.kernels.probe import Machine, probe_machine

KINDS = ("int8", "int4", "bf16", "fp32")
BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 128, "bf16": 2.0, "fp32": 4.0}
DRAWS = 8  # choices of experts that calls take in turn


@dataclass(frozen=True, slots=True)
class Layer:
    """Routed experts of one layer."""

    name: str
    experts: int
    chosen: int
    hidden: int
    inner: int


LAYERS = (
    Layer("moe 128x8 2048x768", 128, 8, 2048, 768),
    Layer("moe 32x4 1024x512", 32, 4, 1024, 512),
)
LINEARS = ((1536, 1024), (1024, 1024), (32000, 1024))


@dataclass(frozen=True, slots=True)
class Row:
    """Times in microseconds."""

    what: str
    kind: str
    tokens: int
    threads: int
    best: float
    median: float
    roofline: float
    best_ratio: float
    median_ratio: float
    read_gb_per_s: float
    peak_gop_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, _cpu.threads()}))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:3])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 256, 512])
    parser.add_argument("--quick", action="store_true", help="the first layer only, shorter")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    seconds = 0.3 if args.quick else 1.0
    layers, linears = (LAYERS[:1], ()) if args.quick else (LAYERS, LINEARS)
    if not args.json:
        print(f"{_cpu.isa()}")
        print(f"{'':22}{'kind':>6}{'threads':>8}{'tokens':>7}{'best us':>11}{'median us':>11}"
              f"{'roofline':>11}{'best/':>7}{'median/':>8}{'GB/s':>7}{'GOP/s':>7}")  # fmt: skip
    rows = []
    for row in measure(layers, linears, args.kinds, args.threads, args.tokens, seconds):
        rows.append(row)
        if not args.json:
            print(f"{row.what:22}{row.kind:>6}{row.threads:8}{row.tokens:7}{row.best:11.1f}"
                  f"{row.median:11.1f}{row.roofline:11.1f}{row.best_ratio:7.2f}"
                  f"{row.median_ratio:8.2f}{row.read_gb_per_s:7.1f}{row.peak_gop_per_s:7.0f}",
                  flush=True)  # fmt: skip
    if args.json:
        print(json.dumps({"isa": _cpu.isa(), "rows": [asdict(row) for row in rows]}))


def measure(
    layers: Sequence[Layer],
    linears: Sequence[tuple[int, int]],
    kinds: Sequence[str],
    threads: Sequence[int],
    tokens: Sequence[int],
    seconds: float,
) -> Iterator[Row]:
    ops = CpuOps()
    for kind in kinds:
        for layer in layers:
            experts = random_experts(ops, layer, kind)
            for count in threads:
                _cpu.set_threads(count)
                for t in tokens:
                    yield measure_layer(ops, layer, experts, kind, count, t, seconds)
        for n, k in linears:
            copies = max(1, int((192 << 20) / (n * k * BYTES[kind])))
            stack = [ops.pack_linear(random_matrix(kind, n, k)) for _ in range(min(copies, 64))]
            for count in threads:
                _cpu.set_threads(count)
                for t in tokens:
                    yield measure_linear(ops, stack, kind, count, t, seconds)


def random_matrix(kind: str, *shape: int) -> Matrix:
    """Made where it costs little: values do not change the time."""
    if kind == "int8":
        return Int8Matrix(
            torch.randint(-127, 128, shape, dtype=torch.int8), torch.full(shape[:-1], 1e-3)
        )
    weight: Tensor = torch.randn(shape) / shape[-1] ** 0.5
    if kind == "int4":
        return to_int4(weight)
    rounded: Tensor = weight.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    return rounded


def random_experts(ops: CpuOps, layer: Layer, kind: str) -> Experts:
    return ops.pack_experts(
        random_matrix(kind, layer.experts, 2 * layer.inner, layer.hidden),
        random_matrix(kind, layer.experts, layer.hidden, layer.inner),
    )


def measure_layer(
    ops: CpuOps, layer: Layer, experts: Experts, kind: str, threads: int, t: int, seconds: float
) -> Row:
    x, weights = torch.randn(t, layer.hidden), torch.rand(t, layer.chosen)
    draws = [
        torch.rand(t, layer.experts).topk(layer.chosen).indices.int().contiguous()
        for _ in range(DRAWS)
    ]
    size = 3 * layer.hidden * layer.inner
    return race(
        layer.name,
        kind,
        threads,
        t,
        seconds,
        lambda i: ops.moe_ffn(x, experts, draws[i % DRAWS], weights),
        lambda i: [(size, rows) for rows in rows_of_experts(draws[i % DRAWS])],
    )


def rows_of_experts(ids_TC: Tensor) -> list[int]:
    return [n for n in ids_TC.flatten().bincount().tolist() if n]


def measure_linear(
    ops: CpuOps, stack: list[Linear], kind: str, threads: int, t: int, seconds: float
) -> Row:
    n, k = stack[0].out_features, stack[0].in_features
    x = torch.randn(t, k)
    return race(
        f"linear {n}x{k}",
        kind,
        threads,
        t,
        seconds,
        lambda i: ops.linear(x, stack[i % len(stack)]),
        lambda i: [(n * k, t)],
    )


def race(
    what: str,
    kind: str,
    threads: int,
    t: int,
    seconds: float,
    call: Callable[[int], object],
    parts: Callable[[int], list[tuple[int, int]]],
) -> Row:
    """``parts(i)``: (weights, rows) of every matrix that call ``i`` needs."""
    probes = [probe_machine(threads, rounds=3)]
    for i in range(DRAWS):
        call(i)
    times, begin, i = [], time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or i < DRAWS:
        start = time.perf_counter()
        call(i)
        times.append((time.perf_counter() - start) * 1e6)
        i += 1
    probes.append(probe_machine(threads, rounds=3))
    read = max(probe.read.best for probe in probes)
    peak = max(peak_of(probe, kind) for probe in probes)
    rooflines = [
        sum(max(BYTES[kind] * w / read, 2 * w * rows / peak) for w, rows in parts(i)) * 1e6
        for i in range(DRAWS)
    ]
    ratios = [elapsed / rooflines[i % DRAWS] for i, elapsed in enumerate(times)]
    return Row(
        what,
        kind,
        t,
        threads,
        min(times),
        statistics.median(times),
        statistics.mean(rooflines),
        min(ratios),
        statistics.median(ratios),
        read / 1e9,
        peak / 1e9,
    )


def peak_of(machine: Machine, kind: str) -> float:
    rate = {"int8": machine.int8, "int4": machine.int8, "bf16": machine.bf16, "fp32": machine.fp32}
    found = rate[kind]
    assert found is not None, "the native half is missing"
    return found.best


if __name__ == "__main__":
    main()
