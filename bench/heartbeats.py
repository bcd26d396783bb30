"""What the heartbeats of members cost a gateway: its registry over gRPC, its view, its load table.

    python bench/heartbeats.py [--members 100 1000] [--seconds 10] [--json FILE]

The registry is in a process of its own, as in a gateway, and members beat in another one, each over
a connection of its own. ``core`` is the share of a core that the registry's process used, ``us``
the microseconds of it for each beat that was taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.pools.members import Member, MemberLoad, Role, ServedTerms
from moeserve.pools.registry.embedded import RegistryServer
from moeserve.pools.registry.follow import Follower
from moeserve.pools.registry.heartbeat import Heartbeat
from moeserve.pools.registry.memory import MemoryRegistry
from moeserve.pools.registry.remote import RemoteRegistry
from moeserve.pools.registry.view import ClusterView
from moeserve.pools.routing.locality_free import LocalityFree
from moeserve.pools.routing.router import RequestRouter

RUN = b"heartbeats"
JOINED_S = 60.0


async def gateway(side: Connection) -> None:
    """Says its port; at each word from the other side, what it has used and taken."""
    own, view = MemoryRegistry(), ClusterView()
    router = RequestRouter(LocalityFree(), "m")
    view.subscribe(router.on_change)
    server, port = open_server("127.0.0.1", Trust(), RUN, [RegistryServer(own).handlers()])
    await server.start()
    follower = Follower(own, view)
    follower.start()
    side.send(port)
    while await asyncio.to_thread(side.recv):
        taken = sum(report.load.sequence for report in view.members())
        side.send((time.process_time(), len(view.members()), taken))
    await follower.close()
    await own.close()
    await server.stop(0)


def serve(side: Connection) -> None:
    asyncio.run(gateway(side))


async def beat(port: int, side: Connection, count: int, seconds: float) -> dict[str, float]:
    terms = ServedTerms("m", "m", 32_000, 4096, block_size=16)
    load = MemberLoad(running=3, free_blocks=500, total_blocks=1000, prefill_rate=8000.0)
    members = []
    for i in range(count):
        channel = open_channel("127.0.0.1", port, Trust(), "")
        registry = RemoteRegistry("here", channel, proof_metadata(Trust(), RUN))
        member = Member(f"m{i}", f"m{i}", Role.DECODE, f"127.0.0.1:{1 + i}", terms=terms)
        members.append((Heartbeat(registry, member, lambda: load), registry))

    def ask() -> tuple[float, int, int]:
        side.send(True)
        used, there, taken = side.recv()
        return float(used), int(there), int(taken)

    end = time.monotonic() + JOINED_S
    for heartbeat, _ in members:  # apart, as members start
        heartbeat.start()
        await asyncio.sleep(0.5 / count)
    while (await asyncio.to_thread(ask))[1] < count:
        if time.monotonic() > end:
            raise SystemExit(f"{count} members have not joined in {JOINED_S:.0f} s")
        await asyncio.sleep(0.1)
    began, (used, _, taken) = time.monotonic(), await asyncio.to_thread(ask)
    await asyncio.sleep(seconds)
    took, (used_then, there, taken_then) = time.monotonic() - began, await asyncio.to_thread(ask)
    beats = taken_then - taken
    row = {
        "members": there,
        "beats_per_s": beats / took,
        "core": (used_then - used) / took,
        "us": (used_then - used) / max(1, beats) * 1e6,
    }
    await asyncio.gather(*(heartbeat.close() for heartbeat, _ in members))
    await asyncio.gather(*(registry.close() for _, registry in members))
    return row


def measure(count: int, seconds: float) -> dict[str, float]:
    start = multiprocessing.get_context("spawn")
    side, other = start.Pipe()
    process = start.Process(target=serve, args=(other,), daemon=True)
    process.start()
    try:
        row = asyncio.run(beat(side.recv(), side, count, seconds))
        side.send(False)
        process.join(10)
        return row
    finally:
        process.kill()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    rows = [measure(count, options.seconds) for count in options.members]
    table = Table("members", "beats a second", "of a core", "us a beat")
    for row in rows:
        cells = f"{row['members']:.0f} {row['beats_per_s']:.0f} {row['core']:.1%} {row['us']:.0f}"
        table.add_row(*cells.split())
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
