"""What late tables cost: waiting at an instance's doors beside one queue with exact knowledge.

    python bench/admission.py --data FOLDER [--trace azure mooncake llmservingsim] [--ranks 4 8 32]
                              [--load 0.7 0.95] [--fronts 1 4] [--requests N] [--age 1] [--json]

Replays published traces (see bench/homes/traces.py) through production schedulers without a model,
in simulated time: a step takes ``--base-ms`` and ``--per-token-us`` for each token of the busiest
rank, for ranks run in lock-step. A request waits from its arrival until it is first in a step.
Arrivals are stretched so that their mean rate is ``--load`` of what the instance can do, which is
measured with all requests there from the beginning. ``ratio`` is the total waiting over that of the
exact policy; tables that doors see are ``--age`` steps old.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from homes.instances import ExactInstance, FrontedInstance, Instance, RankSize
from homes.traces import TRACES, Trace, TracedRequest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.ranks.homes import LeastWork


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds."""

    base: float
    per_token: float

    def of(self, tokens: int) -> float:
        return self.base + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class Replay:
    """``waited`` seconds in order of arrival; ``ended`` when each request did, sorted."""

    waited: Sequence[float]
    ended: Sequence[float]
    steps: int


@dataclass(frozen=True, slots=True)
class Row:
    """Waiting in seconds. ``fronts`` 0 is the exact policy. ``given_back`` requests changed home;
    ``hits`` is the share of prompt tokens found in caches."""

    trace: str
    ranks: int
    load: float
    fronts: int
    requests: int
    total: float
    p99: float
    ratio: float
    steps: int
    preemptions: int
    given_back: int
    hits: float


def replay(
    instance: Instance,
    trace: Trace,
    requests: Sequence[tuple[float, TracedRequest]],
    step: StepTime,
) -> Replay:
    """Requests by arrival, until all have ended."""
    now, steps, upcoming = 0.0, 0, 0
    waited = [0.0] * len(requests)
    ended: list[float] = []
    while upcoming < len(requests) or instance.has_work:
        if not instance.has_work:
            now = max(now, requests[upcoming][0])
        while upcoming < len(requests) and requests[upcoming][0] <= now:
            arrival, traced = requests[upcoming]
            instance.arrive(trace.request(upcoming, traced, arrival))
            upcoming += 1
        planned = instance.plan()
        for request_id in planned.started:
            waited[int(request_id)] = now - requests[int(request_id)][0]
        now += step.of(planned.busiest)
        steps += 1
        ended += [now] * len(instance.apply())
    return Replay(waited, ended, steps)


def capacity(replayed: Replay) -> float:
    """Requests a second while all ranks are busy: from a tenth of the requests to eight tenths."""
    first, last = len(replayed.ended) // 10, len(replayed.ended) * 8 // 10
    return (last - first) / (replayed.ended[last] - replayed.ended[first])


def stretched(requests: Sequence[TracedRequest], rate: float) -> list[tuple[float, TracedRequest]]:
    """With arrivals at this mean rate, their pattern kept."""
    span = requests[-1].arrival - requests[0].arrival
    factor = (len(requests) - 1) / rate / span
    return [((r.arrival - requests[0].arrival) * factor, r) for r in requests]


def row_of(
    trace: Trace, ranks: int, load: float, instance: Instance, replayed: Replay, exact: float
) -> Row:
    counters, total = instance.counters, sum(replayed.waited)
    fronted = isinstance(instance, FrontedInstance)
    return Row(
        trace=trace.name,
        ranks=ranks,
        load=load,
        fronts=len(instance.fronts) if fronted else 0,
        requests=len(replayed.waited),
        total=total,
        p99=float(np.percentile(replayed.waited, 99)),
        ratio=total / exact if exact else 1.0,
        steps=replayed.steps,
        preemptions=counters.preemptions,
        given_back=instance.given_back if fronted else 0,
        hits=counters.prefix_hit_tokens / max(1, counters.prefix_queried_tokens),
    )


def size_for(trace: Trace, args: argparse.Namespace) -> RankSize:
    config = SchedulerConfig(
        max_model_len=1 << 20,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=trace.step_tokens,
        max_queue=1 << 30,
        prefix_cache=trace.prefixes,
    )
    return RankSize(config, args.max_num_seqs * trace.blocks_per_seq, trace.block_size)


def measure(
    args: argparse.Namespace, trace: Trace, ranks: int, progress: Progress
) -> Iterable[Row]:
    """All loads and numbers of fronts of one trace over so many ranks."""
    requests = trace.requests(args.data, args.requests)
    step = StepTime(args.base_ms / 1e3, args.per_token_us / 1e6)
    size = size_for(trace, args)
    runs = 1 + len(args.load) * (1 + len(args.fronts))
    task = progress.add_task(f"{trace.name}, {ranks} ranks", total=runs)
    everything = [(0.0, r) for r in requests]
    most = capacity(replay(ExactInstance(size, ranks, LeastWork()), trace, everything, step))
    progress.advance(task)
    for load in args.load:
        arriving = stretched(requests, load * most)
        exact_instance = ExactInstance(size, ranks, LeastWork())
        replayed = replay(exact_instance, trace, arriving, step)
        exact = sum(replayed.waited)
        yield row_of(trace, ranks, load, exact_instance, replayed, exact)
        progress.advance(task)
        for fronts in args.fronts:
            instance = FrontedInstance(
                size,
                ranks,
                [LeastWork() for _ in range(min(fronts, ranks))],
                age=args.age,
                ahead=args.ahead,
                known_ends=args.known_ends,
                prefix_keys=ranks * size.num_blocks if trace.prefixes else 0,
            )
            yield row_of(
                trace, ranks, load, instance, replay(instance, trace, arriving, step), exact
            )
            progress.advance(task)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/admission.py --data traces --trace azure --ranks 8",
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the traces")
    parser.add_argument("--trace", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--load", type=float, nargs="+", default=[0.7, 0.95])
    parser.add_argument("--fronts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=2000, help="of each trace, at most")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="of each rank")
    parser.add_argument("--age", type=int, default=1, help="of tables, in steps")
    parser.add_argument("--ahead", type=int, default=1, help="requests that wait at a full rank")
    parser.add_argument(
        "--known-ends", type=float, default=0.0, help="share of answers that reach their limit"
    )
    parser.add_argument("--base-ms", type=float, default=20.0)
    parser.add_argument("--per-token-us", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows: list[Row] = []
    with Progress(console=Console(file=sys.stderr)) as progress:
        for name, ranks in product(args.trace, args.ranks):
            for row in measure(args, TRACES[name], ranks, progress):
                what = f"{row.fronts} fronts" if row.fronts else "exact"
                progress.console.print(
                    f"{name}, {ranks} ranks, load {row.load:g}, {what}: "
                    f"{row.total:.1f} s, ratio {row.ratio:.3f}"
                )
                rows.append(row)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("data", "json")}
        print(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}))
        return
    table = Table("trace", "ranks", "load", "fronts", "total s", "p99 s", "ratio", "preempted",
                  "moved", "hits")  # fmt: skip
    for r in rows:
        table.add_row(
            r.trace, str(r.ranks), f"{r.load:g}", str(r.fronts) if r.fronts else "exact",
            f"{r.total:.1f}", f"{r.p99:.2f}", f"{r.ratio:.3f}", str(r.preemptions),
            str(r.given_back), f"{r.hits:.0%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
