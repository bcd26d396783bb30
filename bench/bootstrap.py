"""How ranks meet, at scale: time, CPU, questions to the store, bytes and sockets, by phase.

    python bench/bootstrap.py [--ranks 8 64 256 1024] [--former-up-to 256] [--timeout 600] [--json]

Every rank is a process forked from one that has loaded torch but no model, and runs the production
code: it reaches the store that rank 0 keeps, meets the others (``open_group``), agrees on an
identity with the digests of 163 weight files, as DeepSeek-V3 has, connects the mesh, and gathers
the addresses of the rank services. Rank 0 and rank 1 are shown: wall time, CPU time of the process,
the store and native threads included, what it asked of the store, bytes it read from there, and
its sockets. "every key polled" is how notes were gathered before: each rank asked for each other
rank's key in turn, every 10 ms. All ranks share this machine's cores, so that wall times are those
of R starts one after another; CPU times and counts are a rank's own. What is read times R is what
rank 0 sends: for one gathering R * R * (8 + note).

Then what a rank has of sockets and memory at 64, 320 and 1,024 ranks, computed: DeepSeek-V3 (58 MoE
layers of 256 experts, 8 a token, hidden 7168, int8 on the wire), two microbatches, steps of up to
2,048 tokens a rank; "touched" is what a decode step of 96 tokens a rank makes real, at least a page
an area.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from moeserve.comm import _comm
from moeserve.comm.control.handshake import Identity, agree
from moeserve.comm.control.mesh import open_mesh
from moeserve.comm.control.neighbours import num_steps
from moeserve.comm.group import Group, PrefixedStore
from moeserve.comm.launch import rendezvous
from moeserve.comm.launch.environment import LOOPBACK, Launch
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.engine.ranks.records import RECORD_BYTES
from moeserve.kernels.wire import Wire, header_bytes

FILES = 163
DEADLINE_S = 60.0
PAGE = os.sysconf("SC_PAGE_SIZE")
SCALES = (64, 320, 1024)
HIDDEN, TOP_K, LAYERS, EXPERTS, REPLICAS = 7168, 8, 58, 256, 32
MOST_TOKENS, DECODE_TOKENS, MICROBATCHES, PARITIES, NODE = 2048, 96, 2, 2, 8


@dataclass(frozen=True, slots=True)
class Phase:
    """Of one rank; ``store_bytes`` were read from the store."""

    ranks: int
    rank: int
    what: str
    wall_s: float
    cpu_s: float
    store_calls: int
    store_bytes: int
    sockets: int
    private_mib: float


class CountingStore:
    """A rank's own connection to the notes, counted."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls = 0
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        def ask(*words: Any) -> Any:
            self.calls += 1
            answer = getattr(self.store, name)(*words)
            self.bytes += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return ask


def every_key_polled(group: Group, key: str, note: bytes) -> None:
    """The former ``all_gather``."""
    store: Any = group.store
    store.set(f"{key}/{group.rank}", note)
    missing = list(range(group.world))
    while True:
        store.check(["given up"])
        for rank in list(missing):
            if store.check([f"{key}/{rank}"]):
                store.get(f"{key}/{rank}")
                missing.remove(rank)
        if not missing:
            return
        time.sleep(0.01)


class Rank:
    """One process's part of a start; ``phases`` is what it measured."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.phases: list[Phase] = []
        self.group: Group
        self._counted = CountingStore(None)

    def start(self, port: int, former: bool, host: Any) -> None:
        launch = Launch(
            self.rank, self.world, self.rank, self.world, LOOPBACK, port, "torch", attempt="bench"
        )
        found: list[Any] = [host]
        if host is None:
            reach = partial(join_store, timeout_s=self.timeout_s)
            join = partial(
                rendezvous._join, reach, LOOPBACK, port, self.rank, self.timeout_s, print
            )
            self._measure("store", lambda: found.append(join()))

        def count(name: str, store: Any) -> CountingStore:
            self._counted = CountingStore(PrefixedStore(name, store))
            return self._counted

        def meet() -> None:
            with mock.patch.object(rendezvous, "PrefixedStore", count):
                met = rendezvous.open_group(
                    launch,
                    environ=os.environ,
                    store=found[-1],
                    timeout_s=self.timeout_s,
                    notify=lambda text: None,
                )
            self.group = replace(met.group, patience_s=self.timeout_s)

        self._measure("arrival", meet)
        files = {f"model-{n:05}-of-{FILES:06}.safetensors": "x" * 40 for n in range(FILES)}
        self._measure("identity", lambda: agree(self.group, Identity(files, {"dtype": "auto"}, "")))
        note = json.dumps([LOOPBACK, 40000, "x" * 32]).encode()
        self._measure("rank service", lambda: self.group.all_gather("rank service", note))
        if former:
            self._measure("every key polled", lambda: every_key_polled(self.group, "former", note))
        self._measure("mesh", self._open_mesh)
        self.group.all_gather("measured", b"")
        self._mesh.end()
        self.group.all_gather("over", b"")
        # Rank 0 keeps the notes until the others have read their last.
        gone = self.group.store.add("gone", 1)
        while self.rank == 0 and gone < self.world:
            time.sleep(0.01)
            gone = self.group.store.add("gone", 0)
        self._mesh.close()

    def _open_mesh(self) -> None:
        self._mesh = open_mesh(
            self.group, RECORD_BYTES, DEADLINE_S, address=LOOPBACK, timeout_s=self.timeout_s
        )

    def _measure(self, what: str, run: Callable[[], object]) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        calls, read = self._counted.calls, self._counted.bytes
        run()
        if what == "arrival":  # which began with another counter
            calls = read = 0
        self.phases.append(
            Phase(
                self.world,
                self.rank,
                what,
                time.monotonic() - wall,
                time.process_time() - cpu,
                self._counted.calls - calls,
                self._counted.bytes - read,
                sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket") for fd in own_fds()),
                private_mib(),
            )
        )
        if self.rank in (0, 1):
            print(self.phases[-1], file=sys.stderr, flush=True)


def own_fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


def private_mib() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    kib = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Private")]
    return sum(kib) / 1024


def run_forked(work: Callable[[], list[Phase]], out: int) -> int:
    """The child's process number; what it measured, or an error, is written to ``out``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        text = json.dumps([asdict(p) for p in work()])
        os.write(out, (text if text != "[]" else "").encode())
        status = 0
    except Exception:  # noqa: BLE001 (the process ends here)
        traceback.print_exc()
    finally:
        os._exit(status)


def start_ranks(world: int, former: bool, timeout_s: float) -> list[Phase]:
    """A start of so many ranks; of rank 0 and rank 1 what they measured."""
    ports, results = os.pipe(), os.pipe()

    def rank_0() -> list[Phase]:
        rank = Rank(0, world, timeout_s)
        kept: list[Any] = []
        rank._measure("store", lambda: kept.append(host_store(LOOPBACK, 0, timeout_s)))
        os.write(ports[1], kept[0][1].to_bytes(2, "little"))
        rank.start(kept[0][1], former, kept[0][0])
        return rank.phases

    children = [run_forked(rank_0, results[1])]
    port = int.from_bytes(os.read(ports[0], 2), "little")

    def other(number: int) -> list[Phase]:
        rank = Rank(number, world, timeout_s)
        rank.start(port, former, None)
        return rank.phases if number == 1 else []

    for number in range(1, world):
        children.append(run_forked(partial(other, number), results[1]))
    for end in (*ports, results[1]):
        os.close(end)
    with os.fdopen(results[0]) as read:
        text = read.read()
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if any(statuses):
        raise SystemExit(f"{sum(map(bool, statuses))} of {world} ranks failed")
    decoder, at, phases = json.JSONDecoder(), 0, []
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        phases += [Phase(**values) for values in found]
    return sorted(phases, key=lambda p: (p.ranks, p.rank))


def footprint(ranks: int) -> dict[str, str]:
    """What one of so many ranks has, in words."""
    wire = Wire(torch.int8, HIDDEN, TOP_K)

    def lanes(tokens: int) -> list[int]:
        back = 4 * HIDDEN * tokens + header_bytes(tokens)
        return [wire.row_bytes * tokens, back] * MICROBATCHES

    most = lanes(MOST_TOKENS)
    # Tokens of a microbatch that go to one rank: each choice to a rank of its own.
    pair = max(1, DECODE_TOKENS // MICROBATCHES * TOP_K // ranks)
    touched = sum(-(-size // PAGE) * PAGE for size in lanes(pair)) * PARITIES
    node = min(NODE, ranks)
    slots = -(-(EXPERTS + REPLICAS) // ranks) * ranks
    table = 4 * (EXPERTS + 1 + slots)
    steps = num_steps(ranks)
    return {
        "mesh": f"{2 * steps} sockets; {steps} messages a round",
        "records of a step": f"{size_of(RECORD_BYTES * ranks)} received",
        "addresses of a start": f"{size_of((8 + 110) * ranks)} read; "
        f"{size_of((8 + 110) * ranks**2)} sent by rank 0",
        "tcp: sockets": f"{ranks - 1}",
        "tcp: areas": f"{size_of(2 * PARITIES * sum(most) * ranks)} virtual, "
        f"{size_of(2 * touched * ranks)} touched, {2 * PARITIES * len(most) * ranks} mappings",
        "tcp: kernel buffers at most": size_of(2 * (4 << 20) * (ranks - 1)),
        "shm: own block, all on one node": size_of(_comm.block_bytes(ranks, most)) + " virtual",
        f"shm: node of {node}": f"{size_of(_comm.block_bytes(node, most))} a block, "
        f"{size_of(_comm.block_bytes(node, most) * node)} mapped, virtual",
        f"two levels: sockets between nodes of {node}": f"{max(0, ranks // node - 1)}",
        "assignment tables": f"{size_of(LAYERS * table)} native ({slots} slots a layer), "
        f"{size_of(LAYERS * 4 * slots)} of the plan",
    }


def size_of(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.3g} TiB"


def show(phases: list[Phase]) -> None:
    console = Console(width=120)
    names = ("ranks", "rank", "phase", "wall s", "CPU s", "asked", "read", "sockets", "private MiB")
    table = Table(*names)
    for p in phases:
        figures = (f"{p.wall_s:.3f}", f"{p.cpu_s:.3f}", p.store_calls, size_of(p.store_bytes))
        table.add_row(
            *map(str, (p.ranks, p.rank, p.what, *figures, p.sockets, f"{p.private_mib:.0f}"))
        )
    console.print(table)
    table = Table("of one rank, at", *map(str, SCALES))
    columns = [list(footprint(ranks).items()) for ranks in SCALES]
    for rows in zip(*columns, strict=True):
        table.add_row(rows[0][0], *(text for _, text in rows))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="How ranks meet, at scale.")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 256, 1024])
    parser.add_argument("--former-up-to", type=int, default=256, metavar="R")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.collect()
    gc.freeze()  # what children share stays shared
    phases: list[Phase] = []
    for world in options.ranks:
        print(f"{world} ranks start", file=sys.stderr)
        phases += start_ranks(world, world <= options.former_up_to, options.timeout)
    if options.json:
        found = {str(ranks): footprint(ranks) for ranks in SCALES}
        print(json.dumps({"phases": [asdict(p) for p in phases], "of_one_rank": found}, indent=1))
    else:
        show(phases)


if __name__ == "__main__":
    main()
