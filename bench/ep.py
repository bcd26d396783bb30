"""Experts over several hosts: what overlap, bytes and plans are worth as links get slower.

    python bench/ep.py [--quick] [--json FILE] [--models demo ...] [--rates unlimited,100mbit ...]
    python bench/ep.py --replay FILES ...        recorded routing (expert_parallel/replay.py)

Raises the test bed (root is needed), runs a rank on each host and asks all of them for the same
steps: no server, no sampling, every round of every scheme in turn. Two tables a model: tokens per
second for rate x load x microbatches; then, at one rate, what travels in each variant, as counted,
as the cost model predicts and as the kernel counts it on the links, and what that does to a step.

The share of communication is 1 - (step at the unlimited rate / step), both with one microbatch.
Hosts share this machine's cores: what waits for a link costs no one else anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expert_parallel.group import RankGroup, TrafficVariant
from expert_parallel.inputs import PLANS, StepInputs, prepare
from expert_parallel.record_bytes import copy_bytes, link_seconds
from expert_parallel.replay import main as replay
from expert_parallel.schemes import (
    AUTO,
    LoadCase,
    Repetitions,
    Scheme,
    SchemeSamples,
    fill,
    link_bytes,
    measure,
)
from rich.console import Console
from rich.table import Table

from moeserve.errors import InternalError, MoeserveError
from moeserve.models.library import DEMO
from moeserve.placement.cluster import Dataflow
from moeserve.testbed.links import parse_rate, show_rate
from moeserve.testbed.network import Bed, refusal

COUNTS: tuple[int | str, ...] = (1, 2, 4, AUTO)
FIXED = tuple(count for count in COUNTS if count != AUTO)
BASE = TrafficVariant()


@dataclass(frozen=True, slots=True)
class Overlap:
    """A load at a rate; by number of microbatches: tokens/s (median, least, most), share of a step
    in which even the rank that waits least waits, seconds of a step by round, and what auto chose
    how often."""

    model: str
    what: str
    tokens: int
    rate: str
    communication: float
    tokens_per_s: Mapping[str, tuple[float, float, float]]
    waiting: Mapping[str, float]
    round_s: Mapping[str, Sequence[float]]
    chosen: Mapping[int, int]

    @property
    def two(self) -> float:
        return self.beside("2", "1")

    @property
    def auto(self) -> float:
        """Beside the best fixed number."""
        return self.beside(AUTO, max(map(str, FIXED), key=lambda c: self.tokens_per_s[c][0]))

    def beside(self, scheme: str, other: str) -> float:
        """How much faster, round by round: what slows the machine for a while slows both."""
        pairs = zip(self.round_s[scheme], self.round_s[other], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Travel:
    """A variant at a rate. Copies are one way, per token and layer; bytes of a step, both ways, of
    all ranks: counted by the exchange, and by the kernel with headers on the links. ``predicted``
    is the step that the unlimited one and the busiest rank's bytes lead to."""

    model: str
    what: str
    tokens: int
    rate: str
    variant: str
    copies: float
    predicted_copies: float
    sent_bytes: float
    predicted_bytes: float
    link_bytes: float
    step_s: tuple[float, float, float]
    predicted_step_s: float
    overlapped_step_s: float


def speed(load: LoadCase, ranks: int, samples: SchemeSamples) -> tuple[float, float, float]:
    low, high = samples.range_s
    tokens = load.tokens * ranks
    return tokens / samples.seconds, tokens / high, tokens / low


def require_equal_bits(
    group: RankGroup, load: LoadCase, named: Sequence[TrafficVariant], repetitions: Repetitions
) -> None:
    """Law 1, before anything is timed: however tokens travel, logits are the same."""
    spans = load.spans(group.world, 0, repetitions.length, repetitions.prompt)
    first = group.step(spans, 1, BASE, digest=True).digests
    for variant in named:
        for count in FIXED:
            if group.step(spans, int(count), variant, digest=True).digests != first:
                raise InternalError(f"{load}: other logits by {variant}, {count} microbatches")


def overlap_table(
    group: RankGroup, bed: Bed, model: str, loads: Sequence[LoadCase], rates: Sequence[int | None],
    repetitions: Repetitions, say: Any,
) -> list[Overlap]:  # fmt: skip
    """Rates from the fastest on, the unlimited one first: it tells what communication costs."""
    rows = []
    schemes = [Scheme(BASE, count) for count in COUNTS]
    for load in loads:
        say(f"{model}: {load.what} of {load.tokens} tokens a rank")
        counts = {scheme: str(scheme.microbatches) for scheme in schemes}
        by_rate = measure(group, load, schemes, repetitions, rates, bed.set_rate)
        free_s = by_rate[0][schemes[0]].seconds
        for rate, found in zip(rates, by_rate, strict=True):
            one_s = found[schemes[0]].seconds
            rows.append(
                Overlap(
                    model, load.what, load.tokens, show_rate(rate), 1 - free_s / one_s,
                    {counts[w]: speed(load, group.world, s) for w, s in found.items()},
                    {counts[w]: s.waiting for w, s in found.items()},
                    {counts[w]: s.round_s for w, s in found.items()},
                    found[schemes[-1]].counts,
                )
            )  # fmt: skip
    return rows


def variants(inputs: StepInputs) -> dict[str, tuple[TrafficVariant, Dataflow]]:
    dedup = Dataflow.HOME_DEDUP
    base = {
        "int8 wire, one copy a rank": (BASE, dedup),
        "bf16 wire": (TrafficVariant(wire="bf16"), dedup),
        "fp32 wire": (TrafficVariant(wire="fp32"), dedup),
        "a copy for every expert": (TrafficVariant(copies="expert"), Dataflow.HOME_PER_EXPERT),
    }
    plans = {
        f"plan: {name}": (TrafficVariant(name), dedup) for name in inputs.plans if name != BASE.plan
    }
    return base | plans


def travel_table(
    group: RankGroup,
    bed: Bed,
    inputs: StepInputs,
    load: LoadCase,
    rate: int,
    repetitions: Repetitions,
    say: Any,
) -> list[Travel]:
    """Steps at the unlimited rate and at ``rate``: with one microbatch, and with two."""
    named = variants(inputs)
    schemes = [Scheme(variant, micro) for variant, _ in named.values() for micro in (1, 2)]
    say(f"{inputs.model}: variants without a limit and at {show_rate(rate)}")
    free, found = measure(group, load, schemes, repetitions, (None, rate), bed.set_rate)
    rows = []
    for name, (variant, flow) in named.items():
        one, two = found[Scheme(variant, 1)], found[Scheme(variant, 2)]
        spans = [
            s for step in range(repetitions.steps)
            for s in [load.spans(group.world, step, repetitions.length, repetitions.prompt)]
        ]  # fmt: skip
        copies = sum(inputs.predicted_copies(s, variant.plan, flow) for s in spans) / len(spans)
        token_layers = one.steps[0].token_layers
        each = sum(copy_bytes(inputs.hidden, inputs.top_k, variant.wire))
        on_link = link_seconds(one.busiest_bytes, rate)
        rows.append(
            Travel(
                inputs.model, load.what, load.tokens, show_rate(rate), name,
                one.copies, copies,
                one.sent_bytes, copies * token_layers * each,
                link_bytes(group, bed, load, variant, repetitions),
                (one.seconds, *one.range_s),
                free[Scheme(variant, 1)].seconds + on_link,
                two.seconds,
            )
        )  # fmt: skip
    return rows


def show_overlap(rows: Sequence[Overlap]) -> Table:
    grid = Table(
        title="tokens/s by microbatches: median (least-most of rounds)", title_justify="left"
    )
    for heading in ("model", "load", "rate", "comm.", *map(str, COUNTS), "2 / 1", "auto / best"):
        grid.add_column(heading)
    for row in rows:
        cells = [
            f"{row.tokens_per_s[str(c)][0]:.0f} ({row.tokens_per_s[str(c)][1]:.0f}-"
            f"{row.tokens_per_s[str(c)][2]:.0f})"
            for c in COUNTS
        ]
        grid.add_row(
            Path(row.model).name, f"{row.what} {row.tokens}", row.rate,
            f"{row.communication:.0%}", *cells, f"{row.two:.2f}", f"{row.auto:.2f}",
        )  # fmt: skip
    return grid


def show_travel(rows: Sequence[Travel]) -> Table:
    grid = Table(title="what travels in a step, one microbatch", title_justify="left")
    headings = (
        "model", "load", "rate", "variant", "copies", "predicted", "kB", "predicted", "on links",
        "step ms", "predicted", "beside the first", "predicted", "2 microbatches, ms",
    )  # fmt: skip
    for heading in headings:
        grid.add_column(heading)
    for row in rows:
        first = next(r for r in rows if (r.model, r.what) == (row.model, row.what))
        middle, low, high = (1e3 * s for s in row.step_s)
        grid.add_row(
            Path(row.model).name, f"{row.what} {row.tokens}", row.rate, row.variant,
            f"{row.copies:.3f}", f"{row.predicted_copies:.3f}", f"{row.sent_bytes / 1e3:.0f}",
            f"{row.predicted_bytes / 1e3:.0f}", f"{row.link_bytes / 1e3:.0f}",
            f"{middle:.1f} ({low:.1f}-{high:.1f})", f"{1e3 * row.predicted_step_s:.1f}",
            f"{row.step_s[0] / first.step_s[0]:.2f}",
            f"{row.predicted_step_s / first.predicted_step_s:.2f}",
            f"{1e3 * row.overlapped_step_s:.1f}",
        )  # fmt: skip
    return grid


def bench_model(
    args: argparse.Namespace, model: str, say: Any
) -> tuple[list[Overlap], list[Travel]]:
    loads = [LoadCase("decode", b) for b in args.decode] + [
        LoadCase("prefill", t) for t in args.prefill
    ]
    repetitions = Repetitions(args.length, args.length * 3 // 4, args.steps, args.rounds)
    most = max(load.sequences(repetitions.length) for load in loads)
    plans = list(PLANS) if model == DEMO else [BASE.plan]
    rates = sorted(args.rates, key=lambda rate: -(rate or 1 << 62))
    inputs = prepare(
        model, args.quantization, ranks=args.hosts, each=most, tokens=repetitions.length,
        plans=plans, seconds=args.solve_s, say=say,
    )  # fmt: skip
    with ExitStack() as stack:
        bed = stack.enter_context(Bed(args.hosts))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        group = stack.enter_context(
            RankGroup(bed, inputs.settings(args.threads, args.backend), logs)
        )
        say(f"{model}: filling KV")
        fill(group, most, repetitions)
        for load in loads:
            every = [variant for variant, _ in variants(inputs).values()]
            require_equal_bits(group, load, every, repetitions)
        overlap = overlap_table(group, bed, model, loads, rates, repetitions, say)
        travel = []
        for load in loads if args.travel_rate else ():
            if load.tokens in args.travel_tokens:
                rate = args.travel_rate
                travel += travel_table(group, bed, inputs, load, rate, repetitions, say)
    return overlap, travel


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")] if text else []


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEMO], metavar="MODEL", help="[demo]")
    parser.add_argument("--quantization", default="int8", help="of the weights [int8]")
    parser.add_argument("--hosts", type=int, default=4, metavar="N", help="[4]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a rank [1]")
    parser.add_argument("--backend", default="auto", help="auto, tcp, torch [auto]")
    parser.add_argument("--rates", default="unlimited,1gbit,300mbit,100mbit", metavar="RATE,..")
    parser.add_argument("--decode", default="4,16,64", metavar="N,..", help="streams of a rank")
    parser.add_argument("--prefill", default="64,256", metavar="N,..", help="tokens of a rank")
    parser.add_argument("--travel-rate", default="100mbit", metavar="RATE", help="second table")
    parser.add_argument("--travel-tokens", default="64,256", metavar="N,..", help="loads in it")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="of sequences [128]")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="of a round [12]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="[5]")
    parser.add_argument("--solve-s", type=float, default=10.0, metavar="S", help="for a plan [10]")
    parser.add_argument("--quick", action="store_true", help="two hosts, little of everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw figures")
    args = parser.parse_args(words)
    if args.quick:
        args.hosts, args.rates, args.decode, args.prefill = 2, "unlimited,100mbit", "4", ""
        args.travel_tokens, args.length, args.steps, args.rounds, args.solve_s = "4", 16, 2, 1, 1.0
    args.rates = [parse_rate(rate) for rate in args.rates.split(",")]
    args.travel_rate = parse_rate(args.travel_rate)
    for name in ("decode", "prefill", "travel_tokens"):
        setattr(args, name, numbers(getattr(args, name)))
    return args


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if "--replay" in words:
        return replay(words)
    args = arguments(words)
    reason = refusal()
    if reason is not None:
        print(f"ep.py: {reason}", file=sys.stderr)
        return 1
    console = Console(stderr=True)
    overlap: list[Overlap] = []
    travel: list[Travel] = []
    try:
        for model in args.models:
            of_model = bench_model(args, model, console.print)
            overlap += of_model[0]
            travel += of_model[1]
    except MoeserveError as error:
        print(f"ep.py: {error.message}", file=sys.stderr)
        return 1
    out = Console(width=200)
    out.print(show_overlap(overlap))
    if travel:
        out.print(show_travel(travel))
    if args.json is not None:
        raw = {
            "cores": os.cpu_count(),
            "hosts": args.hosts,
            "backend": args.backend,
            "overlap": [asdict(row) for row in overlap],
            "travel": [asdict(row) for row in travel],
        }
        args.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
