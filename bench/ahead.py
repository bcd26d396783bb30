"""Steps planned while the one before runs, beside steps one after the other.

    python bench/ahead.py [--batch 1 16 64] [--device-ms 2 5] [--steps N] [--rounds N] [--json]

The whole engine, with events; the same executor once as it is and once on a thread of its own
(``engine/threaded.py``). First the shipped model, whose kernels take all cores: whatever plans
meanwhile takes time from them. Then a device that is only a wait of so many milliseconds beside the
Python that packs and samples: what a step takes beyond that is control that is not hidden. The
table shows microseconds of wall time a decode step, as medians over rounds of alternating order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from steps import BLOCK, VOCAB
from torch import Tensor

from moeserve.core import Counters, Event, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.executor import Executor
from moeserve.engine.loop import Engine
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.threaded import ThreadedExecutor
from moeserve.forecast.steps import AnsweringDecoder
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import StepBatch
from moeserve.models.decoder import load_decoder
from moeserve.models.library import resolve_model

PROMPT, WAIT_S = 16, 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds a step, medians; ``ratio`` of the two."""

    what: str
    batch: int
    in_turn: float
    ahead: float
    ratio: float


class WaitingDecoder(AnsweringDecoder):
    """A device whose steps take so long."""

    def __init__(self, ops: Ops, rows: int, seconds: float) -> None:
        super().__init__(ops, rows, VOCAB)
        self._seconds = seconds

    def forward_micro(
        self, steps: Sequence[StepBatch], cache: None, observer: object = None
    ) -> list[Tensor]:
        time.sleep(self._seconds)
        return super().forward_micro(steps, cache, observer)


class Clock:
    """A sink of all requests: when steps' events came."""

    def __init__(self, requests: int) -> None:
        self.at: list[float] = []
        self.ended = threading.Event()
        self._left = requests

    def deliver(self, events: Sequence[Event]) -> None:
        self.at.append(time.perf_counter())
        self._left -= sum(event.finish is not None for event in events)
        if not self._left:
            self.ended.set()


def step_us(executor: Executor, batch: int, steps: int) -> float:
    """Of decode steps, from the middle ones of a run."""
    counters = Counters()
    longest = PROMPT + steps
    pool = BlockPool(batch * (longest // BLOCK + 1), BLOCK, counters)
    scheduler = Scheduler(SchedulerConfig(longest, batch, 4096), pool, counters)
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    sink = Clock(batch)
    engine = Engine(scheduler, executor)
    for r in range(batch):
        prompt = (r, *((7 * r + 13 * i) % 1000 + 1 for i in range(PROMPT - 1)))
        engine.submit(Request(RequestId(str(r)), prompt, params), sink)
    with engine:
        assert sink.ended.wait(WAIT_S), "the engine does not answer"
    first, last = steps // 4, steps - 2
    return 1e6 * (sink.at[last] - sink.at[first]) / (last - first)


def measure(what: str, runner: ModelRunner[object], batch: int, steps: int, rounds: int) -> Row:
    times: dict[str, list[float]] = {"in turn": [], "ahead": []}
    for r in range(rounds):
        for way in sorted(times, reverse=bool(r % 2)):
            with contextlib.ExitStack() as stack:
                executor: Executor = runner
                if way == "ahead":
                    executor = threaded = ThreadedExecutor(executor)
                    stack.callback(threaded.close)
                times[way].append(step_us(executor, batch, steps))
    in_turn, ahead = (statistics.median(times[way]) for way in ("in turn", "ahead"))
    pairs = zip(times["ahead"], times["in turn"], strict=True)
    return Row(what, batch, in_turn, ahead, statistics.median(a / b for a, b in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/ahead.py --batch 64 --device-ms 5",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--device-ms", type=float, nargs="+", default=[2.0, 5.0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    ops = choose_ops()
    rows = []
    for batch in args.batch:
        blocks = batch * ((PROMPT + args.steps) // BLOCK + 1)
        demo = ModelRunner(load_decoder(resolve_model("demo"), ops), blocks, BLOCK)
        rows.append(measure("demo", demo, batch, args.steps, args.rounds))  # type: ignore[arg-type]
        for ms in args.device_ms:
            device = ModelRunner(WaitingDecoder(ops, batch, ms / 1e3), blocks, BLOCK)
            what = f"{ms:g} ms device"
            rows.append(measure(what, device, batch, args.steps, args.rounds))  # type: ignore[arg-type]
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    table = Table("step", "batch", "in turn us", "ahead us", "ratio")
    for row in sorted(rows, key=lambda row: row.what):
        cells = f"{row.in_turn:.0f}", f"{row.ahead:.0f}", f"{row.ratio:.3f}"
        table.add_row(row.what, str(row.batch), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
