"""Recorded routing end to end: what plans are worth on traffic that they were not fitted to.

    python bench/ep.py --replay 'FOLDER/*.npz' 'COUNTS/*.json:k=8' ... [--json FILE]

The runtime on the test bed, with random weights in the shapes of the recorded model, of which
experts, layers and choices are kept and sizes are scaled. Every token goes to the experts that the
recording names for it (``forced``). First all plans must give the same logits, the runtime must
count the choices of the recording, and as many copies as the cost model predicts. Then decode
steps of all plans are timed in turn at every rate.

The step that is predicted: that of the first plan at the unlimited rate, and what the links take by
the cost model (``predicted``). Saved are shares of the first plan's: of bytes between hosts, as
predicted, and of the step, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from expert_parallel.group import RankGroup, TrafficVariant
from expert_parallel.inputs import Say
from expert_parallel.recorded import Recording, parse_source, record
from expert_parallel.replay_case import BedShape, Replay, require_recorded
from expert_parallel.replay_plans import solve_plans
from expert_parallel.replay_rows import ReplayRow, rows_of, show_ratios, show_rows
from expert_parallel.scaled_model import write_model
from expert_parallel.schemes import LoadCase, Repetitions, Scheme, fill, link_bytes, measure
from rich.console import Console

from moeserve.errors import ConfigError, MoeserveError
from moeserve.placement.cluster import Cluster
from moeserve.testbed.links import parse_rate
from moeserve.testbed.network import Bed, refusal


def replay_on(
    recording: Recording, shape: BedShape, model: Path, args: argparse.Namespace, say: Say
) -> list[ReplayRow]:
    repetitions = Repetitions(args.length, args.length // 2, args.steps, args.rounds, untimed=1)
    cluster = Cluster(shape.ranks, shape.hosts)
    plans = solve_plans(recording, cluster, args.max_imbalance, args.solve_s, say)
    # Windows follow one another in the recording: each goes to another rank.
    ids_RSWLK = np.stack([recording.ids_CWLK[r :: shape.ranks] for r in range(shape.ranks)])
    load = LoadCase("decode", args.tokens)
    replay = Replay(recording, shape, plans, ids_RSWLK[:, : args.tokens], load, repetitions)
    routing = model / f"{shape}.npy"
    np.save(routing, replay.ids_RSWLK)
    # The unlimited one tells what a step takes but for links.
    rates = sorted({*args.rates, None}, key=lambda rate: -(rate or 1 << 62))
    with ExitStack() as stack:
        bed = stack.enter_context(Bed(shape.hosts))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = replay.settings(model, routing, args.threads, args.backend)
        say(f"{recording.source.name}, {shape}: {len(plans)} plans are loaded")
        group = stack.enter_context(RankGroup(bed, settings, logs, shape.ranks_per_host))
        fill(group, args.tokens, repetitions)
        require_recorded(group, replay)
        say(f"{recording.source.name}, {shape}: logits, choices and copies are as they should be")
        on_links = {
            name: link_bytes(group, bed, load, TrafficVariant(name), repetitions) for name in plans
        }
        schemes = [Scheme(TrafficVariant(name), 1) for name in plans]
        by_rate = measure(group, load, schemes, repetitions, rates, bed.set_rate)
    return rows_of(replay, rates, by_rate, on_links)


def parse_shape(text: str) -> BedShape:
    hosts, _, each = text.partition("x")
    if not (hosts.isdigit() and each.isdigit() and int(hosts) > 1 and int(each) > 0):
        raise ConfigError(f"bed {text!r}: expected HOSTSxRANKS, such as 4x1 or 2x2")
    return BedShape(int(hosts), int(each))


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--replay", nargs="+", required=True, metavar="FILES[:k=N][:hidden=N][:intermediate=N]",
        help="recorded routing of a model each; of counts with the experts of a token",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="[256]")
    parser.add_argument("--intermediate", type=int, default=64, metavar="N", help="[64]")
    parser.add_argument("--beds", default="4x1,2x2", metavar="HxR,..", help="hosts x ranks of each")
    parser.add_argument("--rates", default="unlimited,1gbit,100mbit", metavar="RATE,..")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="of a rank [96]")
    parser.add_argument("--length", type=int, default=8, metavar="N", help="of windows [8]")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of a round [2]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--solve-s", type=float, default=4.0, metavar="S", help="for a plan [4]")
    parser.add_argument("--max-imbalance", type=float, default=1.03, metavar="X", help="[1.03]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a rank [1]")
    parser.add_argument("--backend", default="auto", help="auto, tcp, torch [auto]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw figures")
    args = parser.parse_args(words)
    args.rates = [parse_rate(rate) for rate in args.rates.split(",")]
    args.beds = [parse_shape(text) for text in args.beds.split(",")]
    args.sources = [parse_source(text, args.hidden, args.intermediate) for text in args.replay]
    return args


def main(words: Sequence[str]) -> int:
    reason = refusal()
    if reason is not None:
        print(f"ep.py: {reason}", file=sys.stderr)
        return 1
    say = Console(stderr=True).print
    rows: list[ReplayRow] = []
    try:
        args = arguments(words)
        for source in args.sources:
            most = max(shape.ranks for shape in args.beds)
            recording = record(source, most * args.tokens, args.length)
            with tempfile.TemporaryDirectory() as folder:
                model = write_model(recording, Path(folder))
                for shape in args.beds:
                    rows += replay_on(recording, shape, model, args, say)
    except MoeserveError as error:
        print(f"ep.py: {error.message}", file=sys.stderr)
        return 1
    out = Console(width=240)
    out.print(show_rows(rows))
    out.print(show_ratios(rows))
    if args.json is not None:
        sizes = {s.name: [s.hidden, s.intermediate] for s in args.sources}
        raw = {
            "cores": os.cpu_count(),
            "tokens": args.tokens,
            "hidden_and_intermediate": sizes,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0
