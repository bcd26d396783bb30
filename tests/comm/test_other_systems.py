"""Where Linux's own calls are missing one process serves, and ``auto`` takes what is left.

Every test runs in a process from which they are taken before moeserve is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

# What only Linux has: calls of os, fcntl, files under /proc and /sys, the native sockets.
ELSEWHERE = """
import os, pathlib, sys
import multiprocessing, socket, subprocess, uuid, platform, torch  # which ask for the real system
import torch.distributed
import pydantic, sysconfig, zoneinfo
sysconfig.get_config_vars()
for name in ("sched_getaffinity", "memfd_create", "pidfd_open", "eventfd", "setpriority"):
    if hasattr(os, name):
        delattr(os, name)
sys.modules["fcntl"] = None
sys.platform = "darwin"
read_text = pathlib.Path.read_text
def without_proc(self, *args, **kw):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(self)
    return read_text(self, *args, **kw)
pathlib.Path.read_text = without_proc
import importlib.util
if importlib.util.find_spec("moeserve.comm._comm"):
    from moeserve.comm import _comm
    del _comm.Streams
"""

RANKS = """
import threading
from moeserve.comm.exchange.open import open_exchange
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.comm.launch.rendezvous import host_identity, own_address
from moeserve.errors import ConfigError, MoeserveError
from moeserve.host import allowed_cores, read_cpu, read_memory
{lanes}

def opened(backend, nodes):
    store, port = host_store("127.0.0.1")
    stores = [store, join_store("127.0.0.1", port)]
    found = [None, None]
    def one(rank):
        group = Group(rank, 2, stores[rank], patience_s=30.0)
        try:
            exchange = open_exchange(
                backend, group, Topology(nodes), Lanes((64,)), address="127.0.0.1"
            )
        except MoeserveError as error:
            found[rank] = type(error).__name__ + ": " + error.message
            return
        exchange.areas(0, [1, 1])[1 - rank][0] = 7 + rank
        exchange.send(0, [1, 1])
        found[rank] = exchange.name + str(int(exchange.receive(0)[1 - rank][0]))
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    return found

assert opened("auto", (0, 0)) == ["torch8", "torch7"], opened("auto", (0, 0))
assert opened("auto", (0, 1)) == ["torch8", "torch7"]
for backend, says in (("shm", "memfd"), ("tcp", "streams")):
    for answer in opened(backend, (0, 0)):
        assert answer.startswith("ConfigError") and says in answer, answer
assert host_identity({{}}) == host_identity({{}}) != ""
assert allowed_cores() == list(range(os.cpu_count())) and read_cpu().usable >= 1
assert 0 < read_memory().available <= read_memory().total
try:
    assert not own_address().startswith("127.")
except ConfigError as error:
    assert "MASTER_ADDR" in error.message
print("fine", flush=True)
os._exit(0)
"""

SERVES = """
from moeserve.cli import main
sys.exit(main(["generate", "--model", "demo", "--prompt", "Once", "--max-tokens", "2",
               "--temperature", "0"]))
"""


def elsewhere(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE + code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_auto_falls_to_torch_and_the_others_say_what_is_missing() -> None:
    lanes = "from moeserve.comm.exchange.base import Lanes"
    done = elsewhere(RANKS.format(lanes=lanes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "fine\n"


def test_one_process_serves() -> None:
    done = elsewhere(SERVES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
