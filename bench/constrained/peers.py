"""Decoding where weights are larger than memory: ours, llama.cpp, transformers, under one limit.

    python bench/constrained/peers.py PACKED --model FOLDER --memory SIZE [--batch 1 64]
        [--prompt 32] [--tokens 16] [--seconds 20] [--late 150] [--threads 2] [--home PEERS]
        [--json FILE]

PACKED is FOLDER's copy in int8 (`moeserve quantize --packed --scheme int8`), FOLDER a checkpoint
with ``gguf/q8_0.gguf`` beside it (`bench/models/to_gguf.py`). Each runs by itself in a control
group whose limit is the budget, page cache included: ours with ``--memory``, llama.cpp with its
file mapped, transformers with what accelerate keeps on disk. Pages that the system holds of these
files are dropped before each, for they would be charged to nobody; where some stay, the row says so
and counts for nothing. The same prompts, greedy: one token to warm up, then rounds of as many as
fit into so many seconds, at least two; the best round counts. A peer that is not installed, or that
the kernel ends for want of memory, or that is late, is a row that says so. ``--json`` is written
anew after every row.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cap import MemoryCap
from soak import size

from moeserve.bench.generation import Case, prompts
from moeserve.bench.workers import Worker
from moeserve.errors import ConfigError, MoeserveError

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "peers"
HOME = Path.home() / ".cache" / "moeserve-bench" / "peers"
KV_BLOCK = 16
# Of files, what may have stayed in the page cache.
MOST_CACHED = 16 << 20


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    command: tuple[str, ...]
    needs: Path


@dataclass(frozen=True, slots=True)
class Row:
    """``decode`` is generated tokens per second, 0 where ``problem`` says why there is none.
    ``peak`` are the bytes that were charged to the group, ``load_s`` until the first answer could
    be asked for, ``steps`` those of the round that counts."""

    name: str
    batch: int
    decode: float
    peak: int
    reclaims: int
    load_s: float = 0.0
    steps: int = 0
    problem: str = ""


def contenders(args: argparse.Namespace, batch: int, scratch: Path) -> Iterator[Contender]:
    longest = -(-(args.prompt + args.tokens + 2) // KV_BLOCK) * KV_BLOCK
    options = {
        "model": str(args.packed),
        "memory": args.memory,
        "num_blocks": batch * longest // KV_BLOCK + 2,
        "threads": args.threads,
        "max_model_len": longest,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(batch, 128),
        "prefix_cache": False,
    }
    ours = (sys.executable, str(HERE / "streamed_worker.py"), json.dumps(options))
    yield Contender("moeserve int8", ours, args.packed)
    threads, home = str(args.threads), args.home
    python, file = home / "llamacpp/bin/python", args.model / "gguf/q8_0.gguf"
    sizes = (str(batch * longest), str(batch))
    words = (str(python), str(PEERS / "llamacpp_worker.py"), str(file), threads, *sizes)
    yield Contender("llama.cpp Q8_0", words, python if file.exists() else file)
    python = home / "transformers/bin/python"
    kept = args.memory * 3 // 10  # beside the process, a layer that is being read, and KV
    script = str(PEERS / "transformers_worker.py")
    words = (str(python), script, str(args.model), threads, str(kept), str(scratch))
    yield Contender("transformers bf16", words, python)


def drop_pages(*folders: Path) -> int:
    """Bytes of these files that the system holds all the same, because others use them."""
    left = 0
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += cached_bytes(opened.fileno())
    return left


def cached_bytes(descriptor: int) -> int:
    """Of a file, what is in the page cache."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        found = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first
    if found:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def measure(args: argparse.Namespace, one: Contender, batch: int, log: Path) -> Row:
    if not one.needs.exists():
        return Row(one.name, batch, 0.0, 0, 0, problem=f"absent: no {one.needs}")
    asked = [list(p) for p in prompts(Case(batch, args.prompt, args.tokens), args.vocab)]
    cached = drop_pages(args.packed, args.model)
    if cached > MOST_CACHED:
        return Row(one.name, batch, 0.0, 0, 0, problem=f"{cached} bytes stay in the page cache")
    with ExitStack() as stack:
        cap = MemoryCap.open(args.memory, "peer")
        if cap is None:
            raise ConfigError("no memory limit can be set here: run as root with cgroups of v1")
        stack.enter_context(cap)
        best, steps, loaded, problem = 0.0, 0, 0.0, ""
        try:
            command, begun = cap.command(one.command), time.monotonic()
            worker = stack.enter_context(
                Worker(one.name, command, cpus=args.threads, log=log, deadline=args.late)
            )
            loaded = time.monotonic() - begun
            best, steps = best_round(worker, asked, args)
        except MoeserveError as failed:
            problem = "ended for want of memory" if cap.killed else failed.message[:300]
        found = round(best, 3), cap.peak, cap.reclaims, round(loaded, 1), steps, problem
        return Row(one.name, batch, *found)


def best_round(
    worker: Worker, asked: list[list[int]], args: argparse.Namespace
) -> tuple[float, int]:
    """Tokens per second, and how many steps that round had. A step's prompt counts for nothing."""

    def decode(tokens: int) -> dict[str, Any]:
        return worker.request("decode", deadline=args.late, prompts=asked, tokens=tokens)

    begun = time.monotonic()
    first = decode(1)["seconds"]
    steps = max(2, min(args.tokens, int(args.seconds / 2 / max(first, 1e-3))))
    best = 0.0
    while not best or time.monotonic() < begun + args.seconds:
        done = decode(steps)
        best = max(best, done["tokens"] / done["seconds"])
    return best, steps


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for batch in args.batch:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            for one in contenders(args, batch, Path(scratch)):
                if args.only and not one.name.startswith(tuple(args.only)):
                    continue
                yield measure(args, one, batch, Path(scratch) / "worker.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--memory", type=size, required=True, help="the budget, such as 700MiB")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each, once it is loaded")
    parser.add_argument("--late", type=float, default=150.0, help="seconds to load, or for a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names begin so")
    parser.add_argument("--home", type=Path, default=HOME, help=f"of the peers' venvs [{HOME}]")
    parser.add_argument("--scratch", type=Path, help="a folder on disk, for what is kept there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    args = parser.parse_args()
    args.vocab = json.loads((args.packed / "config.json").read_text())["vocab_size"]
    found = []
    for row in rows(args):
        found.append(asdict(row))
        print(json.dumps(found[-1]), flush=True)
        if args.json is not None:
            asked = {key: str(value) for key, value in vars(args).items()}
            args.json.write_text(json.dumps({"asked": asked, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
