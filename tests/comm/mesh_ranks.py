"""Ranks of one mesh as processes, forked from one that has imported everything.

    python mesh_ranks.py PORT WORLD DEADLINE

``PORT`` is of the store of notes on 127.0.0.1. A line ``started PID...`` is printed when all are
forked. Every rank goes through rounds until there is an alarm, and then prints itself, the ranks
that are blamed and the reason as a line of JSON. Rank 0 prints ``going`` after a few
heartbeats.
"""

from __future__ import annotations

import json
import os
import sys
import time

from moeserve.comm.control.mesh import open_mesh
from moeserve.comm.group import Group
from moeserve.comm.launch.note_store import join_store
from moeserve.errors import LateRankError


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def run_rank(rank: int, port: int, world: int, deadline_s: float) -> None:
    group = Group(rank, world, join_store("127.0.0.1", port))
    mesh = open_mesh(group, 8, deadline_s, address="127.0.0.1")
    mesh.set_activity(f"rounds of rank {rank}")
    number = 0
    try:
        while True:
            mesh.post(number.to_bytes(8, "little"))
            assert mesh.collect(60.0) == number.to_bytes(8, "little") * world
            if rank == 0 and number == 600:
                say("going")
            number += 1
            time.sleep(0.001)
    except LateRankError as error:
        say(json.dumps([rank, list(error.ranks), error.message]))
    mesh.close()


def main(port: int, world: int, deadline_s: float) -> None:
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try:
                run_rank(rank, port, world, deadline_s)
            finally:
                sys.stderr.flush()
                os._exit(0)
        pids.append(pid)
    say(f"started {' '.join(map(str, pids))}")
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
