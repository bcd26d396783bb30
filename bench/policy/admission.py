"""Admission where KV is short, by the production scheduler without a model.

Answers are as long as was drawn or recorded, which no policy knows beforehand. All requests wait
from the beginning (a backlog: KV is what limits), and KV holds ``KV_TOKENS`` of them. A step is
modelled as 4 ms and 0.2 ms for each of its tokens.
"""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import (
    Counters,
    Request,
    RequestId,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies.choices import Admission, FirstComeFirstServed, most_tokens
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState

BLOCK = 16
EOS = 0
SEQS, STEP_TOKENS = 128, 512
MOST_ANSWER, MOST_PROMPT = 1024, 4000
STEP_S, TOKEN_S = 0.004, 0.0002
# KV holds so many requests of the mean length.
HELD = 30
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("Request tokens", "Response tokens"))
POLICIES = ("as blocks are free", "longest answers fit", "as answers were")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of each request, tokens of its prompt and of its answer."""

    name: str
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Admitted:
    """``seconds`` are modelled; ``plan_us`` is CPU time of planning a step."""

    lengths: str
    policy: str
    preemptions: int
    recomputed_tokens: int
    steps: int
    seconds: float
    plan_us: float


class LongestFits(PastFuture):
    """Admits where everybody's longest answer fits."""

    def pick(self, waiting: Mapping[RequestId, SequenceState], now: float) -> SequenceState | None:
        seq = super().pick(waiting, now)
        if seq is None or self._pool is None:
            return seq
        there = [*self._known.values(), seq]
        blocks = sum(
            self._pool.blocks_for(len(s.request.prompt_ids) + most_tokens(s, self._limit))
            for s in there
        )
        return seq if len(there) == 1 or blocks <= self._pool.num_blocks else None

    def _may_start(self, seq: SequenceState) -> bool:
        return True


class Scripted:
    """An executor whose answers are as long as was said."""

    def __init__(self, lengths: Mapping[RequestId, int]) -> None:
        self._lengths = lengths

    def run(self, plan: StepPlan) -> StepResult:
        made = []
        for chunk in plan.chunks:
            if chunk.samples:
                ends = len(chunk.output_ids) + 1 >= self._lengths[chunk.request.id]
                made.append(Sampled(chunk.request.id, (EOS if ends else 1,)))
        return StepResult(tuple(made))


def drawn(count: int) -> Lengths:
    draw = random.Random(1)
    pairs = tuple(
        (draw.randint(20, 200), max(1, int(draw.lognormvariate(5, 1)))) for _ in range(count)
    )
    return Lengths("lognormal", pairs)


def changed(count: int) -> Lengths:
    """Short answers, then long ones, then short ones again."""
    draw = random.Random(2)
    pairs = []
    for i in range(count):
        mean = 6.0 if count // 3 <= i < 2 * count // 3 else 4.0
        pairs.append((draw.randint(20, 200), max(1, int(draw.lognormvariate(mean, 0.5)))))
    return Lengths("short, long, short", tuple(pairs))


def recorded(path: Path, count: int) -> Lengths:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        names = next((c for c in COLUMNS if c[0] in (rows.fieldnames or ())), None)
        if names is None:
            raise SystemExit(f"{path}: has none of the columns {', '.join(c[0] for c in COLUMNS)}")
        pairs = []
        for row in rows:
            prompt, answer = int(row[names[0]]), int(row[names[1]])
            if prompt and answer:
                pairs.append((min(MOST_PROMPT, prompt), answer))
            if len(pairs) == count:
                break
    return Lengths(path.stem, tuple(pairs))


def admit(lengths: Lengths, policy: str) -> Admitted:
    counters = Counters()
    limit = MOST_PROMPT + MOST_ANSWER + 1
    mean = sum(p + min(MOST_ANSWER, a) for p, a in lengths.pairs) / len(lengths.pairs)
    blocks = max(limit // BLOCK + 1, round(HELD * mean / BLOCK))
    config = SchedulerConfig(
        limit, SEQS, STEP_TOKENS, 1 << 20, frozenset({EOS}), prefix_cache=False
    )
    chosen: dict[str, Admission] = {
        POLICIES[0]: FirstComeFirstServed(),
        POLICIES[1]: LongestFits(limit),
        POLICIES[2]: PastFuture(limit),
    }
    pool = BlockPool(blocks, BLOCK, counters)
    scheduler = Scheduler(config, pool, counters, chosen[policy])
    made: dict[RequestId, int] = {}
    for i, (prompt, answer) in enumerate(lengths.pairs):
        params = SamplingParams(max_tokens=MOST_ANSWER)
        request = Request(RequestId(str(i)), tuple(range(1, prompt + 1)), params)
        made[request.id] = min(MOST_ANSWER, answer)
        scheduler.add(request)
    executor, seconds, planned = Scripted(made), 0.0, 0
    while scheduler.has_work:
        began = time.thread_time_ns()
        plan = scheduler.plan(seconds)
        planned += time.thread_time_ns() - began
        seconds += STEP_S + TOKEN_S * plan.num_tokens
        scheduler.apply(executor.run(plan))
    return Admitted(
        lengths.name,
        policy,
        counters.preemptions,
        counters.recomputed_tokens,
        counters.steps,
        seconds,
        planned / counters.steps / 1e3,
    )


def admission(files: Sequence[Path], count: int) -> list[Admitted]:
    cases = cases_of(files, count)
    return [admit(lengths, policy) for lengths in cases for policy in POLICIES]


def cases_of(files: Sequence[Path], count: int) -> list[Lengths]:
    return [drawn(count), changed(count), *(recorded(path, count) for path in files)]


def show_admitted(rows: Sequence[Admitted]) -> None:
    table = Table(box=SIMPLE)
    for name in (
        "lengths",
        "who starts",
        "preempted",
        "again",
        "steps",
        "seconds",
        "plan us",
    ):
        table.add_column(name, justify="left" if name in ("lengths", "who starts") else "right")
    for row in rows:
        table.add_row(
            row.lengths,
            row.policy,
            str(row.preemptions),
            f"{row.recomputed_tokens:,}",
            f"{row.steps:,}",
            f"{row.seconds:.1f}",
            f"{row.plan_us:.0f}",
        )
    Console().print(table)
