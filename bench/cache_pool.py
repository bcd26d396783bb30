"""The cache pool over loopback: pages put, fetched from memory and from disk, in GB/s.

    python bench/cache_pool.py [--tokens 8192] [--token-kb 64] [--layers 16] [--block 16]
                               [--rounds 5] [--folder FOLDER] [--json]

One member in a process of its own, one peer in this. ``put`` is until the member has all pages,
their bytes gathered and their digests made; ``put, held`` is the same again, when it has them;
``find`` only asks. ``get`` is until all runs have come and were checked: from memory, and, after a
restart of the member, from disk (files that were just written lie in the page cache, so this is
what reading, checking and moving costs, not what the device can do). ``computing`` is the prefill
rate, tokens/s, above which fetching does not pay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.core import CacheScope
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.pages import StoredRun
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.cache.service import CacheServer
from moeserve.pools.cache.store import PageStore, StoreLimits
from moeserve.pools.members import Member, Role

RUN = b"bench"
PATIENCE_S = 120.0
SCOPE = CacheScope()


class LoopbackChannels:
    """One connection to the member."""

    metadata = proof_metadata(Trust(), RUN)

    @asynccontextmanager
    async def use(self, address: str, server_name: str) -> AsyncIterator[grpc.aio.Channel]:
        host, _, port = address.rpartition(":")
        if address not in self._open:
            self._open[address] = open_channel(host, int(port), Trust(), server_name)
        yield self._open[address]

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}


async def keep(folder: Path, nbytes: int) -> None:
    """The member, until SIGTERM."""
    store = await PageStore.open(StoreLimits(4 * nbytes, 2 * nbytes), folder)
    server, port = open_server("127.0.0.1", Trust(), RUN, [CacheServer(store).handlers()])
    await server.start()
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    print(port, flush=True)
    await end.wait()
    await server.stop(1.0)
    await store.close()


class Keeping:
    def __init__(self, folder: Path, nbytes: int) -> None:
        command = [sys.executable, __file__, "--keep", str(nbytes), "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)


def runs_of(args: argparse.Namespace) -> list[StoredRun]:
    size = args.token_kb * 1024 * args.block // args.layers
    data = os.urandom(size)
    return [
        StoredRun(layer, start, args.block, bytes(16), data)
        for start in range(0, args.tokens, args.block)
        for layer in range(args.layers)
    ]


def pool_at(port: int, args: argparse.Namespace) -> PagePool:
    members = CacheMembers()
    members.put(Member(f"life-{port}", "bench", Role.CACHE, f"127.0.0.1:{port}"))
    terms = PoolTerms("bench", args.layers, replication=1, put_bytes=1 << 40)
    return PagePool(members, LoopbackChannels(), terms, put_s=PATIENCE_S)


async def fetch_all(pool: PagePool, ids: list[int], expected: int) -> float:
    began = time.perf_counter()
    came = 0
    async for run in pool.fetch(ids, SCOPE, timeout_s=PATIENCE_S):
        came += run.count
    took = time.perf_counter() - began
    assert came == expected, (came, expected)
    return took


async def one_round(
    keeping: Keeping, number: int, args: argparse.Namespace, runs: list[StoredRun]
) -> dict[str, float]:
    pool = pool_at(keeping.port, args)
    ids = [number] * args.tokens
    began = time.perf_counter()
    took: dict[str, float] = {}
    for what in ("put", "put, held"):
        began = time.perf_counter()
        pool.put(ids, SCOPE, runs)
        await pool.puts.flush(PATIENCE_S)
        took[what] = time.perf_counter() - began
    assert pool.puts.counts.stored == pool.puts.counts.held == args.tokens // 64, pool.puts.counts
    began = time.perf_counter()
    await pool.find(ids, SCOPE)
    took["find"] = time.perf_counter() - began
    took["get, memory"] = await fetch_all(pool, ids, args.layers * args.tokens)
    await pool.close()
    return took


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    runs = runs_of(args)
    nbytes = args.token_kb * 1024 * args.tokens * (args.rounds + 1)
    found: dict[str, list[float]] = {}
    keeping = Keeping(folder, nbytes)
    try:
        for number in range(args.rounds + 1):
            for what, seconds in (await one_round(keeping, number, args, runs)).items():
                if number:  # the first one warms up
                    found.setdefault(what, []).append(seconds)
    finally:
        keeping.end()
    keeping = Keeping(folder, nbytes)
    try:
        pool = pool_at(keeping.port, args)
        for number in range(args.rounds + 1):
            seconds = await fetch_all(pool, [number] * args.tokens, args.layers * args.tokens)
            if number:
                found.setdefault("get, disk", []).append(seconds)
        await pool.close()
    finally:
        keeping.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/cache_pool.py --tokens 4096 --json",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt [4096]")
    parser.add_argument("--token-kb", type=int, default=64, help="KiB of KV for each [64]")
    parser.add_argument("--layers", type=int, default=16, help="[16]")
    parser.add_argument("--block", type=int, default=16, help="tokens of a run [16]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--folder", type=Path, help="for the member's files [a temporary one]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.keep:
        asyncio.run(keep(args.folder, args.keep))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = asyncio.run(measure(args, Path(folder)))
    nbytes = args.token_kb * 1024 * args.tokens
    rows = []
    for what, seconds in found.items():
        median = statistics.median(seconds)
        rows.append({"what": what, "seconds": median, "min": min(seconds), "max": max(seconds)})
        if what not in ("find", "put, held"):
            rows[-1] |= {"gb_s": nbytes / median / 1e9, "computing": args.tokens / median}
    if args.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release()}
        shape = {"tokens": args.tokens, "bytes": nbytes, "layers": args.layers}
        print(json.dumps({"machine": machine, **shape, "rows": rows}))
        return
    for row in rows:
        rate = (
            f"{row['gb_s']:6.2f} GB/s {row['computing']:10,.0f} tokens/s" if "gb_s" in row else ""
        )
        print(f"{row['what']:12} {1e3 * row['seconds']:9.1f} ms  {rate}")


if __name__ == "__main__":
    main()
