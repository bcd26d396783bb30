"""What control costs: CPU time of a decode step on a rank, without a model.

    python bench/control.py [--ranks 1 8 32 64 320] [--requests 16 64 96 256] [--steps 60]
                            [--sweep-mb MB] [--checkout FOLDER] [--json FILE]

Every rank is a process with the production engine, scheduler, lock-step and mesh, over real
sockets; its executor gives a token to whoever asks for one, at once. The parent imports everything
and forks them, so that hundreds fit. Counted is the CPU time of a rank's whole process over its
decode steps, the thread that runs steps and the mesh's thread apart; what wall time a step takes on
a machine with fewer cores than ranks says nothing. Doors are not in it (``bench/doors.py``).

Ranks that share a core begin every step with cold caches. ``--sweep-mb`` shows how much of the
figures that is: every rank reads so much memory in each step, which is not counted.

With ``--checkout`` a tree of an earlier version stands beside it, in which rank 0 decided for all:
the CPU time of its fleet, step messages and executor on rank 0 (``control_central.py``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moeserve.comm.control.mesh import open_mesh
from moeserve.comm.dispatcher import DispatchStats
from moeserve.comm.group import Group
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.core import (
    Counters,
    Event,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.loop import Engine, EngineLock, Unobserved
from moeserve.engine.ranks.load_report import SchedulerLoad
from moeserve.engine.ranks.lock_step import LockStep
from moeserve.engine.ranks.microbatches import FixedMicrobatches
from moeserve.engine.ranks.records import RECORD_BYTES
from moeserve.engine.scheduler import Scheduler

PROMPT, BLOCK = 100, 16
PATIENCE_S = 900.0
# More requests than this take one scheduler minutes to begin.
MOST_CENTRAL = 32_000
TOKEN = (7,)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of CPU a step, median over ranks with least and most: of the whole process, and
    of the thread that runs steps. What a rank sends of the common decision: messages and bytes."""

    ranks: int
    requests: int
    process_us: float
    least_us: float
    most_us: float
    engine_us: float
    messages: float
    bytes: float


class TokenAtOnce:
    """An executor that gives everybody the same token; it measures the steps that only decode."""

    def __init__(self, requests: int, steps: int, sweep_mb: int) -> None:
        self.done = threading.Event()
        self.process_s = self.engine_s = 0.0
        self._swept = np.ones(sweep_mb << 17)
        self._sweeping_s = 0.0
        self._left = steps
        self._requests = requests
        self._from: tuple[float, float] | None = None

    def run(self, plan: StepPlan, microbatches: int) -> StepResult:
        began = time.thread_time()
        self._swept.sum()
        self._sweeping_s += time.thread_time() - began
        if plan.num_tokens == self._requests and len(plan.chunks) == self._requests:
            self._count()
        return StepResult(tuple(Sampled(c.request.id, TOKEN) for c in plan.chunks if c.samples))

    def _count(self) -> None:
        now = time.process_time() - self._sweeping_s, time.thread_time() - self._sweeping_s
        self._from = self._from or now
        if self._left == 0 and not self.done.is_set():
            self.process_s, self.engine_s = now[0] - self._from[0], now[1] - self._from[1]
            self.done.set()
        self._left -= 1


class Uncounted:
    """A sink of all events."""

    def deliver(self, events: Sequence[Event]) -> None: ...


def run_rank(
    rank: int, world: int, requests: int, steps: int, sweep_mb: int, out: Connection
) -> None:
    """In a child: one rank, until the parent closes its end."""
    group = Group(rank, world, join_store("127.0.0.1", out.recv()), notify=lambda text: None)
    mesh = open_mesh(group, RECORD_BYTES, PATIENCE_S, address="127.0.0.1", timeout_s=PATIENCE_S)
    counters, lock = Counters(), EngineLock()
    pool = BlockPool(requests * (1 + (PROMPT + 8 * steps) // BLOCK), BLOCK, counters)
    config = SchedulerConfig(1 << 16, requests, max(512, 2 * requests))
    scheduler = Scheduler(config, pool, counters, rank=rank)
    executor = TokenAtOnce(requests, steps, sweep_mb)
    load = SchedulerLoad(scheduler, lock)
    step = LockStep(
        executor, mesh, load, FixedMicrobatches(1), DispatchStats(), deadline_s=PATIENCE_S
    )
    engine = Engine(scheduler, step, Unobserved(), pace=step, lock=lock)
    params = SamplingParams(max_tokens=8 * steps, ignore_eos=True)
    for i in range(requests):
        prompt = tuple((rank + 31 * i + 7 * t) % 50_000 for t in range(PROMPT))
        engine.submit(Request(RequestId(f"{rank}-{i}"), prompt, params), Uncounted())
    group.all_gather("ready", b"", PATIENCE_S)
    engine.start()
    executor.done.wait(PATIENCE_S)
    stats = mesh.stats
    out.send((executor.process_s, executor.engine_s, asdict(stats)))
    out.poll(PATIENCE_S)  # others may still need this one
    mesh.end()
    mesh.close()
    os._exit(0)


def measure(world: int, requests: int, steps: int, sweep_mb: int) -> Row:
    pipes: list[Connection] = []
    for rank in range(world):
        mine, theirs = Pipe()
        if os.fork() == 0:
            mine.close()
            run_rank(rank, world, requests, steps, sweep_mb, theirs)
        theirs.close()
        pipes.append(mine)
    # After the forks, for the store has a thread.
    store, port = host_store("127.0.0.1")
    for pipe in pipes:
        pipe.send(port)
    found: list[tuple[float, float, dict[str, Any]]] = []
    left = list(pipes)
    while left:
        for ready in wait(left, PATIENCE_S):
            assert isinstance(ready, Connection)
            found.append(ready.recv())
            left.remove(ready)
    for pipe in pipes:
        pipe.close()
    for _ in range(world):
        os.wait()
    del store
    process = sorted(1e6 * p / steps for p, _, _ in found)
    rounds = max(1, found[0][2]["rounds"])
    return Row(
        world,
        requests,
        median(process),
        process[0],
        process[-1],
        median(1e6 * e / steps for _, e, _ in found),
        median(s["round_messages"] for _, _, s in found) / rounds,
        median(s["round_bytes"] for _, _, s in found) / rounds,
    )


def central(checkout: Path, world: int, requests: int, steps: int) -> float:
    """Microseconds of rank 0 a step, where it decided for all."""
    here = Path(__file__).parent
    scripts = [here / "other_tree.py", checkout, here / "control_central.py"]
    command = [sys.executable, *scripts, *map(str, (world, requests, steps))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 64, 320])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 96, 256])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sweep-mb", type=int, default=0, help="memory read in each step")
    parser.add_argument("--checkout", type=Path, help="an earlier tree, in which rank 0 decided")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable()  # ranks that are left alone in the end say so
    console = Console(stderr=True)
    rows: list[Row] = []
    before: dict[str, float] = {}
    for world in args.ranks:
        for requests in args.requests:
            console.print(f"{world} ranks of {requests} requests")
            with console.status("running"):
                rows.append(measure(world, requests, args.steps, args.sweep_mb))
                if args.checkout is not None and world * requests <= MOST_CENTRAL:
                    steps = max(3, args.steps // world)
                    us = central(args.checkout, world, requests, steps)
                    before[f"{world}x{requests}"] = us
    table = Table("ranks", "requests", "us/step", "min-max", "steps' thread", "before, rank 0",
                  "messages", "bytes")  # fmt: skip
    for row in rows:
        old = before.get(f"{row.ranks}x{row.requests}")
        table.add_row(
            str(row.ranks), str(row.requests), f"{row.process_us:,.0f}",
            f"{row.least_us:,.0f}-{row.most_us:,.0f}", f"{row.engine_us:,.0f}",
            "" if old is None else f"{old:,.0f}", f"{row.messages:.1f}", f"{row.bytes:,.0f}",
        )  # fmt: skip
    Console().print(table)
    if args.json is not None:
        found = {"rows": [asdict(row) for row in rows], "central_us": before}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
