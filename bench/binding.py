"""Whether the resource that is said to bind is the one of which half costs most.

    python bench/binding.py FOLDER [--share 0.3] [--batch 4] [--prompt 32] [--output 8]
                            [--runs 3] [--threads N] [--json FILE]

FOLDER is one that `moeserve quantize --packed` wrote; ``share`` of its experts fit in memory. The
host is calibrated for it, then the workload runs as it is, with half the disk (reads end when a
disk of half the calibrated bandwidth would have brought them), with half the memory for experts,
and with one core instead of two, which is half of both arithmetic and what one core reads. Each row
has how many times longer that is predicted to take and how many times longer it took: of so many
runs, each beside one as it is with the same prompts, which no run has again, the median. The exit
status is 1 where the greatest of both columns are not in the same row, unless
the predicted ones are within a tenth of each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from predict_cases import WARM, bounds_of, seconds
from rich.console import Console
from rich.table import Table

from moeserve.bench.generation import Case
from moeserve.config.options import RankModelOptions
from moeserve.errors import DeadlineError
from moeserve.forecast.calibrate import calibrate
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.predict import StepPredictor
from moeserve.offload.model.residency import WeightsInMemory
from moeserve.offload.model.schedule import predict_batch
from moeserve.offload.model.workload import UniformWorkload
from moeserve.offload.mover import DiskMover, MoverCounts, Read, Ticket
from moeserve.offload.runner import StreamedLayerRunner
from offload import with_share

CLOSE = 1.1


@dataclass(frozen=True, slots=True)
class Row:
    """How many times longer the workload takes with half of ``resource``."""

    resource: str
    predicted: float
    measured: float


class ThrottledMover:
    """A ``DiskMover`` whose reads are over when a disk of ``bytes_per_s`` would have ended them,
    one after the other, and no sooner than the disk that is there."""

    def __init__(self, inner: DiskMover, bytes_per_s: float) -> None:
        self._inner, self._rate = inner, bytes_per_s
        self._free = 0.0  # when it would be idle
        self._over: dict[Ticket, tuple[float, float]] = {}  # when, and what of it is its own

    def submit(self, reads: Sequence[Read], *, ahead: bool = False) -> list[Ticket]:
        tickets = self._inner.submit(reads, ahead=ahead)
        for read, ticket in zip(reads, tickets, strict=True):
            own = read.nbytes / self._rate
            self._free = max(self._free, time.perf_counter()) + own
            self._over[ticket] = self._free, own
        return tickets

    def wait(self, ticket: Ticket, deadline_s: float) -> None:
        over, _ = self._over.get(ticket, (0.0, 0.0))  # one from before it was throttled has none
        if over - time.perf_counter() > deadline_s:
            raise DeadlineError(f"a throttled read is late after {deadline_s:g} s")
        self._inner.wait(ticket, deadline_s)
        self._over.pop(ticket, None)
        time.sleep(max(0.0, over - time.perf_counter()))

    def promote(self, ticket: Ticket) -> None:
        self._inner.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        if not self._inner.cancel(ticket):
            return False
        self._free -= self._over.pop(ticket, (0.0, 0.0))[1]
        return True

    def counts(self) -> MoverCounts:
        return self._inner.counts()

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True)
class Opened:
    """A model with room for ``share`` of its experts, which runs on so many threads."""

    decoder: Decoder
    share: float
    threads: int | None

    def close(self) -> None:
        assert isinstance(self.decoder.runner, StreamedLayerRunner)
        self.decoder.runner.close()


class Workload:
    """One case on one packed model, as the options say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.share, self.runs = args.folder, args.share, args.runs
        self.threads = args.threads
        self._first = itertools.count(1, args.runs)  # of each comparison's runs, the number
        self.options = RankModelOptions(
            model=str(args.folder), memory=1 << 50, weights_prediction="off"
        )
        self.case = Case(args.batch, args.prompt, args.output)
        self.ops = choose_ops(threads=args.threads)
        self.demand = demand_of(stored_sizes(args.folder), self.options, self.ops)

    def predicted(self, machine: MachineModel, share: float) -> float:
        """Seconds."""
        routed = sum(count for count, layer in self.demand.layers if layer.experts)
        held = WeightsInMemory.of(share, routed, replace(machine.habits, foreseen=0.0))
        work = UniformWorkload(self.case.streams, self.case.prompt, self.case.answer)
        predictor = StepPredictor(machine, self.demand.with_habits(machine.habits), held)
        return predict_batch(predictor, work, bounds_of(self.case)).seconds

    def open(
        self, *, share: float, threads: int | None = None, disk: float | None = None
    ) -> Opened:
        decoder, experts = with_share(self.options, self.ops, share)
        assert isinstance(decoder.runner, StreamedLayerRunner)
        stream = decoder.runner.stream
        seconds(decoder, WARM, time.perf_counter)
        if disk is not None:
            stream.mover = ThrottledMover(stream.mover, disk)
        return Opened(decoder, stream.arena.slots / experts, threads or self.threads)

    def run(self, opened: Opened, run: int) -> float:
        """Seconds of the case, with the prompts of that run."""
        choose_ops(threads=opened.threads)
        return seconds(opened.decoder, self.case, time.perf_counter, run)

    def times_longer(self, usual: Opened, other: Opened) -> float:
        """Of ``other``, which is closed then."""
        first = next(self._first)
        pairs = [
            (self.run(usual, run), self.run(other, run)) for run in range(first, first + self.runs)
        ]
        other.close()
        print(f"as it is, and with half: {pairs} s", file=sys.stderr, flush=True)
        return statistics.median(half / whole for whole, half in pairs)


def rows(work: Workload, machine: MachineModel) -> list[Row]:
    usual = work.open(share=work.share)
    share = usual.share
    before = work.predicted(machine, share)
    half_disk = machine.disk_rate(work.demand.record_bytes) / 2
    slower = work.predicted(machine.scaled(disk=0.5), share)
    other = work.open(share=work.share, disk=half_disk)
    found = [Row("disk", slower / before, work.times_longer(usual, other))]
    other = work.open(share=work.share / 2)
    slower = work.predicted(machine, other.share)
    found.append(Row("memory size", slower / before, work.times_longer(usual, other)))
    slower = work.predicted(machine.scaled(memory=0.5, compute=0.5), share)
    other = work.open(share=work.share, threads=max(1, machine.threads // 2))
    found.append(Row("cores", slower / before, work.times_longer(usual, other)))
    usual.close()
    return found


def agree(found: Sequence[Row]) -> bool:
    named = max(found, key=lambda row: row.predicted)
    moved = max(found, key=lambda row: row.measured)
    return named.predicted <= CLOSE * moved.predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all allowed cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything here")
    args = parser.parse_args()
    work = Workload(args)
    with tempfile.TemporaryDirectory() as scratch:
        machine = calibrate(
            args.folder, Path(scratch), threads=args.threads, options=work.options, kinds=()
        )
    found = rows(work, machine)
    if args.json is not None:
        kept = {"machine": machine.to_json(), "rows": [asdict(row) for row in found]}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    table = Table("half of", "predicted", "measured")
    for row in found:
        table.add_row(row.resource, f"{row.predicted:.2f}x", f"{row.measured:.2f}x")
    Console().print(table)
    sys.exit(0 if agree(found) else 1)


if __name__ == "__main__":
    main()
