"""What comes of KV that is given up, by the production scheduler without a model.

Requests come at ``LOAD`` of what a rank with room for all of them serves, and KV holds ``HELD`` of
them, which start as blocks are free. A step is modelled as in ``policy/admission``, and held up by
the copies for its preemptions: KV of ``CACHES`` layers of a latent, ``PLACE_BYTES`` to the token in
all, at ``BYTES_S``, and ``CALL_S`` for each call. Block by block, as vLLM had it, a call copies one
block of one layer, and all of a request's KV each time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from policy.admission import BLOCK, EOS, STEP_S, TOKEN_S, Lengths, Scripted
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import BlockId, Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.policies.choices import Admission, FirstComeFirstServed
from moeserve.engine.policies.past_future import PastFuture
from moeserve.engine.policies.swap import SwapOrCompute
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.swap_space import SwapRun
from moeserve.engine.swapping import Swapping

SEQS, STEP_TOKENS = 128, 512
MOST_ANSWER, MOST_PROMPT = 1024, 4000
CACHES, PLACE_BYTES = 27, 27 * 1152
BYTES_S, CALL_S = 10e9, 10e-6
HELD, LOAD = 10, 1.0
PLACES = 1 << 18
WAYS = ("computed again", "block by block", "long runs, what is new")
ADMISSIONS = ("as blocks are free", "as answers were")


@dataclass(frozen=True, slots=True)
class Given:
    """``calls`` and ``blocks`` (of all layers) are of all copies, out and in; ``later_share`` is of
    a request's KV what its second swap and later ones copied out. Times are modelled, in seconds.
    """

    lengths: str
    admission: str
    way: str
    preemptions: int
    recomputed_tokens: int
    swaps: int
    calls: int
    block_calls: int
    copied_bytes: int
    later_share: float
    seconds: float
    ttft_p50: float
    ttft_p99: float
    gap_p99: float


class ModelledCopies:
    """A ``SwapMemory`` that says how long copies would take; ``by_blocks`` as vLLM made them."""

    caches, place_bytes, places = CACHES, PLACE_BYTES, PLACES

    def __init__(self, *, by_blocks: bool) -> None:
        self.calls = self.block_calls = 0
        self.seconds = 0.0
        self.byte_s = 1 / BYTES_S
        self._by_blocks = by_blocks

    def copy_out(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> None:
        self._count(runs)

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        self._count(runs)
        return True

    def _count(self, runs: Sequence[SwapRun]) -> None:
        blocks = sum(-(-run.stop // BLOCK) - run.start // BLOCK for run in runs)
        calls = CACHES * (blocks if self._by_blocks else len(runs))
        self.calls += calls
        self.block_calls += CACHES * blocks
        self.seconds += calls * CALL_S + sum(run.count for run in runs) * PLACE_BYTES / BYTES_S


class Rank:
    """A scheduler in modelled time."""

    def __init__(self, lengths: Lengths, admission: str, way: str, blocks: int, gap_s: float):
        self.counters = Counters()
        self.memory = ModelledCopies(by_blocks=way == WAYS[1])
        limit = MOST_PROMPT + MOST_ANSWER + 1
        pool = BlockPool(max(blocks, limit // BLOCK + 1), BLOCK, self.counters)
        config = SchedulerConfig(
            limit, SEQS, STEP_TOKENS, 1 << 20, frozenset({EOS}), prefix_cache=False
        )
        chosen: Admission = FirstComeFirstServed()
        if admission == ADMISSIONS[1]:
            chosen = PastFuture(limit)
        swapping = None if way == WAYS[0] else Swapping(self.memory, SwapOrCompute())
        self.scheduler = Scheduler(config, pool, self.counters, chosen, swapping=swapping)
        self.now = 0.0
        self.later: list[tuple[int, int]] = []  # of second swaps: copied out, and spared
        self._forgets = way == WAYS[1]
        self._swapped: set[RequestId] = set()
        draw, at = random.Random(3), 0.0
        self._arrivals: list[tuple[float, Request]] = []
        answers: dict[RequestId, int] = {}
        for i, (prompt, answer) in enumerate(lengths.pairs):
            at += draw.expovariate(1 / gap_s) if gap_s else 0.0
            ids, params = tuple(range(1, prompt + 1)), SamplingParams(max_tokens=MOST_ANSWER)
            request = Request(RequestId(str(i)), ids, params, arrival=at)
            answers[request.id] = min(MOST_ANSWER, answer)
            self._arrivals.append((at, request))
        self._arrivals.reverse()
        self._executor = Scripted(answers)
        self._came = {request.id: at for at, request in self._arrivals}
        self._last: dict[RequestId, float] = {}
        self.ttft: list[float] = []
        self.gaps: list[float] = []

    def run(self) -> None:
        while self._arrivals or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.now = max(self.now, self._arrivals[-1][0])
            while self._arrivals and self._arrivals[-1][0] <= self.now:
                self.scheduler.add(self._arrivals.pop()[1])
            self._step()

    def _step(self) -> None:
        counts, copied_s = self.counters, self.memory.seconds
        out, spared = counts.swap_out_bytes, counts.swap_spared_bytes
        plan = self.scheduler.plan(self.now)
        again = self._swapped.intersection(plan.preempted)
        if again and len(plan.preempted) == 1:
            self.later.append((counts.swap_out_bytes - out, counts.swap_spared_bytes - spared))
        self._swapped.update(plan.preempted)
        if self._forgets and self.scheduler.swap is not None:
            for chunk in plan.chunks:
                self.scheduler.swap.forget(chunk.request.id)
        self.now += STEP_S + TOKEN_S * plan.num_tokens + self.memory.seconds - copied_s
        for token in self.scheduler.apply(self._executor.run(plan)):
            last = self._last.get(token.request_id)
            if last is None:
                self.ttft.append(self.now - self._came[token.request_id])
            else:
                self.gaps.append(self.now - last)
            self._last[token.request_id] = self.now


def give(lengths: Lengths, admission: str, way: str, gap_s: float) -> Given:
    mean = sum(p + min(MOST_ANSWER, a) for p, a in lengths.pairs) / len(lengths.pairs)
    rank = Rank(lengths, admission, way, round(HELD * mean / BLOCK), gap_s)
    rank.run()
    counts = rank.counters
    out, spared = (sum(found) for found in zip(*rank.later, strict=True)) if rank.later else (0, 0)
    return Given(
        lengths.name,
        admission,
        way,
        counts.preemptions,
        counts.recomputed_tokens,
        counts.swaps,
        rank.memory.calls,
        rank.memory.block_calls,
        counts.swap_out_bytes + counts.swap_in_bytes,
        out / (out + spared) if out + spared else 0.0,
        rank.now,
        float(np.percentile(rank.ttft, 50)),
        float(np.percentile(rank.ttft, 99)),
        float(np.percentile(rank.gaps, 99)),
    )


def swap(cases: Sequence[Lengths]) -> list[Given]:
    """Each way, for each admission, at the same arrivals."""
    found = []
    for lengths in cases:
        for admission in ADMISSIONS:
            backlog = give(lengths, admission, WAYS[0], 0.0)
            gap_s = backlog.seconds / len(lengths.pairs) / LOAD
            found += [give(lengths, admission, way, gap_s) for way in WAYS]
    return found


def show_given(rows: Sequence[Given]) -> None:
    table = Table(box=SIMPLE)
    left = ("lengths", "who starts", "KV given up is")
    right = "preempted|again|swaps|calls a swap|GB|later|seconds|TTFT p50|p99|gap p99, ms"
    for name in (*left, *right.split("|")):
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(
            row.lengths,
            row.admission,
            row.way,
            str(row.preemptions),
            f"{row.recomputed_tokens:,}",
            str(row.swaps),
            f"{row.calls / max(1, 2 * row.swaps):,.0f}",
            f"{row.copied_bytes / 1e9:.2f}",
            f"{row.later_share:.0%}" if row.swaps else "-",
            f"{row.seconds:.1f}",
            f"{row.ttft_p50:.2f}",
            f"{row.ttft_p99:.2f}",
            f"{1e3 * row.gap_p99:.0f}",
        )
    Console().print(table)
