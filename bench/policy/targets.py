"""Targets of latency, by the production scheduler under a simulated clock.

Requests come as drawn or recorded, pressed together or apart so that they take ``load`` of what the
device could do. A step takes ``STEP_S``, ``TOKEN_S`` for each of its tokens and ``CONTEXT_S`` for
each token before a chunk of a prompt, within ``NOISE``; the policies learn that from the steps, as
in the engine. First come, first served with chunks of a fixed size stands beside, also with the
sizes that others would choose: the frontier.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from policy.admission import BLOCK, COLUMNS, EOS, Scripted
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies.choices import Admission
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.targets import LatencyTargets, TargetAdmission
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, MixedCost

SEQS, STEP_TOKENS = 64, 512
MOST_ANSWER, MOST_PROMPT = 1024, 4200
STEP_S, TOKEN_S, CONTEXT_S, NOISE = 0.004, 0.0002, 2e-8, 0.05
BLOCKS = 12000
LATE_S = 2.0
LOADS = (0.5, 0.7, 0.85)
CHUNKS = (128, 256, 512, 1024)
# Between tokens, seconds; and to the first one, of what nineteen in twenty get without targets.
TPOT_S = (0.1, 0.05)
TTFT_SHARE = 0.65


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Of each request: when it comes, tokens of its prompt and of its answer."""

    name: str
    rows: tuple[tuple[float, int, int], ...]

    def at(self, load: float) -> Arrivals:
        """So that the device works for that share of the time, in steps of ``STEP_TOKENS``."""
        token_s = TOKEN_S + STEP_S / STEP_TOKENS
        work = sum(token_s * (prompt + answer) for _, prompt, answer in self.rows)
        first, last = self.rows[0][0], self.rows[-1][0]
        pressed = work / load / (last - first) if last > first else 0.0
        return Arrivals(self.name, tuple(((t - first) * pressed, p, a) for t, p, a in self.rows))


@dataclass(frozen=True, slots=True)
class Served:
    """Simulated seconds. ``budgets`` is how often the budget changed; ``over`` the share of the
    gaps that are more than 5 % above the target, ``late`` of the first tokens after ``LATE_S``."""

    arrivals: str
    load: float
    policy: str
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    itl_p50: float
    itl_p95: float
    itl_p99: float
    over: float
    late: float
    budgets: int
    steps: int
    preemptions: int


def drawn(count: int) -> Arrivals:
    """Chats, and one in five a long document with a short answer."""
    draw, at, rows = random.Random(3), 0.0, []
    for _ in range(count):
        at += draw.expovariate(1.0)
        if draw.random() < 0.2:
            rows.append((at, draw.randint(2000, 4000), draw.randint(10, 60)))
        else:
            rows.append((at, draw.randint(30, 400), max(1, int(draw.lognormvariate(5, 0.7)))))
    return Arrivals("chats and documents", clipped(rows))


def clipped(rows: Sequence[tuple[float, int, int]]) -> tuple[tuple[float, int, int], ...]:
    return tuple((t, min(p, MOST_PROMPT), min(a, MOST_ANSWER)) for t, p, a in rows if p and a)


def recorded(path: Path, count: int) -> Arrivals:
    """With the columns of Azure's traces, or of BurstGPT's."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        fields = reader.fieldnames or ()
        names = next((names for names in COLUMNS if names[0] in fields), None)
        if names is None:
            raise SystemExit(f"{path}: has none of the columns {', '.join(c[0] for c in COLUMNS)}")
        rows = []
        for row in reader:
            rows.append((_seconds(row), int(row[names[0]]), int(row[names[1]])))
            if len(rows) == count:
                break
    return Arrivals(path.stem, clipped(rows))


def _seconds(row: Mapping[str, str]) -> float:
    if "Timestamp" in row:
        return float(row["Timestamp"])
    return datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()


class Clock:
    """What steps take."""

    def __init__(self) -> None:
        self.now = 0.0
        self._draw = random.Random(5)

    def run(self, plan: StepPlan) -> float:
        """Seconds of the step, which pass."""
        context = sum(c.start * len(c.token_ids) for c in plan.chunks if len(c.token_ids) > 1)
        seconds = STEP_S + TOKEN_S * plan.num_tokens + CONTEXT_S * context
        seconds *= self._draw.uniform(1 - NOISE, 1 + NOISE)
        self.now += seconds
        return seconds


def serve(
    arrivals: Arrivals, load: float, name: str, chunk: int, targets: LatencyTargets | None
) -> Served:
    rows = arrivals.at(load).rows
    limit = MOST_PROMPT + MOST_ANSWER + 1
    counters, decodes = Counters(), DecodeCost()
    mixed = MixedCost(decodes)
    admission: Admission = PastFuture(limit)
    if targets is not None:
        admission = TargetAdmission(admission, targets, mixed, limit)
    config = SchedulerConfig(limit, SEQS, chunk, 1 << 20, frozenset({EOS}), prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(BLOCKS, BLOCK, counters), counters, admission)
    executor = Scripted({RequestId(str(i)): answer for i, (_, _, answer) in enumerate(rows)})
    clock, coming, budgets, budget = Clock(), 0, 0, 0
    newest: dict[RequestId, float] = {}
    ttft, gaps = [], []
    while coming < len(rows) or scheduler.has_work:
        if not scheduler.has_work:
            clock.now = max(clock.now, rows[coming][0])
        while coming < len(rows) and rows[coming][0] <= clock.now:
            at, prompt, _ = rows[coming]
            params = SamplingParams(max_tokens=MOST_ANSWER)
            scheduler.add(Request(RequestId(str(coming)), (1,) * prompt, params, arrival=at))
            coming += 1
        plan = scheduler.plan(clock.now)
        seconds, choice = clock.run(plan), plan.choice
        if choice.prefill_tokens:
            mixed.note(choice.prefill_tokens, choice.decodes, seconds)
            budgets, budget = budgets + (budget != choice.budget), choice.budget
        else:
            decodes.note(choice.decodes, seconds)
        for out in scheduler.apply(executor.run(plan)):
            if out.request_id in newest:
                gaps.append(clock.now - newest[out.request_id])
            else:
                ttft.append(clock.now - rows[int(out.request_id)][0])
            newest[out.request_id] = clock.now
    first, between = np.array(ttft), np.array(gaps)
    most = np.inf if targets is None or targets.tpot_s is None else targets.tpot_s
    return Served(
        arrivals.name,
        load,
        name,
        first.mean(),
        *np.quantile(first, (0.5, 0.95)),
        *np.quantile(between, (0.5, 0.95, 0.99)),
        (between > 1.05 * most).mean(),
        (first > LATE_S).mean(),
        budgets,
        counters.steps,
        counters.preemptions,
    )


def targets(files: Sequence[Path], count: int) -> list[Served]:
    found = []
    for arrivals in (drawn(count), *(recorded(path, count) for path in files)):
        for load in LOADS:
            fixed = [serve(arrivals, load, f"chunks of {n}", n, None) for n in CHUNKS]
            found += fixed
            ttft_s = TTFT_SHARE * fixed[CHUNKS.index(STEP_TOKENS)].ttft_p95
            for kept in (
                *(LatencyTargets(tpot_s=tpot_s) for tpot_s in TPOT_S),
                LatencyTargets(ttft_s=ttft_s),
                LatencyTargets(ttft_s=ttft_s, tpot_s=TPOT_S[0]),
            ):
                found.append(serve(arrivals, load, named(kept), STEP_TOKENS, kept))
    return found


def named(targets: LatencyTargets) -> str:
    pairs = (("TTFT", targets.ttft_s), ("TPOT", targets.tpot_s))
    return ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in pairs if s is not None)


def show_targets(rows: Sequence[Served]) -> None:
    table = Table(box=SIMPLE)
    names = (
        "arrivals,load,policy,TTFT mean,p50,p95,ITL p50 ms,p95,p99,over,late,budgets,steps".split(
            ","
        )
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("arrivals", "policy") else "right")
    for row in rows:
        table.add_row(
            row.arrivals,
            f"{row.load:.0%}",
            row.policy,
            *(f"{x:.2f}" for x in (row.ttft_mean, row.ttft_p50, row.ttft_p95)),
            *(f"{1e3 * x:.0f}" for x in (row.itl_p50, row.itl_p95, row.itl_p99)),
            f"{row.over:.1%}",
            f"{row.late:.1%}",
            f"{row.budgets:,}",
            f"{row.steps:,}",
        )
    Console().print(table)
