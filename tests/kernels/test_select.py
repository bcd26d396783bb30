"""Which backend an engine gets, and what the native one needs of its process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from moeserve.errors import ConfigError
from moeserve.kernels.cpu.ops import CpuOps, _cpu
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MOESERVE_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_cpu_gets_the_native_kernels() -> None:
    for device in ("cpu", torch.device("cpu")):
        ops = choose_ops(device)
        assert isinstance(ops, CpuOps)
        assert ops.device == ReferenceOps().device == torch.device("cpu")


def test_a_device_without_a_backend_is_named() -> None:
    for device in ("abacus", torch.device("meta")):
        with pytest.raises(ConfigError, match=r"device='(abacus|meta)': expected one of auto, cpu"):
            choose_ops(device)


def test_without_its_native_half_torch_serves_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "moeserve.kernels.cpu.ops", None)
    monkeypatch.delenv("MOESERVE_REQUIRE_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_ops(), ReferenceOps)
    assert "no native kernels" in caplog.text
    assert "pip install" in caplog.text


REQUIRE = """
import os, sys
from moeserve.errors import ConfigError
from moeserve.kernels.select import choose_ops
sys.modules["moeserve.kernels.cpu._cpu"] = None
print(choose_ops().name)
os.environ["MOESERVE_REQUIRE_NATIVE"] = "1"
try:
    choose_ops()
except ConfigError as missing:
    print(missing)
del sys.modules["moeserve.kernels.cpu._cpu"]
print(choose_ops().name)
"""


def test_without_its_native_half_a_process_that_requires_it_fails() -> None:
    without, required, present = python(REQUIRE).stdout.splitlines()
    assert (without, present) == ("reference", "cpu")
    assert required.startswith("MOESERVE_REQUIRE_NATIVE is set")


def test_the_environment_may_only_lower_the_number_of_threads() -> None:
    count = "from moeserve.kernels.cpu import _cpu; print(_cpu.threads())"
    assert python(count, MOESERVE_THREADS="1").stdout == "1\n"
    cores = int(python(count).stdout)
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert python(count, MOESERVE_THREADS="1000").stdout == f"{cores}\n"


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _cpu.isa()
    assert before in _cpu.isas()
    with pytest.raises(ValueError, match="'mmx' is not one of"):
        _cpu.set_isa("mmx")
    assert _cpu.isa() == before


def test_nodes_share_out_the_cpus_of_this_process() -> None:
    nodes = _cpu.cpus_of_nodes()
    cpus = [cpu for node in nodes for cpu in node]
    assert len(cpus) == len(set(cpus))
    assert not cpus or set(cpus) == os.sched_getaffinity(0)
    assert all(nodes)


def test_no_threads_at_all_is_refused() -> None:
    before = _cpu.threads()
    with pytest.raises(ValueError, match="at least 1"):
        _cpu.set_threads(0)
    assert _cpu.threads() == before


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    ops, before = CpuOps(), _cpu.threads()
    _cpu.set_threads(3)
    weight = ops.pack_linear(torch.randn(400, 200))
    inputs = [torch.randn(9, 200) for _ in range(4)]
    alone = [ops.linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(200):
            if not torch.equal(ops.linear(inputs[i], weight), alone[i]):
                wrong.append(i)

    callers = [threading.Thread(target=repeat, args=(i,), daemon=True) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    _cpu.set_threads(before)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


RESIZED = """
import os, time, torch
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.ops import CpuOps

def switches():
    found = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            found[task] = sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
    return found

def of_workers():
    return {task: count for task, count in switches().items() if task in workers}

def workers_woken():
    before = None
    while before != (before := of_workers()):  # until all have gone to sleep
        time.sleep(0.05)
    for _ in range(20):
        assert torch.equal(ops.linear(x, weight), expected)
        time.sleep(0.002)
    return sum(after > before[task] for task, after in of_workers().items())

torch.set_num_threads(1)
_cpu.set_threads(1)
ops = CpuOps()
weight, x = ops.pack_linear(torch.randn(500, 300)), torch.randn(8, 300)
expected = ops.linear(x, weight)
before = switches()
_cpu.set_threads(5)
ops.linear(x, weight)
workers = switches().keys() - before.keys()
woken = []
for count in (5, 2, 1, 3):
    _cpu.set_threads(count)
    ops.linear(x, weight)
    woken.append(workers_woken())
print(len(workers), *woken)
"""


def test_workers_that_are_too_many_rest_until_the_pool_grows_again() -> None:
    done = python(RESIZED)
    assert (done.stdout, done.returncode) == ("4 4 1 0 2\n", 0), done.stderr


FORK = """
import os, torch
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.ops import CpuOps
_cpu.set_threads(3)
ops = CpuOps()
weight, x = ops.pack_linear(torch.randn(500, 300)), torch.randn(8, 300)
before = ops.linear(x, weight)
child = os.fork()
same = torch.equal(ops.linear(x, weight), before) and _cpu.threads() == 3
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("both")
"""


def test_a_forked_child_computes_and_both_exit() -> None:
    """A child has none of its parent's threads; a pool that waited for them would hang."""
    done = python(FORK)
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr
