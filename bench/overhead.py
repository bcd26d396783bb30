"""What Python costs in a decode step: the time of a step outside native calls.

    python bench/overhead.py MODEL [--batch 1 16 32] [--steps N] [--threads N]
                             [--quantization int8] [--json]

The whole engine runs on its own thread: planning, packing, the decoder's glue, sampling and
events. Of every step the thread's CPU time is taken, and how much of it is inside native calls; the
table shows medians, and the native calls of a step. CPU time leaves others on the machine out, but
not what they do to caches and memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from moeserve.config.options import EngineOptions
from moeserve.core import Event, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.engine.request_state import EachEvent
from moeserve.kernels.cpu import _cpu

PROMPT = 128
WAIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """CPU microseconds of the engine's thread in a step, medians."""

    batch: int
    step: float
    native: float
    outside: float
    share: float
    calls: float


def measure(model: LoadedModel, batch: int, steps: int) -> Row:
    """All requests decode together; the last one's events are the clock."""
    marks: list[tuple[int, int, int]] = []
    ended = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if event.request_id == str(batch - 1):
            marks.append((time.thread_time_ns(), _cpu.nanoseconds(), _cpu.calls()))
        if event.finish is not None:
            ended.release()

    params = SamplingParams(max_tokens=steps + batch, temperature=0, ignore_eos=True)
    for r in range(batch):
        prompt = tuple((7 * r + 13 * i) % 200 + 1 for i in range(PROMPT))
        model.engine.submit(Request(RequestId(str(r)), prompt, params), EachEvent(sink))
    for _ in range(batch):
        assert ended.acquire(timeout=WAIT_S), "the engine does not answer"
    # From the first on there are only decode steps; when the first request ends, fewer run.
    pairs = list(itertools.pairwise(marks[1:steps]))
    lengths = [(b[0] - a[0]) / 1e3 for a, b in pairs]
    natives = [(b[1] - a[1]) / 1e3 for a, b in pairs]
    outside = statistics.median(x - y for x, y in zip(lengths, natives, strict=True))
    native = statistics.median(natives)
    return Row(
        batch,
        statistics.median(lengths),
        native,
        outside,
        outside / (outside + native),
        statistics.median(b[2] - a[2] for a, b in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/overhead.py demo --batch 1 16",
    )
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument("--quantization", default="auto", help="of the matrices, as they load")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    model = build_engine(
        EngineOptions(
            model=args.model,
            quantization=args.quantization,
            threads=args.threads,
            max_model_len=PROMPT + args.steps + max(args.batch) + 1,
            max_num_seqs=max(args.batch),
        )
    )
    _cpu.measure(True)
    rows = [measure(model, batch, args.steps) for batch in args.batch]
    model.close()
    if args.json:
        print(json.dumps({"threads": _cpu.threads(), "rows": [asdict(row) for row in rows]}))
        return
    table = Table("batch", "step us", "native us", "outside us", "share", "calls")
    for r in rows:
        cells = [f"{r.step:.0f}", f"{r.native:.0f}", f"{r.outside:.0f}", f"{r.share:.1%}"]
        table.add_row(str(r.batch), *cells, f"{r.calls:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
