"""What a decode step costs the host: plan, pack, forward, sample, apply.

    python bench/steps.py [--model demo] [--batch 1 16 64 96 256] [--context 100 4000] [--steps N]
                          [--threads N] [--json]

Scheduler and model runner as in the engine, without its thread, text and events. First with a null
decoder, which returns logits that lie ready, then with the model. All requests decode greedily;
their contexts differ by up to a block, so that every step has some that need a new one. Every
part's CPU time of this thread is taken: others on the machine are left out, but not what they do to
caches. The table shows medians of all steps, with least and most of a whole step. "outside" is what
of a step with the model is not spent in native calls, of which numpy's are none: its share is what
Python takes. Contexts that the model does not serve are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import Forward, ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.forecast.steps import AnsweringDecoder
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import StepBatch
from moeserve.models.decoder import load_decoder
from moeserve.models.library import resolve_model

BLOCK = 16
VOCAB = 1024
BUDGET = 2048


class TimedDecoder:
    """A decoder that notes when its turn began and ended, and the native time in between."""

    def __init__(self, decoder: Forward[Any]) -> None:
        self.ops = decoder.ops
        self.new_cache = decoder.new_cache
        self.began = self.ended = 0
        self._decoder = decoder

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: Any, observer: Any = None
    ) -> list[Tensor]:
        self.began = time.thread_time_ns()
        logits = self._decoder.forward_micro(steps, cache, observer)
        self.ended = time.thread_time_ns()
        return logits


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one step, in microseconds; ``native`` is the part of ``forward`` in native calls."""

    plan: float
    pack: float
    forward: float
    sample: float
    apply: float
    native: float

    @property
    def step(self) -> float:
        return self.plan + self.pack + self.forward + self.sample + self.apply


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over steps in microseconds; ``least`` and ``most`` are of whole steps."""

    decoder: str
    batch: int
    context: int
    parts: Parts
    step: float
    least: float
    most: float

    @property
    def outside(self) -> float:
        """Of a step, what is not spent in native calls."""
        return self.step - self.parts.native

    @property
    def share(self) -> float:
        """That ``outside`` is of a step."""
        return self.outside / self.step

    def to_json(self) -> dict[str, Any]:
        each = {name: value / self.batch for name, value in asdict(self.parts).items()}
        return {**asdict(self), "request": each, "outside": self.outside, "share": self.share}


def answer_of(batch: int, context: int, steps: int) -> int:
    """Tokens of each request: the first ones decode while the last ones' prompts are computed."""
    return batch * (context + BLOCK) // (BUDGET - batch) + 2 * steps + 1


def new_scheduler(batch: int, context: int, steps: int) -> Scheduler:
    """With its requests, whose prompts share no block."""
    answer = answer_of(batch, context, steps)
    longest = context + BLOCK + answer
    counters = Counters()
    config = SchedulerConfig(longest, batch, BUDGET)
    pool = BlockPool(batch * (longest // BLOCK + 1), BLOCK, counters)
    scheduler = Scheduler(config, pool, counters)
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for r in range(batch):
        length = context + r % BLOCK
        prompt = (r, *((7 * r + 13 * i) % 1000 + 1 for i in range(length - 1)))
        scheduler.add(Request(RequestId(f"request-{r}"), prompt, params))
    return scheduler


def decode_steps(scheduler: Scheduler, decoder: Forward[Any], steps: int) -> Iterator[Parts]:
    """After the prompts are computed and as many steps for warmth, so many."""
    timed, clock = TimedDecoder(decoder), time.thread_time_ns
    runner = ModelRunner(timed, scheduler.blocks.total, BLOCK)
    batch = scheduler.num_waiting
    warm = 0
    for _ in range(10 * batch + 100_000):
        began, native = clock(), _cpu.nanoseconds()
        plan = scheduler.plan(0.0)
        planned = clock()
        result = runner.run(plan)
        ran = clock()
        scheduler.apply(result)
        marks = (began, planned, timed.began, timed.ended, ran, clock())
        if plan.num_tokens == len(plan.chunks) == batch:
            warm += 1
        if warm > steps // 2:
            parts = [(b - a) / 1e3 for a, b in itertools.pairwise(marks)]
            yield Parts(*parts, (_cpu.nanoseconds() - native) / 1e3)
        if warm == steps + steps // 2:
            return


def measure(name: str, decoder: Forward[Any], batch: int, context: int, steps: int) -> Row:
    found = list(decode_steps(new_scheduler(batch, context, steps), decoder, steps))
    medians = Parts(*(statistics.median(getattr(p, f.name) for p in found) for f in fields(Parts)))
    whole = [p.step for p in found]
    return Row(name, batch, context, medians, statistics.median(whole), min(whole), max(whole))


def print_rows(rows: Sequence[Row]) -> None:
    table = Table(title="CPU us of a decode step: of all requests, and of one", box=SIMPLE)
    parts = ("plan", "pack", "forward", "sample", "apply")
    for head in ("decoder", "batch", "context", *parts, "step (min-max)", "plan+apply", "outside"):
        table.add_column(head, no_wrap=True)
    for r in rows:
        times = [getattr(r.parts, part) for part in parts]
        table.add_row(
            r.decoder,
            str(r.batch),
            str(r.context),
            *(f"{time:.0f} {time / r.batch:.2f}" for time in times),
            f"{r.step:.0f} ({r.least:.0f}-{r.most:.0f})",
            f"{(r.parts.plan + r.parts.apply) / r.batch:.2f}",
            f"{r.share:.1%}" if r.parts.native else "",
        )
    Console(width=132).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/steps.py --batch 1 64 --context 100",
    )
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 96, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[100, 4000])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    ops = choose_ops(threads=args.threads)
    model = load_decoder(resolve_model(args.model), ops)
    decoders: list[tuple[str, Callable[[int], Forward[Any]], float]] = [
        ("null", lambda batch: AnsweringDecoder(ops, batch, VOCAB), float("inf")),
        (args.model, lambda _: model, model.spec.max_positions),
    ]
    _cpu.measure(True)
    rows = [
        measure(name, make(batch), batch, context, args.steps)
        for name, make, limit in decoders
        for context in args.context
        for batch in args.batch
        if context + BLOCK + answer_of(batch, context, args.steps) <= limit
    ]
    if args.json:
        print(json.dumps({"threads": _cpu.threads(), "rows": [row.to_json() for row in rows]}))
        return
    print_rows(rows)


if __name__ == "__main__":
    main()
