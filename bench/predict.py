"""Predicted beside measured: how far the performance model is off, on cases that it never saw.

    python bench/predict.py [--model demo] [--batch 1 4 16 64] [--prompt 32 256] [--output 32]
                            [--quantization auto] [--kv-dtype auto int8] [--share 1] [--rounds N]
                            [--seconds N] [--threads N] [--cpu-time] [--json FILE] [--plot FILE]
    python bench/predict.py --kept FILE.json ... --plot FILE

Rounds, each between two calibrations of the host: what is compared are figures of one machine in
one state. In a round every case runs through the real scheduler and runner, with all settings in
turn, short ones again and again, never with the same prompts; its error is that of the median run
against the mean of what both calibrations predict, and the median round counts. Cases whose rounds
are far apart are run in more rounds, up to twice as many. A host that others use too is never as
fast as it was a moment ago: two kernels are timed five times a second, in calibrations and between
steps of cases, and calibrations are scaled to what these say of a case's seconds ("at its speed");
beside that stands the error as it was calibrated. All settings' models stay in memory. No
case is used to calibrate. How often each expert is chosen is counted on other prompts than those
measured, or taken to be as calibration has it (--use habits: what ``doctor`` says), or equal.
``--cpu-time`` with ``--threads 1`` takes the thread's CPU time for both sides, where others use the
machine; what waits for a disk has none. ``--share`` below 1 is of a packed model's experts that fit
in memory: the others are read as steps need them. After ``--seconds`` no case is begun any more;
``--json`` is written anew after every case; of such files ``--kept`` draws one plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from host_speed import Speed
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
from moeserve.offload.model.schedule import BatchPrediction, predict_batch
from moeserve.offload.model.workload import UniformWorkload

# Of the median, how far a case's fastest and slowest round may be apart.
SPREAD = 0.15
KIND_OF_KV = {"int8": "int8", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Compared:
    """Of one case in one round, or the median of rounds; generated tokens per second. ``predicted``
    is stage 2's, ``bound`` stage 1's, for the host as fast as it was meanwhile; ``error`` is that
    of the prediction, ``as_calibrated`` what it is for the host as it was then, ``of_bound`` what
    was reached of the bound. ``read`` are bytes from disk. ``slower`` is how many times as long as
    when it was calibrated arithmetic and memory took."""

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
    as_calibrated: float
    slower: tuple[float, float]
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was measured, and how fast the host was meanwhile."""

    machine: MachineModel
    speed: Speed | None = None

    def at(self, speed: Speed | None) -> MachineModel:
        if speed is None or self.speed is None:
            return self.machine
        return speed.of(self.machine, self.speed)


def compare(
    looks: Sequence[Calibrated],
    demand: ModelDemand,
    share: float,
    setting: Setting,
    case: Case,
    took: Took,
) -> Compared:
    """The mean of what all ``looks`` predict beside what was measured; ``share`` of the experts are
    in memory."""
    routed = sum(count for count, layer in demand.layers if layer.experts)
    work, bounds = UniformWorkload(case.streams, case.prompt, case.answer), bounds_of(case)
    tokens = case.streams * case.answer

    def predict(machine: MachineModel) -> tuple[BatchPrediction, float]:
        """And the bound."""
        held = WeightsInMemory.of(share, routed, machine.habits)
        model = demand.with_habits(machine.habits)
        found = predict_batch(StepPredictor(machine, model, held), work, bounds)
        bound = throughput_bound(
            machine,
            model,
            case.prompt,
            case.answer,
            kv_tokens=bounds.kv_tokens,
            concurrency=found.concurrent,
            weights=held,
        )
        return found, bound.generated_per_s

    at_speed = [predict(look.at(took.speed)) for look in looks]
    then = statistics.mean(predict(look.machine)[0].seconds for look in looks)
    found = [one for one, _ in at_speed]
    bound = statistics.mean(of for _, of in at_speed)
    measured = tokens / took.seconds
    predicted = tokens / statistics.mean(one.seconds for one in found)
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
        tokens / then / measured - 1,
        slower_than(looks, took.speed),
    )


def slower_than(looks: Sequence[Calibrated], speed: Speed | None) -> tuple[float, float]:
    before = [look.speed for look in looks if look.speed is not None]
    if speed is None or not before:
        return 1.0, 1.0
    return (
        speed.compute / statistics.mean(one.compute for one in before),
        speed.memory / statistics.mean(one.memory for one in before),
    )


def over_rounds(found: Sequence[Compared]) -> Compared:
    """The median of each figure."""
    names = ["measured", "predicted", "bound", "error", "of_predicted", "of_bound"]
    names += ["read", "predicted_read", "as_calibrated"]
    middle = {name: statistics.median(getattr(one, name) for one in found) for name in names}
    compute, memory = (statistics.median(one.slower[i] for one in found) for i in (0, 1))
    return replace(found[-1], **middle, slower=(compute, memory), rounds=len(found))


def far_apart(rounds: Sequence[Compared]) -> bool:
    rates = [one.measured for one in rounds]
    return bool(rates) and max(rates) - min(rates) > SPREAD * statistics.median(rates)


def draw(tables: Mapping[str, Sequence[Compared]], file: Path) -> None:
    """Predicted against measured, both logarithmic, with what 15 % off is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, rows in tables.items():
        for share in dict.fromkeys(r.share for r in rows):
            mine = [r for r in rows if r.share == share]
            held = "all" if share >= 1 else f"{share:.0%} of experts"
            points = [r.measured for r in mine], [r.predicted for r in mine]
            axes.loglog(*points, "o", markersize=5, label=f"{name}, {held} in memory")
    every = [r for rows in tables.values() for r in rows]
    ends = [min(r.measured for r in every) / 1.5, max(r.measured for r in every) * 1.5]
    axes.loglog(ends, ends, color="grey")
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], alpha=0.15)
    axes.set_xlabel("measured, generated tokens/s")
    axes.set_ylabel("predicted")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def kept_rows(file: Path) -> list[Compared]:
    return [Compared(**row) for row in json.loads(file.read_text())["rows"]]


def report(machine: MachineModel, rows: Sequence[Compared]) -> dict[str, Any]:
    errors = [abs(row.error) for row in rows]
    then = [abs(row.as_calibrated) for row in rows]
    return {
        "calibration": machine.name,
        "machine": machine.to_json(),
        "mean_error": statistics.mean(errors),
        "worst_error": max(errors),
        "as_calibrated": {"mean_error": statistics.mean(then), "worst_error": max(then)},
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
    parser.add_argument("--kept", type=Path, nargs="+", metavar="FILE", help="draw these alone")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        raise ConfigError("--cpu-time is of one thread: give --threads 1")
    if args.kept and args.plot is None:
        raise ConfigError("--kept draws what was kept: give --plot FILE too")
    return args


def rounds_of(
    args: argparse.Namespace, look: Callable[[], Calibrated], measured: Measured
) -> Iterator[tuple[Calibrated, list[Compared]]]:
    """The rows so far: after each case with the calibration before it, after each round with those
    on both sides."""
    kinds = itertools.product(args.quantization, args.kv_dtype, args.share)
    settings = [Setting(*kind) for kind in kinds]
    cases = [Case(*c) for c in itertools.product(args.batch, args.prompt, args.output)]
    pairs = [(setting, case) for case in cases for setting in settings]
    seen: dict[tuple[Setting, Case], list[Compared]] = {}

    def row(looks: Sequence[Calibrated], one: Setting, case: Case, took: Took) -> Compared:
        return compare(looks, measured.demands[one], measured.shares[one], one, case, took)

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
    if args.kept:
        draw({file.stem: kept_rows(file) for file in args.kept}, args.plot)
        return
    model = resolve_model(args.model)
    options = Setting(args.quantization[0], args.kv_dtype[0]).options
    kinds = [KIND_OF_KV[kind] for kind in args.kv_dtype if kind in KIND_OF_KV]
    errors, rows = Console(stderr=True), list[Compared]()
    with tempfile.TemporaryDirectory() as scratch, errors.status("calibrating") as status:
        measured = Measured(model, args)
        speed = measured.speed
        timer = CallTimer(speed or time.thread_time)

        def look() -> Calibrated:
            looks = 0 if speed is None else speed.looks
            machine = calibrate(
                model,
                Path(scratch),
                threads=args.threads,
                options=options,
                kinds=(*kinds, *(k for k in args.quantization if k in ("int8", "int4"))),
                seconds=float("inf"),
                timer=timer,
                report=lambda what: status.update(f"calibrating: {what}"),
            )
            return Calibrated(machine, None if speed is None else speed.since(looks))

        for calibrated, rows in rounds_of(args, look, measured):
            last = rows[-1]
            status.update(
                f"{len(rows)} rows, last: batch {last.batch}, prompt {last.prompt}, "
                f"{last.error:+.1%}"
            )
            if args.json is not None:
                args.json.write_text(json.dumps(report(calibrated.machine, rows), indent=1) + "\n")
        measured.close()
    if args.plot is not None:
        draw({args.model: rows}, args.plot)
    show(calibrated.machine, rows)


def show(machine: MachineModel, rows: Sequence[Compared]) -> None:
    table = Table("weights", "KV", "share", "batch", "prompt", "output", "measured", "predicted")
    for name in (
        "error",
        "as calibrated",
        "slower",
        "of stage 2",
        "stage 1",
        "of stage 1",
        "GB read",
        "predicted",
        "busy",
    ):
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
            f"{r.as_calibrated:+.1%}",
            "{:.2f} {:.2f}".format(*r.slower),
            f"{r.of_predicted:.0%}",
            f"{r.bound:,.1f}",
            f"{r.of_bound:.0%}",
            f"{r.read / 1e9:.2f}",
            f"{r.predicted_read / 1e9:.2f}",
            busy,
        )
    console, found = Console(width=160), report(machine, rows)
    console.print(table)
    then = found["as_calibrated"]
    console.print(
        f"mean {found['mean_error']:.1%}, worst {found['worst_error']:.1%}; as calibrated "
        f"{then['mean_error']:.1%} and {then['worst_error']:.1%}"
    )
    console.print(f"with: {machine.name}", soft_wrap=True)


if __name__ == "__main__":
    main()
