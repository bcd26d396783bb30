"""What the kernel lets us use, read from machines made of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.host import Cpu, Memory, read_cpu, read_memory

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB >> 10} kB\n"
V1 = (
    "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert read_memory(machine(tmp_path, {})) == Memory(16 * GIB, 12 * GIB, None)


def test_version_1_limit_counts_dropped_page_cache_as_available(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/mountinfo": V1,
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_memory(root) == Memory(16 * GIB, 6 * GIB, 8 * GIB)
    assert read_cpu(root).quota == 1.5


def test_version_2_takes_the_tightest_group_on_the_way_up(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/outer/cpu.max": "max 100000\n",
        },
    )
    assert read_memory(root) == Memory(16 * GIB, 3 * GIB, 4 * GIB)
    assert read_cpu(root).quota == 0.5


def test_in_a_container_the_group_outside_of_the_mount_reads_as_the_mount(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/host/only/path\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        },
    )
    assert read_memory(root) == Memory(16 * GIB, 0, 2 * GIB)


def test_the_processor_is_named_with_its_flags(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel name\t: A Fine Core\nflags\t\t: fma avx2\n\nprocessor\t: 1\n"
    cpu = read_cpu(machine(tmp_path, {"proc/cpuinfo": text}))
    assert (cpu.model, cpu.flags) == ("A Fine Core", frozenset({"fma", "avx2"}))


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (0.5, 1), (2.9, 2), (64.0, 8)])
def test_usable_threads_are_the_smaller_of_cores_and_quota(
    quota: float | None, usable: int
) -> None:
    assert Cpu("any", frozenset(), 8, quota).usable == usable


@given(lines=st.lists(st.text(st.characters(codec="ascii"), max_size=40), max_size=5))
def test_any_cpuinfo_is_read(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    root = machine(tmp_path_factory.mktemp("host"), {"proc/cpuinfo": "\n".join(lines)})
    assert read_cpu(root).model


def test_this_machine_has_memory_and_a_core() -> None:
    memory, cpu = read_memory(), read_cpu()
    assert 0 < memory.available <= memory.total
    assert cpu.usable >= 1
