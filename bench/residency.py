"""Which memory of use keeps the right experts: recorded routing, replayed through the policy.

    python bench/residency.py ROUTING.npz [...] [--batch 1 4] [--share 0.15 0.3 0.6]
                              [--half-life 4 8 12 16 32 64] [--steps 500] [--json FILE]

Files are as for ``moeserve place``, with each token's choices. So many sequences at once are
decoded, a token each in a step; those that end give way to others, of all files mixed. A layer's
experts that have no slot are missed, and placed by ``Residency`` with each half-life. Given are the
misses of what is needed, without the first steps. Exact: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moeserve.offload.residency import EMPTY, Residency
from moeserve.placement.formats.routing_files import read_all
from moeserve.placement.routing import Routing

LONGEST = 150  # tokens of a sequence; what is longer is taken for several
SHORTEST = 8
WARM = 100  # steps that do not count
Sequence_TLC = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """``missed`` is a share of the experts that were needed."""

    batch: int
    share: float
    half_life: float
    missed: float


def sequences_in(routing: Routing) -> list[Sequence_TLC]:
    found = []
    for workload in routing.workloads:
        ends = np.cumsum(workload.lengths)
        for begin, end in zip(ends - workload.lengths, ends, strict=True):
            of_one = workload.tokens[begin:end]
            found += [of_one[at : at + LONGEST] for at in range(0, len(of_one), LONGEST)]
    return [one for one in found if len(one) >= SHORTEST]


def steps_of(pool: Sequence[Sequence_TLC], batch: int, steps: int) -> Iterator[Sequence_TLC]:
    """[layers, batch x choices] of each step."""
    draw = random.Random(1)
    order = draw.sample(range(len(pool)), len(pool))
    running = [(order[n % len(order)], 0) for n in range(batch)]
    running = [(n, draw.randrange(len(pool[n]))) for n, _ in running]  # not all end at once
    following = batch
    for _ in range(steps):
        rows = []
        for b, (n, at) in enumerate(running):
            if at >= len(pool[n]):
                n, at, following = order[following % len(order)], 0, following + 1
            rows.append(pool[n][at])
            running[b] = n, at + 1
        yield np.concatenate(rows, axis=1)


def missed(policy: Residency, steps: Iterator[Sequence_TLC]) -> float:
    needed = missing = 0
    for number, step_LC in enumerate(steps):
        policy.begin_step()
        for layer, chosen in enumerate(step_LC):
            experts = np.unique(chosen).astype(np.int64)
            policy.use(layer, experts)
            there = policy.slot_LE[layer, experts] != EMPTY
            held = policy.slot_LE[layer, experts[there]].copy()
            policy.hold(held)
            placed = policy.place(layer, experts[~there].tolist(), layer)
            policy.release(held)
            policy.release(placed)
            if number >= WARM:
                needed, missing = needed + len(experts), missing + int((~there).sum())
    return missing / needed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="ROUTING.npz")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--share", type=float, nargs="+", default=[0.15, 0.3, 0.6])
    parser.add_argument("--half-life", type=float, nargs="+", default=[4, 8, 12, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    args = parser.parse_args()
    pool = sequences_in(read_all([str(file) for file in args.files]))
    layers, experts = pool[0].shape[1], 1 + max(int(one.max()) for one in pool)
    table, rows = Table("requests", "room", *(f"{h:g}" for h in args.half_life)), list[Row]()
    for batch in args.batch:
        for share in args.share:
            found = []
            for half_life in args.half_life:
                slots = int(share * experts * layers)
                policy = Residency([experts] * layers, slots, half_life=half_life)
                share_missed = missed(policy, steps_of(pool, batch, args.steps))
                found.append(Row(batch, share, half_life, share_missed))
            table.add_row(str(batch), f"{share:.0%}", *(f"{row.missed:.1%}" for row in found))
            rows += found
    Console().print(table)
    if args.json is not None:
        names = [file.name for file in args.files]
        told = {"files": names, "steps": args.steps, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
