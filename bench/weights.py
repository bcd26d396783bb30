"""How soon a new peer is ready, by where its weights come from: seconds, and what it says itself.

    python bench/weights.py [MODEL] [--rounds 3] [--ways WAY ...] [--json FILE]

A gateway, a cache member, and a peer that has read MODEL and put it into the cache. Then a new peer
starts, again and again, in turn

    cold disk     from a copy of the folder whose pages were dropped from memory before
    warm disk     from that copy, when it lies in memory
    auto          from a cold copy, or where a measurement says that it is faster
    members       from the first peer and the cache, over loopback gRPC, into memory
    cache         the same, when the first peer has left

``ready`` is from the start of the process until it says so: interpreter and imports, which
``start`` measures by a peer of the demo model, are in it. ``weights`` is what the peer logs of the
way of its weights. The copy is on the disk that holds the temporary files (TMPDIR).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 300.0
DEFAULT = Path.home() / ".cache/moeserve-bench/models/qwen3-moe-1.2b"
WAYS = ["start", "cold disk", "warm disk", "auto", "members"]
PEER = {"NUM_BLOCKS": "64", "MAX_MODEL_LEN": "512", "LOG_LEVEL": "info"}


@dataclass
class Part:
    """A process, what it printed and when it was ready."""

    process: subprocess.Popen[str]
    began: float
    lines: list[str] = field(default_factory=list)

    def said(self, pattern: str) -> str:
        """Reads on until a line matches; its first group."""
        assert self.process.stdout is not None
        for line in self.lines:
            if found := re.search(pattern, line):
                return found.group(1)
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found.group(1)
        raise SystemExit("a part ended: " + "".join(self.lines[-20:]))

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=PATIENCE_S)


def start(what: str, **settings: str) -> Part:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MOESERVE_")}
    known = {} if what == "gateway" or settings.get("role") == "cache" else PEER
    ours = known | {key.upper(): value for key, value in settings.items()}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "moeserve.worker.cluster_command", what],
        env=environ | {f"MOESERVE_{key}": value for key, value in ours.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Part(process, began)


def drop(folder: Path) -> None:
    """The folder's pages from the kernel's memory."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """The folder's pages into the kernel's memory."""
    for file in filter(Path.is_file, folder.iterdir()):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def timed(join: str, **settings: str) -> tuple[float, str]:
    """Seconds until it is ready, and what it says of its weights."""
    part = start("peer", role="decode", join=join, **settings)
    part.said(r"(ready: )")
    took = time.perf_counter() - part.began
    said = [line.partition("weights: ")[2].strip() for line in part.lines if "weights: " in line]
    part.end()
    return took, "; ".join(said)


def rounds_of(copy: Path, join: str, rounds: int, ways: list[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            settings = {"model": str(copy)}
            if way in ("members", "cache"):
                settings = {"weights": "pool"}
            elif way == "auto":
                settings["weights"] = "auto"
            elif way == "start":
                settings["model"] = "demo"
            warm(copy) if way == "warm disk" else drop(copy)
            took, said = timed(join, **settings)
            found[way].append(took)
            print(f"{way:10} ready {took:6.2f} s  weights: {said}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Asked to end, it still ends its parts and removes the copy.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    files = [file for file in args.model.iterdir() if file.is_file()]
    nbytes = sum(file.stat().st_size for file in files)
    running: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="moeserve-weights-bench-") as scratch:
        copy = Path(scratch) / args.model.name
        copy.mkdir()
        for file in files:
            shutil.copy(file, copy)
        try:
            gateway = start("gateway", http_port="0", grpc_port="0", model=str(args.model))
            running.append(gateway)
            join = gateway.said(r"registry: (\S+)")
            cache = start("peer", role="cache", join=join, cache_memory=str(3 * nbytes))
            running.append(cache)
            cache.said("(ready: )")
            warm(args.model)
            first = start("peer", role="decode", join=join, weights="auto", model=str(args.model))
            running.append(first)
            print(first.said(r"(weights: .* new to the cache pool)"), flush=True)
            found = rounds_of(copy, join, args.rounds, args.ways)
            running.remove(first)
            first.end()
            found |= rounds_of(copy, join, args.rounds, ["cache"])
        finally:
            for part in running:
                part.end()
    table = {way: statistics.median(times) for way, times in found.items()}
    for way, middle in table.items():
        print(f"{way:10} {middle:6.2f} s   {min(found[way]):.2f} to {max(found[way]):.2f}")
    if args.json:
        args.json.write_text(json.dumps({"nbytes": nbytes, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
