"""Routing: what a decision costs, and what policies are worth on published traces.

    python bench/routing.py cost [--members 10 100 1000] [--json FILE]
    python bench/routing.py replay --data FOLDER [--trace azure mooncake llmservingsim]
                                   [--members 4 16] [--load 0.7 0.9] [--requests N] [--json FILE]

``cost`` is microseconds of choosing and noting, over members whose load is drawn, half of them for
prefill and half for decode; ``pages`` is how many keys the prompt has.

``replay`` is simulated (see routing_cluster.py): ``--members`` of each kind; ``--load`` is of what
the prefill members could do without any reuse; ``pool`` is a cache pool that has whatever was
computed anywhere lately. Goodput is the share of requests within ``--ttft`` and ``--tpot`` seconds;
``computed`` the share of prompt tokens that were not found.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from homes.traces import TRACES, Trace, TracedRequest
from rich.console import Console
from rich.progress import track
from rich.table import Table
from routing_cluster import DecodeMember, PageCache, PrefillMember, SimulatedCluster, Speeds

from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms
from moeserve.pools.routing.base import Route, RouteWanted, RoutingPolicy
from moeserve.pools.routing.freeness import MostFree
from moeserve.pools.routing.kv_local import KvLocal
from moeserve.pools.routing.loads import LoadTable, PoolKind
from moeserve.pools.routing.locality_free import LocalityFree
from moeserve.pools.routing.router import note

MODEL = "a model"


class InTurn(RoutingPolicy):
    """One after the other, whatever their load: what the policies are compared with."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, wanted: RouteWanted, table: LoadTable, now: float) -> Route:
        prefills = table.pool(wanted.compute_id, PoolKind.PREFILL)
        decodes = table.pool(wanted.compute_id, PoolKind.DECODE)
        self._next += 1
        prefill, decode = prefills[self._next % len(prefills)], decodes[self._next % len(decodes)]
        return Route(decode.member, prefill.member)

    def note(self, wanted: RouteWanted, route: Route) -> None:
        """Nothing is remembered."""


POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "in_turn": InTurn,
    "locality_free": LocalityFree,
    "kv_local": KvLocal,
    "freeness": MostFree,
}


@dataclass(frozen=True, slots=True)
class CostRow:
    """Microseconds."""

    policy: str
    members: int
    pages: int
    median: float
    p99: float
    least: float


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """Seconds and shares."""

    trace: str
    members: int
    load: float
    pool: bool
    policy: str
    requests: int
    computed: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    goodput: float


def drawn_table(members: int, draw: random.Random) -> LoadTable:
    terms = ServedTerms(compute_id=MODEL, block_size=16, kv_bytes_per_token=70_000)
    table = LoadTable()
    for i in range(members):
        role = Role.PREFILL if i % 2 else Role.DECODE
        load = MemberLoad(
            1,
            running=draw.randrange(64),
            waiting_tokens=draw.randrange(20_000),
            free_blocks=draw.randrange(20_000),
            total_blocks=20_000,
            prefill_rate=8000.0,
            step_s=0.02,
        )
        table.update([Report(Member(f"m{i}", "x", role, "127.0.0.1:80", terms=terms), load)], 0.0)
    return table


def cost(name: str, members: int, pages: int, times: int) -> CostRow:
    """Prompts share a beginning with one of twenty others."""
    draw = random.Random(members)
    table, policy = drawn_table(members, draw), POLICIES[name]()
    taken = []
    for i in range(times):
        shared = draw.randrange(20)
        keys = tuple(b"%d-%d" % (shared if p < pages // 2 else 100 + i, p) for p in range(pages))
        wanted = RouteWanted(64 * pages, 200, 200, keys, compute_id=MODEL)
        began = time.perf_counter()
        route = policy.choose(wanted, table, i / 1000)
        if route is not None:
            policy.note(wanted, route)
            note(table, wanted, route, i / 1000)
        taken.append((time.perf_counter() - began) * 1e6)
    late = taken[times // 10 :]
    median, p99 = np.percentile(late, [50, 99])
    return CostRow(name, members, pages, float(median), float(p99), min(late))


def stretched(
    requests: Sequence[TracedRequest], tokens_per_s: float
) -> list[tuple[float, TracedRequest]]:
    """With so many prompt tokens arriving in a second, the pattern of arrivals kept."""
    first, last = requests[0].arrival, requests[-1].arrival
    factor = sum(r.prompt for r in requests) / tokens_per_s / (last - first)
    return [((r.arrival - first) * factor, r) for r in requests]


def replay(
    trace: Trace,
    requests: Sequence[TracedRequest],
    setting: tuple[int, float, bool, str],
    slo: tuple[float, float],
) -> ReplayRow:
    members, load, pooled, name = setting
    speeds, page = Speeds(), trace.block_size
    cluster = SimulatedCluster(
        POLICIES[name](),
        speeds,
        [PrefillMember(f"p{i}", speeds, page) for i in range(members)],
        [DecodeMember(f"d{i}", speeds) for i in range(members)],
        page,
        PageCache(4 * members * speeds.kv_tokens, page) if pooled else None,
    )
    arrivals = stretched(requests, load * members * speeds.prefill_rate)
    outcomes = cluster.run(arrivals)
    ttft = np.array([o.ttft for o in outcomes])
    tpot = np.array([o.tpot for o in outcomes])
    good = (ttft <= slo[0]) & (tpot <= slo[1])
    return ReplayRow(
        trace.name, members, load, pooled, name, len(outcomes),
        sum(o.computed for o in outcomes) / sum(r.prompt for r in requests),
        *(float(x) for x in np.percentile(ttft, [50, 99])),
        *(float(x) for x in np.percentile(tpot, [50, 99])),
        float(good.mean()),
    )  # fmt: skip


def show(title: str, rows: Sequence[CostRow | ReplayRow], file: Path | None) -> None:
    grid = Table(title=title, title_justify="left")
    figures = [asdict(row) for row in rows]
    for heading in figures[0]:
        grid.add_column(heading)
    for row in figures:
        grid.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(grid)
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(required=True, dest="what")
    costs = actions.add_parser("cost")
    costs.add_argument("--members", type=int, nargs="+", default=[10, 100, 1000])
    costs.add_argument("--times", type=int, default=5000)
    replays = actions.add_parser("replay")
    replays.add_argument("--data", type=Path, required=True)
    replays.add_argument("--trace", nargs="+", choices=sorted(TRACES), default=list(TRACES))
    replays.add_argument("--members", type=int, nargs="+", default=[4, 16])
    replays.add_argument("--load", type=float, nargs="+", default=[0.7, 0.9])
    replays.add_argument("--requests", type=int, default=3000)
    replays.add_argument("--ttft", type=float, default=4.0)
    replays.add_argument("--tpot", type=float, default=0.1)
    for action in (costs, replays):
        action.add_argument("--policy", nargs="+", choices=sorted(POLICIES), default=list(POLICIES))
        action.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "cost":
        cases = product(args.policy, args.members, (16, 512))
        costs_found = [cost(*case, args.times) for case in track(list(cases), transient=True)]
        show("microseconds of a decision", costs_found, args.json)
        return
    found = []
    for name in args.trace:
        trace = TRACES[name]
        requests = trace.requests(args.data, args.requests)
        pools = (False, True) if trace.prefixes else (False,)
        settings = list(product(args.members, args.load, pools, args.policy))
        slo = (args.ttft, args.tpot)
        for setting in track(settings, name, transient=True):
            found.append(replay(trace, requests, setting, slo))
    show("policies on traces", found, args.json)


if __name__ == "__main__":
    main()
