"""What the kernel and its control groups let this process use: cores and memory.

Reads ``/proc`` and ``/sys``, both cgroup versions; whatever is absent reads as None, and where
there is no ``/proc`` at all (not on Linux) ``os`` and ``platform`` answer. ``root`` is a parameter
so that a test can be a machine. Sizes are bytes.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 says "no limit" with the largest page-aligned int64.
UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """``available`` is what this process may still take: by the machine and by its limit."""

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Cpu:
    """``cores`` may be scheduled on (affinity); ``quota`` is the cgroup's share in cores."""

    model: str
    flags: frozenset[str]
    cores: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


def read_memory(root: Path = Path("/")) -> Memory:
    """Without ``/proc/meminfo`` (not on Linux) what ``sysconf`` says of the machine: pages in all,
    and those that are free where that is known, else all."""
    meminfo = _text(root / "proc/meminfo")
    if meminfo is None:
        return _memory_by_sysconf()
    sizes = {}
    for line in meminfo.splitlines():
        name, value = line.split(":")
        sizes[name] = int(value.split()[0]) * (1024 if value.endswith("kB") else 1)
    available = sizes.get("MemAvailable", sizes.get("MemFree", 0))
    limit: int | None = None
    for group, names in _groups(root, "memory"):
        most = _number(group / names[0])
        if most is None or most >= UNLIMITED:
            continue
        limit = most if limit is None else min(limit, most)
        used = (_number(group / names[1]) or 0) - _reclaimable(group)
        available = min(available, max(0, most - used))
    return Memory(sizes["MemTotal"], available, limit)


def _memory_by_sysconf() -> Memory:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    free = os.sysconf("SC_AVPHYS_PAGES") if known else pages
    return Memory(page * pages, page * free, None)


def read_cpu(root: Path = Path("/")) -> Cpu:
    quota: float | None = None
    for group, _ in _groups(root, "cpu"):
        share = _cpu_share(group)
        if share is not None:
            quota = share if quota is None else min(quota, share)
    model, flags = _cpuinfo(root)
    return Cpu(model, flags, len(allowed_cores()), quota)


def allowed_cores() -> list[int]:
    """Numbers of the cores that this process may run on, ascending; where the system does not say
    (it is not Linux), all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def read_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache that the first core has a part in; 0 where it is not said."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        said = (_text(file) or "").strip()
        if said[:-1].isdigit() and said[-1] in units:
            sizes.append(int(said[:-1]) * units[said[-1]])
    return max(sizes)


def _cpuinfo(root: Path) -> tuple[str, frozenset[str]]:
    fields: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or fields.get("CPU part") or platform.machine()
    return model, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _cpu_share(group: Path) -> float | None:
    both = (_text(group / "cpu.max") or "").split()
    if len(both) == 2 and both[0].isdigit():
        return int(both[0]) / int(both[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _reclaimable(group: Path) -> int:
    """Page cache the kernel drops before it refuses memory; version 1 counts below as total_."""
    lines = (_text(group / "memory.stat") or "").splitlines()
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _groups(root: Path, controller: str) -> list[tuple[Path, tuple[str, str]]]:
    """Every group that binds this process, innermost first, with its limit and usage files."""
    version1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    version2 = ("memory.max", "memory.current")
    found = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in _mounts(root, controller if controllers else None):
            names = version1 if controllers else version2
            # Inside a container the path may name a group outside of what is mounted.
            inner = mount / path.lstrip("/")
            start = inner if inner.is_dir() else mount
            found += [
                (group, names)
                for group in (start, *start.parents)
                if mount in (group, *group.parents)
            ]
    return found


def _mounts(root: Path, controller: str | None) -> list[Path]:
    """Where the controller (None: version 2) is mounted, once."""
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, dash, after = line.partition(" - ")
        if not dash:
            continue
        kind, _, options = after.split(" ", 2)
        ours = (
            kind == "cgroup2"
            if controller is None
            else (kind == "cgroup" and controller in options.split(","))
        )
        if ours:
            return [root / before.split()[4].lstrip("/")]
    return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.lstrip("-").isdigit() else None
