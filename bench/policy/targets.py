"""Targets of latency, by the production scheduler under a simulated clock.

Requests come as drawn or recorded, pressed together or apart so that they take ``load`` of what the
device could do. A step takes ``STEP_S``, ``TOKEN_S`` for each of its tokens and ``CONTEXT_S`` for
each token before a chunk of a prompt, within ``NOISE``; the policies learn that from the steps, as
in the engine. First come, first served with chunks of a fixed size stands beside, also with the
sizes that others would choose: the frontier.
"""

from __future__ import annotations

import csv
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from policy.admission import BLOCK, COLUMNS, EOS, Scripted
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams, StepChoice, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.executor import Executor
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.choices import Admission
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.targets import NO_TARGETS, LatencyTargets, TargetAdmission
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, MixedCost
from moeserve.models.decoder import Decoder

SEQS, STEP_TOKENS = 64, 512
MOST_ANSWER, MOST_PROMPT = 1024, 4200
STEP_S, TOKEN_S, CONTEXT_S, NOISE = 0.004, 0.0002, 2e-8, 0.05
BLOCKS = 12000
LOADS = (0.5, 0.7, 0.85)
WALL_LOAD, WALL_BLOCKS = 0.7, 3000
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
class LatencyRow:
    """Seconds. ``over`` is the share of gaps more than 5 % above the target, ``late`` that of first
    tokens after theirs; ``budgets`` is how often the budget of steps with prompts changed."""

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


class Clock(Protocol):
    """``end`` says what a step took since ``begin``; ``wait`` is idle until then."""

    @property
    def now(self) -> float: ...
    def wait(self, until: float) -> None: ...
    def begin(self) -> None: ...
    def end(self, plan: StepPlan) -> float: ...


class SimulatedClock:
    """Steps take what the constants above say."""

    def __init__(self) -> None:
        self.now = 0.0
        self._draw = random.Random(5)

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)

    def begin(self) -> None: ...

    def end(self, plan: StepPlan) -> float:
        context = sum(c.start * len(c.token_ids) for c in plan.chunks if len(c.token_ids) > 1)
        seconds = STEP_S + TOKEN_S * plan.num_tokens + CONTEXT_S * context
        seconds *= self._draw.uniform(1 - NOISE, 1 + NOISE)
        self.now += seconds
        return seconds


class WallClock:
    """Steps take what they take."""

    def __init__(self) -> None:
        self._start = self._begun = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now))

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self, plan: StepPlan) -> float:
        return time.perf_counter() - self._begun


@dataclass(frozen=True, slots=True)
class Policy:
    """Chunks of at most so many tokens, and targets, if there are some."""

    name: str
    chunk: int = STEP_TOKENS
    targets: LatencyTargets = NO_TARGETS

    @staticmethod
    def keeping(targets: LatencyTargets, chunk: int = STEP_TOKENS) -> Policy:
        pairs = (("TTFT", targets.ttft_s), ("TPOT", targets.tpot_s))
        name = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in pairs if s is not None)
        return Policy(name, chunk, targets)


class Served:
    """What came when, as it is served."""

    def __init__(self) -> None:
        self.ttft_s: list[float] = []
        self.gaps_s: list[float] = []
        self.budgets = self.steps = 0
        self._newest: dict[RequestId, float] = {}
        self._budget = 0

    def step(self, choice: StepChoice) -> None:
        self.steps += 1
        if choice.prefill_tokens:
            self.budgets += self._budget != choice.budget
            self._budget = choice.budget

    def token(self, request: RequestId, arrival: float, now: float) -> None:
        if request in self._newest:
            self.gaps_s.append(now - self._newest[request])
        else:
            self.ttft_s.append(now - arrival)
        self._newest[request] = now

    def row(self, arrivals: str, load: float, policy: Policy) -> LatencyRow:
        first, between = np.array(self.ttft_s), np.array(self.gaps_s)
        tpot_s = policy.targets.tpot_s or math.inf
        return LatencyRow(
            arrivals,
            load,
            policy.name,
            first.mean(),
            *np.quantile(first, (0.5, 0.95)),
            *np.quantile(between, (0.5, 0.95, 0.99)),
            (between > 1.05 * tpot_s).mean(),
            (first > (policy.targets.ttft_s or math.inf)).mean(),
            self.budgets,
            self.steps,
        )


def serve(
    rows: Sequence[tuple[float, int, int]],
    policy: Policy,
    executor: Executor,
    clock: Clock,
    blocks: int,
) -> Served:
    limit = MOST_PROMPT + MOST_ANSWER + 1
    counters, decodes, served = Counters(), DecodeCost(), Served()
    mixed = MixedCost(decodes)
    admission: Admission = PastFuture(limit)
    if policy.targets != NO_TARGETS:
        admission = TargetAdmission(admission, policy.targets, mixed, limit)
    eos = frozenset({EOS})
    config = SchedulerConfig(limit, SEQS, policy.chunk, 1 << 20, eos, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters, admission)
    coming = 0
    while coming < len(rows) or scheduler.has_work:
        if not scheduler.has_work:
            clock.wait(rows[coming][0])
        while coming < len(rows) and rows[coming][0] <= clock.now:
            scheduler.add(asked(coming, *rows[coming]))
            coming += 1
        clock.begin()
        plan = scheduler.plan(clock.now)
        result = executor.run(plan)
        assert result is not None
        seconds, choice = clock.end(plan), plan.choice
        served.step(choice)
        if choice.prefill_tokens:
            mixed.note(choice.prefill_tokens, choice.decodes, seconds)
        else:
            decodes.note(choice.decodes, seconds)
        for out in scheduler.apply(result):
            served.token(out.request_id, rows[int(out.request_id)][0], clock.now)
    return served


def asked(i: int, arrival: float, prompt: int, answer: int) -> Request:
    tokens = tuple((7 * i + 13 * j) % 200 + 1 for j in range(prompt))
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    return Request(RequestId(str(i)), tokens, params, arrival=arrival)


def simulated(arrivals: Arrivals, load: float, policy: Policy) -> LatencyRow:
    rows = arrivals.at(load).rows
    executor = Scripted({RequestId(str(i)): answer for i, (_, _, answer) in enumerate(rows)})
    served = serve(rows, policy, executor, SimulatedClock(), BLOCKS)
    return served.row(arrivals.name, load, policy)


def targets(files: Sequence[Path], count: int) -> list[LatencyRow]:
    found = []
    for arrivals in (drawn(count), *(recorded(path, count) for path in files)):
        for load in LOADS:
            fixed = [simulated(arrivals, load, Policy(f"chunks of {n}", n)) for n in CHUNKS]
            ttft_s = TTFT_SHARE * fixed[CHUNKS.index(STEP_TOKENS)].ttft_p95
            found += fixed
            for kept in (
                *(LatencyTargets(tpot_s=tpot_s) for tpot_s in TPOT_S),
                LatencyTargets(ttft_s=ttft_s),
                LatencyTargets(ttft_s=ttft_s, tpot_s=TPOT_S[0]),
            ):
                found.append(simulated(arrivals, load, Policy.keeping(kept)))
    return found


def targets_by_the_clock(decoder: Decoder, count: int) -> list[LatencyRow]:
    """The same arrivals, a quarter as long, on a model. How fast it is is measured first, by all
    requests at once."""
    rows = [(at, max(1, p // 4), max(1, a // 4)) for at, p, a in drawn(count).rows]

    def on_model(policy: Policy, rows: Sequence[tuple[float, int, int]]) -> Served:
        runner = ModelRunner(decoder, WALL_BLOCKS, BLOCK)
        return serve(rows, policy, runner, WallClock(), WALL_BLOCKS)

    clock = WallClock()
    on_model(Policy("all at once"), [(0.0, p, a) for _, p, a in rows])
    pressed = clock.now / WALL_LOAD / (rows[-1][0] - rows[0][0])
    rows = [((at - rows[0][0]) * pressed, p, a) for at, p, a in rows]
    plain = Policy(f"chunks of {STEP_TOKENS // 4}", STEP_TOKENS // 4)
    found = [on_model(plain, rows).row("a quarter", WALL_LOAD, plain)]
    ttft_s, tpot_s = TTFT_SHARE * found[0].ttft_p95, found[0].itl_p95
    for kept in (LatencyTargets(ttft_s, tpot_s), LatencyTargets(None, tpot_s)):
        policy = Policy.keeping(kept, plain.chunk)
        found.append(on_model(policy, rows).row("a quarter", WALL_LOAD, policy))
    return found


def show_targets(rows: Sequence[LatencyRow]) -> None:
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
