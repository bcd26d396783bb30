"""One rank of the tests of exchanges: does what the test says over a socket, a JSON line each.

    python exchange_ranks.py TEST_PORT STORE_PORT [WORLD]

With WORLD this process forks so many ranks, once everything is imported; under mpirun it is one,
and rank and world come from the environment. Every answer is an object; one that has
"error" tells of ours, by class.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.exchange.collective import CollectiveExchange
from moeserve.comm.exchange.media import HostMedium
from moeserve.comm.exchange.open import open_exchange, open_host_exchanges
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import join_store
from moeserve.errors import LateRankError, MoeserveError, UnavailableError


def content(seed: int, source: int, target: int, size: int) -> torch.Tensor:
    start = (seed * 31 + source * 7 + target * 3) % 251
    return ((torch.arange(size, dtype=torch.int64) * 13 + start) % 256).to(torch.uint8)


class Rank:
    """Owns the exchanges that the test has opened, by name."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.open_ones: dict[str, Exchange] = {}
        self.held: Any = None

    def do_open(
        self, name: str, backend: str, members: list[int], lanes: list[int], deadline_s: float,
        nodes: list[int] | None = None, alarm_after_s: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        begun = time.monotonic()

        def alarm() -> MoeserveError | None:
            if alarm_after_s is not None and time.monotonic() - begun > alarm_after_s:
                return UnavailableError("the alarm rang")
            return None

        topology = Topology(tuple(nodes or [0] * self.group.world))
        group = self.group.sub_group(members)
        given = Lanes(tuple(lanes), deadline_s, alarm)
        made: Exchange
        if backend == "gloo":  # over memory of the host, in the place of a library for devices
            on_host = open_host_exchanges(group, topology, given, key=name)
            medium = HostMedium.open(group, name, torch.device("cpu"))
            made = CollectiveExchange(group, given, *on_host, medium)
        else:
            made = open_exchange(backend, group, topology, given, key=name)
        self.open_ones[name] = made
        return {"is": made.name, "rank": made.rank, "world": made.world}

    def do_rounds(self, name: str, script: list[Any]) -> dict[str, Any]:
        """``script``: ("send", lane, seed, room, sizes_RR) and ("receive", lane, seed, sizes_RR)
        in turn; whether all that came was right, counted."""
        exchange, me = self.open_ones[name], self.open_ones[name].rank
        segments = 0
        for step in script:
            if step[0] == "send":
                _, lane, seed, room, sizes_RR = step
                send(exchange, lane, seed, room, sizes_RR[me])
                continue
            _, lane, seed, sizes_RR = step
            for source, segment in enumerate(exchange.receive(lane)):
                expected = content(seed, source, me, sizes_RR[source][me])
                assert segment.dtype == torch.uint8 and torch.equal(segment, expected), (
                    lane, source, segment.shape, expected.shape,
                )  # fmt: skip
                assert len(segment) == 0 or segment.data_ptr() % 64 == 0
                segments += 1
        traffic = exchange.traffic
        return {"segments": segments, "sent": traffic.sent_R, "rounds": traffic.rounds}

    def do_wait(self, name: str, lane: int, times: int = 1) -> dict[str, Any]:
        """Rounds of 100 bytes to all, until one fails."""
        exchange = self.open_ones[name]
        sizes = [100] * exchange.world
        for _ in range(times):
            send(exchange, lane, 1, 0, sizes)
            begun = time.monotonic()
            try:
                exchange.receive(lane)
            except MoeserveError as error:
                return {**told(error), "after_s": time.monotonic() - begun}
        return {}

    def do_hold(self, name: str, lane: int, size: int) -> dict[str, Any]:
        """Keep views of what comes, even when the exchange is closed."""
        exchange = self.open_ones[name]
        send(exchange, lane, 5, 0, [size] * exchange.world)
        self.held = exchange.receive(lane)
        exchange.close()
        right = [content(5, r, exchange.rank, size) for r in range(exchange.world)]
        return {"right": all(map(torch.equal, self.held, right))}

    def do_let_go(self) -> dict[str, Any]:
        self.held = None
        return {}

    def do_close(self, name: str) -> dict[str, Any]:
        self.open_ones.pop(name).close()
        return {}

    def do_count(self) -> dict[str, Any]:
        """What this process holds open, once threads that end have ended."""
        gc.collect()
        files = len(os.listdir("/proc/self/fd")) - 1
        with open("/proc/self/maps") as maps:
            blocks = sum("memfd:moeserve" in line for line in maps)
        return {"files": files, "blocks": blocks}


def send(exchange: Exchange, lane: int, seed: int, room: int, sizes_R: Sequence[int]) -> None:
    """``room`` more is announced than is sent."""
    areas = exchange.areas(lane, [size + room for size in sizes_R])
    for target, (area, size) in enumerate(zip(areas, sizes_R, strict=True)):
        assert len(area) >= size + room and (not len(area) or area.data_ptr() % 64 == 0)
        area[:size] = content(seed, exchange.rank, target, size)
    exchange.send(lane, sizes_R)


def told(error: MoeserveError) -> dict[str, Any]:
    ranks = list(error.ranks) if isinstance(error, LateRankError) else []
    return {"error": type(error).__name__, "message": error.message, "ranks": ranks}


def main() -> None:
    torch.set_num_threads(1)
    test_port, store_port = int(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) == 3:
        importlib.import_module("mpi4py.MPI")  # starts MPI, which takes all ranks
        rank, world = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
        serve_orders(rank, world, test_port, store_port)
    world = int(sys.argv[3])
    children = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            serve_orders(rank, world, test_port, store_port)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def serve_orders(rank: int, world: int, test_port: int, store_port: int) -> NoReturn:
    self = Rank(Group(rank, world, join_store("127.0.0.1", store_port)))
    with socket.create_connection(("127.0.0.1", test_port), 30) as line:
        line.settimeout(200)
        words = line.makefile("rw")
        print(json.dumps({"rank": rank, "pid": os.getpid()}), file=words, flush=True)
        for order in map(json.loads, words):
            try:
                answer = getattr(self, f"do_{order.pop('do')}")(**order)
            except MoeserveError as error:
                answer = told(error)
            print(json.dumps(answer), file=words, flush=True)
    # Not by the way that waits for MPI: a rank of it may be dead.
    os._exit(0)


if __name__ == "__main__":
    main()
