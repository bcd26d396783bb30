"""The engine on the shipped model: tokens per second, and what recording routing costs.

    python bench/engine.py [--json] [--rounds N] [--threads N]

Each round runs every case once without and once with a recorder, in alternating order, so that
what disturbs the machine disturbs both alike. The table shows medians with least and most, and
the ratio of the two as the median over rounds. The model is small: these are figures of the
engine's own work per step more than of arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.spec import MoeSpec
from moeserve.observe.routing import RoutingRecorder

BLOCK, CONTEXT = 16, 1024


@dataclass(frozen=True, slots=True)
class Case:
    """``streams`` requests at once, each of ``prompt`` tokens and ``answer`` generated ones."""

    what: str
    streams: int
    prompt: int
    answer: int


CASES = (
    Case("prefill", 1, 512, 1),
    Case("decode", 1, 16, 96),
    Case("decode", 16, 16, 96),
    Case("decode", 64, 16, 96),
    Case("decode", 256, 16, 96),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens per second; ``cost`` is recorded time over plain time, less one."""

    what: str
    streams: int
    plain: tuple[float, float, float]
    recorded: tuple[float, float, float]
    cost: float


def open_recorder(file: Path, decoder: Decoder) -> RoutingRecorder:
    """As a server with --record-routing does."""
    routers = [m.router for layer in decoder.spec.layers if isinstance(m := layer.mlp, MoeSpec)]
    return RoutingRecorder(
        file,
        model="demo",
        moe_layers=decoder.spec.moe_layers,
        num_experts=max(r.num_experts for r in routers),
        top_k=max(r.top_k for r in routers),
    )


def seconds(decoder: Decoder, case: Case, record: Path | None) -> float:
    """Of all steps of one case, closing the trace included."""
    recorder = None if record is None else open_recorder(record, decoder)
    counters = Counters()
    blocks = case.streams * ((case.prompt + case.answer) // BLOCK + 1)
    config = SchedulerConfig(CONTEXT, case.streams, 512, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    executor = ModelRunner(decoder, blocks, BLOCK, observer=recorder)
    params = SamplingParams(max_tokens=case.answer, temperature=0, ignore_eos=True)
    for s in range(case.streams):
        prompt = tuple((7 * s + 13 * i) % 4000 + 1 for i in range(case.prompt))
        scheduler.add(Request(RequestId(str(s)), prompt, params))
    began = time.perf_counter()
    while scheduler.has_work:
        plan: StepPlan = scheduler.plan(0.0)
        scheduler.apply(executor.run(plan))
    if recorder is not None:
        recorder.close()
    return time.perf_counter() - began


def measure(decoder: Decoder, rounds: int) -> list[Row]:
    plain: dict[Case, list[float]] = {case: [] for case in CASES}
    recorded: dict[Case, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.safetensors"
        for r in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
            for case in CASES:
                pair = [(plain, None), (recorded, trace)]
                for times, record in pair if r % 2 else reversed(pair):
                    took = seconds(decoder, case, record)
                    if r:  # the first round warms up
                        times[case].append(took)
    return [row_of(case, plain[case], recorded[case]) for case in CASES]


def row_of(case: Case, plain: list[float], recorded: list[float]) -> Row:
    tokens = case.streams * (case.prompt if case.what == "prefill" else case.answer)

    def rates(times: list[float]) -> tuple[float, float, float]:
        found = [tokens / t for t in times]
        return statistics.median(found), min(found), max(found)

    ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
    return Row(
        case.what, case.streams, rates(plain), rates(recorded), statistics.median(ratios) - 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python bench/engine.py --rounds 5"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    args = parser.parse_args()
    ops = choose_ops(threads=args.threads)
    decoder = load_decoder(resolve_model("demo"), ops=ops)
    rows = measure(decoder, args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "rows": [asdict(row) for row in rows]}))
        return
    table = Table("what", "streams", "tokens/s (min-max)", "recording (min-max)", "cost")
    for row in rows:
        cells = [f"{m:.0f} ({low:.0f}-{high:.0f})" for m, low, high in (row.plain, row.recorded)]
        table.add_row(row.what, str(row.streams), *cells, f"{row.cost:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
