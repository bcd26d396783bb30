"""Decoding where weights are large: ours, llama.cpp, transformers, under one limit or without.

    python bench/constrained/peers.py PACKED [--model FOLDER] [--gguf FILE] [--memory SIZE]
        [--batch 1 64] [--prompt 32] [--tokens 16] [--prefill N] [--seconds 20] [--late 150]
        [--total S] [--threads 2] [--home PEERS] [--json FILE]

PACKED is a checkpoint's packed copy, FILE what llama.cpp reads of it (FOLDER/gguf/q8_0.gguf;
`bench/models/to_gguf.py`, `make_q4_k_m.py`); transformers reads FOLDER, and is left out without.

With ``--memory`` each runs by itself in a control group whose limit is the budget, page cache
included: ours with ``--memory``, llama.cpp with its file mapped and its weights as they are there,
transformers with what accelerate keeps on disk, each anew for every batch. Pages that the system
holds of these files are dropped before each, for they would be charged to nobody; where some stay,
the row says so and counts for nothing. Without it ours and llama.cpp map their files, which are
read before they start; one process has all batches. The same prompts, greedy: one token to warm up,
then rounds of as many as fit into so many seconds, at least two tokens; the best round counts. With
``--prefill`` a row more has the rate of one prompt of so many tokens. A peer that is not installed,
or that the kernel ends for want of memory, or that is late, is a row that says so, and so is what
is not begun after ``--total`` seconds. ``--json`` is written anew after every row.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cap import MemoryCap
from soak import size

from moeserve.bench.generation import Case, prompts
from moeserve.bench.workers import Worker, peak_bytes
from moeserve.errors import ConfigError, MoeserveError
from moeserve.models.packed.layout import read_packed_header

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "peers"
HOME = Path.home() / ".cache" / "moeserve-bench" / "peers"
KV_BLOCK = 16
# Of files, what may have stayed in the page cache.
MOST_CACHED = 16 << 20
PIECE = 16 << 20


@dataclass(frozen=True, slots=True)
class Contender:
    """``reads`` has its weights, a file or a folder; without ``needs`` it is absent."""

    name: str
    command: tuple[str, ...]
    needs: Path
    reads: Path


@dataclass(frozen=True, slots=True)
class Row:
    """``decode`` is generated tokens per second, or ``prefill`` those of a prompt; both 0 where
    ``problem`` says why. ``peak`` are the bytes that were charged to the group, or without one the
    most that was resident, mapped pages included; ``load_s`` until the first answer could be asked
    for, ``steps`` those of the round that counts."""

    name: str
    batch: int
    decode: float = 0.0
    peak: int = 0
    reclaims: int = 0
    load_s: float = 0.0
    steps: int = 0
    problem: str = ""
    prefill: float = 0.0


def contenders(args: argparse.Namespace, batch: int, scratch: Path) -> Iterator[Contender]:
    """With room for so many requests at once."""
    longest = -(-(args.prompt + args.tokens + 2) // KV_BLOCK) * KV_BLOCK
    whole = max(longest, -(-(args.prefill + 2) // KV_BLOCK) * KV_BLOCK)
    context = max(batch * longest, whole)
    options = {
        "model": str(args.packed),
        "memory": args.memory,
        "num_blocks": context // KV_BLOCK + 2,
        "threads": args.threads,
        "max_model_len": whole,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(batch, 128, args.prefill),
        "prefix_cache": False,
    }
    ours = (sys.executable, str(HERE / "streamed_worker.py"), json.dumps(options))
    scheme = read_packed_header(args.packed).options.quantization
    yield Contender(f"moeserve {scheme}", ours, args.packed, args.packed)
    threads, home, file = str(args.threads), args.home, args.gguf
    if file is not None:
        python, script = home / "llamacpp/bin/python", PEERS / "llamacpp_worker.py"
        sizes = (str(context), str(batch))
        mapped = () if args.memory is None else ("mapped",)  # a copy would not fit
        words = (str(python), str(script), str(file), threads, *sizes, *mapped)
        kind = file.stem.upper()
        yield Contender(f"llama.cpp {kind}", words, python if file.exists() else file, file)
    if args.memory is not None and args.model is not None:
        python = home / "transformers/bin/python"
        kept = args.memory * 3 // 10  # beside the process, a layer that is being read, and KV
        script = PEERS / "transformers_worker.py"
        words = (str(python), str(script), str(args.model), threads, str(kept), str(scratch))
        yield Contender("transformers bf16", words, python, args.model)


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))


def drop_pages(paths: Iterable[Path]) -> int:
    """Bytes of these files that the system holds all the same, because others use them."""
    left = 0
    for file in files_of(paths):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += cached_bytes(opened.fileno())
    return left


def read_pages(path: Path) -> None:
    """So that none of its files is read from disk while it is measured, as far as memory allows."""
    for file in files_of([path]):
        with file.open("rb", buffering=0) as opened:
            while opened.read(PIECE):
                pass


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


def measure(
    args: argparse.Namespace, one: Contender, batches: Sequence[int], log: Path
) -> Iterator[Row]:
    """Of one process."""
    problem = set_pages(args, one)
    if problem:
        yield from (Row(one.name, batch, problem=problem) for batch in batches)
        return
    with ExitStack() as stack:
        cap, command = None, one.command
        if args.memory is not None:
            cap = MemoryCap.open(args.memory, "peer")
            if cap is None:
                raise ConfigError("no memory limit can be set here: run as root with cgroups of v1")
            stack.enter_context(cap)
            command = cap.command(command)
        left, loaded = list(batches), 0.0
        try:
            begun = time.monotonic()
            worker = stack.enter_context(
                Worker(one.name, command, cpus=args.threads, log=log, deadline=left_s(args))
            )
            loaded = round(time.monotonic() - begun, 1)
            if args.prefill:
                rate = prefill_rate(worker, args)
                yield Row(one.name, 1, 0.0, *taken(cap, worker), loaded, prefill=round(rate, 3))
            for batch in batches:
                asked = [list(p) for p in prompts(Case(batch, args.prompt, 1), args.vocab)]
                best, steps = best_round(worker, asked, args)
                left.remove(batch)
                yield Row(one.name, batch, round(best, 3), *taken(cap, worker), loaded, steps)
        except MoeserveError as failed:
            killed = cap is not None and cap.killed
            problem = "ended for want of memory" if killed else failed.message[:300]
            peak, reclaims = (0, 0) if cap is None else (cap.peak, cap.reclaims)
            for batch in left:
                yield Row(one.name, batch, 0.0, peak, reclaims, loaded, problem=problem)


def set_pages(args: argparse.Namespace, one: Contender) -> str:
    """Drops what is in memory of all contenders' files; without a limit this one's are read.
    What stands against measuring it, if something does."""
    if time.monotonic() > args.until:
        return "not begun: --total is over"
    if not one.needs.exists():
        return f"absent: no {one.needs}"
    paths = {args.packed, args.model, args.gguf} - {None}
    cached = drop_pages(paths if args.memory is not None else paths - {one.reads})
    if args.memory is None:
        read_pages(one.reads)
    elif cached > MOST_CACHED:
        return f"{cached} bytes stay in the page cache"
    return ""


def left_s(args: argparse.Namespace) -> float:
    """Seconds that a worker may take for what it is asked now."""
    return float(max(1.0, min(args.late, args.until - time.monotonic())))


def taken(cap: MemoryCap | None, worker: Worker) -> tuple[int, int]:
    """Peak and reclaims of a ``Row``."""
    return (peak_bytes(worker.pid), 0) if cap is None else (cap.peak, cap.reclaims)


def prefill_rate(worker: Worker, args: argparse.Namespace) -> float:
    """Tokens per second of one prompt, the best of as many as fit into the time, after one that is
    not counted."""
    asked = [list(p) for p in prompts(Case(1, args.prefill, 1), args.vocab)]
    worker.request("prefill", deadline=left_s(args), prompts=asked)
    best, begun = 0.0, time.monotonic()
    while not best or time.monotonic() < begun + args.seconds:
        done = worker.request("prefill", deadline=left_s(args), prompts=asked)
        best = max(best, done["tokens"] / done["seconds"])
    return best


def best_round(
    worker: Worker, asked: list[list[int]], args: argparse.Namespace
) -> tuple[float, int]:
    """Tokens per second, and how many steps that round had. A step's prompt counts for nothing."""

    def decode(tokens: int) -> dict[str, Any]:
        return worker.request("decode", deadline=left_s(args), prompts=asked, tokens=tokens)

    begun = time.monotonic()
    first = decode(1)["seconds"]
    steps = max(2, min(args.tokens, int(args.seconds / 2 / max(first, 1e-3))))
    best = 0.0
    while not best or time.monotonic() < begun + args.seconds:
        done = decode(steps)
        best = max(best, done["tokens"] / done["seconds"])
    return best, steps


def rows(args: argparse.Namespace) -> Iterator[Row]:
    groups = [args.batch] if args.memory is None else [[batch] for batch in args.batch]
    for batches in groups:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            for one in contenders(args, max(batches), Path(scratch)):
                if args.only and not one.name.startswith(tuple(args.only)):
                    continue
                yield from measure(args, one, batches, Path(scratch) / "worker.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--model", type=Path, help="the checkpoint")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp [MODEL/gguf/q8_0.gguf]")
    parser.add_argument("--memory", type=size, help="the budget, such as 700MiB [no limit]")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt by itself")
    parser.add_argument("--total", type=float, default=3600.0, help="seconds, of all that begins")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each, once it is loaded")
    parser.add_argument("--late", type=float, default=150.0, help="seconds to load, or for a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names begin so")
    parser.add_argument("--home", type=Path, default=HOME, help=f"of the peers' venvs [{HOME}]")
    parser.add_argument("--scratch", type=Path, help="a folder on disk, for what is kept there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    args = parser.parse_args()
    args.vocab = json.loads((args.packed / "config.json").read_text())["vocab_size"]
    args.until = time.monotonic() + args.total
    if args.gguf is None and args.model is not None:
        args.gguf = args.model / "gguf/q8_0.gguf"
    found = []
    for row in rows(args):
        found.append(asdict(row))
        print(json.dumps(found[-1]), flush=True)
        if args.json is not None:
            asked = {  # folders by their names: where they lie is nobody's matter
                key: value.name if isinstance(value, Path) else str(value)
                for key, value in vars(args).items()
            }
            args.json.write_text(json.dumps({"asked": asked, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
