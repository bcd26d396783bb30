"""Decoding where weights are larger than memory: ours, llama.cpp, transformers, under one limit.

    python bench/constrained/peers.py PACKED --model FOLDER --memory SIZE [--batch 1 64]
        [--prompt 32] [--tokens 16] [--rounds 2] [--threads 2] [--home PEERS] [--json FILE]

PACKED is FOLDER's copy in int8 (`moeserve quantize --packed --scheme int8`), FOLDER a checkpoint
with ``gguf/q8_0.gguf`` beside it (`bench/models/to_gguf.py`). Each runs by itself in a control
group whose limit is the budget, page cache included: ours with ``--memory``, llama.cpp with its
file mapped, transformers with what accelerate keeps on disk. Pages that the system holds of these
files are dropped before each, for they would be charged to nobody. The same prompts, greedy; the
best of so many rounds counts, each after a few tokens to warm up. A peer that is not installed, or
that the kernel ends for want of memory, is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from cap import MemoryCap
from soak import size

from moeserve.bench.generation import Case, prompts
from moeserve.bench.workers import Worker
from moeserve.errors import ConfigError, MoeserveError

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "peers"
HOME = Path.home() / ".cache" / "moeserve-bench" / "peers"
LATE_S = 1200.0
WARM_TOKENS = 2
KV_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    command: tuple[str, ...]
    needs: Path


@dataclass(frozen=True, slots=True)
class Row:
    """``decode`` is generated tokens per second, 0 where ``problem`` says why there is none.
    ``peak`` are the bytes that were charged to the group."""

    name: str
    batch: int
    decode: float
    peak: int
    reclaims: int
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


def drop_pages(*folders: Path) -> None:
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(args: argparse.Namespace, one: Contender, batch: int, log: Path) -> Row:
    if not one.needs.exists():
        return Row(one.name, batch, 0.0, 0, 0, f"absent: no {one.needs}")
    asked = [list(p) for p in prompts(Case(batch, args.prompt, args.tokens), args.vocab)]
    drop_pages(args.packed, args.model)
    with ExitStack() as stack:
        cap = MemoryCap.open(args.memory, "peer")
        if cap is None:
            raise ConfigError("no memory limit can be set here: run as root with cgroups of v1")
        stack.enter_context(cap)
        best, problem = 0.0, ""
        try:
            command = cap.command(one.command)
            worker = stack.enter_context(
                Worker(one.name, command, cpus=args.threads, log=log, deadline=LATE_S)
            )
            for tokens in (WARM_TOKENS, *[args.tokens] * args.rounds):
                done = worker.request("decode", deadline=LATE_S, prompts=asked, tokens=tokens)
                if tokens == args.tokens:
                    best = max(best, done["tokens"] / done["seconds"])
        except MoeserveError as failed:
            problem = "ended for want of memory" if cap.killed else failed.message[:300]
        return Row(one.name, batch, round(best, 3), cap.peak, cap.reclaims, problem)


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
    parser.add_argument("--rounds", type=int, default=2)
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
