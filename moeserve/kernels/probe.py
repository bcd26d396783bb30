"""How fast this machine can go at most: what every roofline is measured with.

Memory read, and multiply-adds by the instructions the kernels are made of, with so many threads.
Each figure is taken over several short rounds: ``best`` is the machine undisturbed, ``median``
what it gave while we looked. Where the native half is missing, numpy measures bandwidth alone.
Needs no torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeserve.native import find_native

if TYPE_CHECKING:
    from types import ModuleType

KINDS = ("read", "int8", "bf16", "fp32")
PROBE_BYTES = 512 << 20  # more than a cache holds
ROUNDS = 5
ROUND_SECONDS = 0.02
READ_WAYS = 2  # machines differ in whether reading ahead helps: the faster one counts


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or operations (two per multiply-add) per second; ``way`` names the instructions."""

    way: str
    best: float
    median: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What ``threads`` threads reach together; None is what only the native half can measure."""

    threads: int
    read: Rate
    int8: Rate | None
    bf16: Rate | None
    fp32: Rate | None


def probe_machine(
    threads: int,
    *,
    size: int = PROBE_BYTES,
    rounds: int = ROUNDS,
    seconds: float = ROUND_SECONDS,
) -> Machine:
    """Takes about ``5 * rounds * seconds``; ``size`` is the memory read, in bytes."""
    native = native_half()
    if native is None:
        return Machine(threads, probe_with_numpy(threads, size, rounds), None, None, None)
    ways = {kind: native.probe_ways(kind)[:1] for kind in KINDS}
    ways["read"] = native.probe_ways("read")[:READ_WAYS]
    rates = {
        kind: [
            summarise(way, native.probe(kind, way, threads, rounds, seconds, size)) for way in tried
        ]
        for kind, tried in ways.items()
    }
    fastest = {kind: max(found, key=lambda rate: rate.best) for kind, found in rates.items()}
    return Machine(threads, **fastest)


def faster(one: Machine, other: Machine) -> Machine:
    """Of two looks at the same machine, what it could do in the better moment of each figure."""

    def best(a: Rate | None, b: Rate | None) -> Rate | None:
        return max((r for r in (a, b) if r is not None), key=lambda r: r.best, default=None)

    return Machine(
        one.threads,
        max(one.read, other.read, key=lambda rate: rate.best),
        best(one.int8, other.int8),
        best(one.bf16, other.bf16),
        best(one.fp32, other.fp32),
    )


def native_half() -> ModuleType | None:
    """None where it was not built, also where it is required: whoever measures has to say so."""
    return find_native("moeserve.kernels.cpu._cpu")[0]


def summarise(way: str, rates: Sequence[float]) -> Rate:
    return Rate(way, max(rates), statistics.median(rates))


def probe_with_numpy(threads: int, size: int, rounds: int) -> Rate:
    """The slow twin: every thread sums its own array."""
    words = max(1, size // threads // 8)

    def read(_: int) -> list[float]:
        mine = np.ones(words, np.uint64)
        rates = []
        for _ in range(rounds):
            begin = time.perf_counter()
            np.bitwise_or.reduce(mine)
            rates.append(mine.nbytes / (time.perf_counter() - begin))
        return rates

    with ThreadPoolExecutor(threads) as pool:
        of_threads = list(pool.map(read, range(threads)))
    return summarise("numpy", [sum(together) for together in zip(*of_threads, strict=True)])
