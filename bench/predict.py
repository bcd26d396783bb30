"""Predicted beside measured: how far the performance model is off, on cases that it never saw.

    python bench/predict.py [--model demo] [--batch 1 4 16 64] [--prompt 32 256] [--output 32]
                            [--quantization auto] [--kv-dtype auto int8] [--share 1] [--rounds N]
                            [--seconds N] [--threads N] [--cpu-time] [--json FILE] [--plot FILE]

Rounds, each between two calibrations of the host: what is compared are figures of one machine in
one state. In a round every case runs through the real scheduler and runner, with all settings in
turn, short ones again and again, never with the same prompts; its error is that of the median run
against the mean of what both calibrations predict, and the median round counts. Cases whose rounds
are far apart are run in more rounds, up to twice as many. All settings' models stay in memory. No
case is used to calibrate. How often each expert is chosen is counted on other prompts than those
measured, or taken to be as calibration has it (--use habits: what ``doctor`` says), or equal.
``--cpu-time`` with ``--threads 1`` takes the thread's CPU time for both sides, where others use the
machine; what waits for a disk has none. ``--share`` below 1 is of a packed model's experts that fit
in memory: the others are read as steps need them. After ``--seconds`` no case is begun any more;
``--json`` is written anew after every case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from predict_cases import Measured, Setting, Took, bounds_of
from rich.console import Console
from rich.table import Table

from moeserve.bench.generation import Case
from moeserve.errors import ConfigError
from moeserve.forecast.calibrate import calibrate
from moeserve.forecast.timing import CallTimer
from moeserve.models.library import resolve_model
from moeserve.offload.model.bound import throughput_bound
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.predict import StepPredictor
from moeserve.offload.model.residency import WeightsInMemory
from moeserve.offload.model.schedule import predict_batch
from moeserve.offload.model.workload import UniformWorkload

# Of the median, how far a case's fastest and slowest round may be apart.
SPREAD = 0.15
KIND_OF_KV = {"int8": "int8", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Compared:
    """Of one case in one round, or the median of rounds; generated tokens per second. ``predicted``
    is stage 2's, ``bound`` stage 1's; ``error`` is that of the prediction, ``of_bound`` what was
    reached of the bound. ``read`` are bytes from disk."""

    quantization: str
    kv_dtype: str
    share: float
    batch: int
    prompt: int
    output: int
    measured: float
    predicted: float
    bound: float
    error: float
    of_predicted: float
    of_bound: float
    busy: dict[str, float]
    read: float
    predicted_read: float
    rounds: int = 1


def compare(
    machines: Sequence[MachineModel],
    demand: ModelDemand,
    share: float,
    setting: Setting,
    case: Case,
    took: Took,
) -> Compared:
    """The mean of what each of ``machines`` predicts beside what was measured; ``share`` of the
    experts are in memory."""
    routed = sum(count for count, layer in demand.layers if layer.experts)
    held = [WeightsInMemory.of(share, routed, machine.habits) for machine in machines]
    work, bounds = UniformWorkload(case.streams, case.prompt, case.answer), bounds_of(case)
    demands = [demand.with_habits(machine.habits) for machine in machines]
    found = [
        predict_batch(StepPredictor(machine, model, weights), work, bounds)
        for machine, model, weights in zip(machines, demands, held, strict=True)
    ]
    bound = statistics.mean(
        throughput_bound(
            machine,
            model,
            case.prompt,
            case.answer,
            kv_tokens=bounds.kv_tokens,
            concurrency=one.concurrent,
            weights=weights,
        ).generated_per_s
        for machine, model, weights, one in zip(machines, demands, held, found, strict=True)
    )
    measured = case.streams * case.answer / took.seconds
    predicted = case.streams * case.answer / statistics.mean(one.seconds for one in found)
    return Compared(
        setting.quantization,
        setting.kv_dtype,
        setting.share,
        case.streams,
        case.prompt,
        case.answer,
        measured,
        predicted,
        bound,
        predicted / measured - 1,
        measured / predicted,
        measured / bound,
        {name: found[-1].busy.share(name) for name in ("memory", "compute", "disk", "fixed")},
        took.read,
        statistics.mean(one.busy.disk_bytes for one in found),
    )


def over_rounds(found: Sequence[Compared]) -> Compared:
    """The median of each figure."""
    names = ("measured", "predicted", "bound", "error", "of_predicted", "of_bound")
    names += ("read", "predicted_read")
    middle = {name: statistics.median(getattr(one, name) for one in found) for name in names}
    return replace(found[-1], **middle, rounds=len(found))


def far_apart(rounds: Sequence[Compared]) -> bool:
    rates = [one.measured for one in rounds]
    return bool(rates) and max(rates) - min(rates) > SPREAD * statistics.median(rates)


def draw(rows: Sequence[Compared], file: Path) -> None:
    """Predicted against measured, both logarithmic, with what 15 % off is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in dict.fromkeys((r.quantization, r.kv_dtype, r.share) for r in rows):
        mine = [r for r in rows if (r.quantization, r.kv_dtype, r.share) == kind]
        label = f"weights {kind[0]}, KV {kind[1]}, {kind[2]:.0%} of experts in memory"
        axes.loglog([r.measured for r in mine], [r.predicted for r in mine], "o", label=label)
    ends = [min(r.measured for r in rows) / 1.5, max(r.measured for r in rows) * 1.5]
    axes.loglog(ends, ends, color="grey")
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], alpha=0.15)
    axes.set_xlabel("measured, generated tokens/s")
    axes.set_ylabel("predicted")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def report(machine: MachineModel, rows: Sequence[Compared]) -> dict[str, Any]:
    errors = [abs(row.error) for row in rows]
    return {
        "calibration": machine.name,
        "machine": machine.to_json(),
        "mean_error": statistics.mean(errors),
        "worst_error": max(errors),
        "rows": [asdict(row) for row in rows],
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/predict.py --batch 1 16 --prompt 64 --output 16 --rounds 3",
    )
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--output", type=int, nargs="+", default=[32])
    parser.add_argument("--quantization", nargs="+", default=["auto"])
    parser.add_argument("--kv-dtype", nargs="+", default=["auto", "int8"])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0], help="of a packed model")
    parser.add_argument("--use", choices=("counted", "habits", "equal"), default="counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no case after these")
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs moeserve[figures]")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        raise ConfigError("--cpu-time is of one thread: give --threads 1")
    return args


def rounds_of(
    args: argparse.Namespace, look: Callable[[], MachineModel], measured: Measured
) -> Iterator[tuple[MachineModel, list[Compared]]]:
    """The rows so far: after each case with the calibration before it, after each round with those
    on both sides."""
    kinds = itertools.product(args.quantization, args.kv_dtype, args.share)
    settings = [Setting(*kind) for kind in kinds]
    cases = [Case(*c) for c in itertools.product(args.batch, args.prompt, args.output)]
    pairs = [(setting, case) for case in cases for setting in settings]
    seen: dict[tuple[Setting, Case], list[Compared]] = {}

    def row(machines: Sequence[MachineModel], one: Setting, case: Case, took: Took) -> Compared:
        return compare(machines, measured.demands[one], measured.shares[one], one, case, took)

    before = look()
    end = time.monotonic() + args.seconds
    for n in range(2 * args.rounds):
        taken = []
        wanted = (
            pairs if n < args.rounds else [pair for pair in pairs if far_apart(seen.get(pair, ()))]
        )
        for setting, case, took in measured.round(wanted, end):
            taken.append((setting, case, took))
            early = [row([before], *one) for one in taken if one[:2] not in seen]
            yield before, [over_rounds(found) for found in seen.values()] + early
        if not taken:
            return
        after = look()
        for setting, case, took in taken:
            both = row([before, after], setting, case, took)
            seen.setdefault((setting, case), []).append(both)
        yield after, [over_rounds(found) for found in seen.values()]
        before = after


def main() -> None:
    args = read_arguments()
    model = resolve_model(args.model)
    timer = CallTimer(time.thread_time) if args.cpu_time else CallTimer()
    options = Setting(args.quantization[0], args.kv_dtype[0]).options
    kinds = [KIND_OF_KV[kind] for kind in args.kv_dtype if kind in KIND_OF_KV]
    errors, rows = Console(stderr=True), list[Compared]()
    with tempfile.TemporaryDirectory() as scratch, errors.status("calibrating") as status:

        def look() -> MachineModel:
            return calibrate(
                model,
                Path(scratch),
                threads=args.threads,
                options=options,
                kinds=(*kinds, *(k for k in args.quantization if k in ("int8", "int4"))),
                seconds=float("inf"),
                timer=timer,
                report=lambda what: status.update(f"calibrating: {what}"),
            )

        measured = Measured(model, args)
        for machine, rows in rounds_of(args, look, measured):
            last = rows[-1]
            status.update(
                f"{len(rows)} rows, last: batch {last.batch}, prompt {last.prompt}, "
                f"{last.error:+.1%}"
            )
            if args.json is not None:
                args.json.write_text(json.dumps(report(machine, rows), indent=1) + "\n")
        measured.close()
    if args.plot is not None:
        draw(rows, args.plot)
    show(machine, rows)


def show(machine: MachineModel, rows: Sequence[Compared]) -> None:
    table = Table("weights", "KV", "share", "batch", "prompt", "output", "measured", "predicted")
    for name in ("error", "of stage 2", "stage 1", "of stage 1", "GB read", "predicted", "busy"):
        table.add_column(name)
    for r in rows:
        sizes = (str(n) for n in (r.batch, r.prompt, r.output))
        busy = ", ".join(f"{name} {share:.0%}" for name, share in r.busy.items() if share >= 0.01)
        table.add_row(
            r.quantization,
            r.kv_dtype,
            f"{r.share:g}",
            *sizes,
            f"{r.measured:,.1f}",
            f"{r.predicted:,.1f}",
            f"{r.error:+.1%}",
            f"{r.of_predicted:.0%}",
            f"{r.bound:,.1f}",
            f"{r.of_bound:.0%}",
            f"{r.read / 1e9:.2f}",
            f"{r.predicted_read / 1e9:.2f}",
            busy,
        )
    console, found = Console(width=160), report(machine, rows)
    console.print(table)
    console.print(f"mean {found['mean_error']:.1%}, worst {found['worst_error']:.1%}")
    console.print(f"with: {machine.name}", soft_wrap=True)


if __name__ == "__main__":
    main()
