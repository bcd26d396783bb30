"""The scheduler's policies, each beside the plain scheduler: the same requests, the same tokens.

    python bench/policies.py speculation [--model demo MODEL ...] [--source auto|mtp|ngram|draft]
                                         [--draft-model MODEL | --draft-layers N] [--seconds N]
                                         [--domains stories sums code chat sampled] [--chat FILE]
                                         [--batch 1 4 8 16 32] [--requests N] [--answer N]
                                         [--rounds N] [--threads N] [--clock wall|cpu] [--json]
    python bench/policies.py admission [--lengths FILE.csv ...] [--requests N] [--json]
    python bench/policies.py targets [--lengths FILE.csv ...] [--requests N] [--json]
                                     [--wall [--model demo] [--threads N]]
    python bench/policies.py swap [--lengths FILE.csv ...] [--requests N] [--json]
    python bench/policies.py fairness [--requests N] [--json]
    python bench/policies.py layered [--model demo] [--prompt N] [--step N] [--batch 1 8 32]
                                     [--temperature X] [--rounds N] [--threads N] [--json]

`--out FILE` keeps the figures of any as JSON.

speculation: drafts of the model's own module (mtp), of a draft model (draft: of the model itself
or its first layers, where no other is named), looked up (ngram) or of the module and looked up
(auto, of which fixed numbers are the module's; ``policy/speculation.py``): "off" is without, "0"
with all that chooses and never one, 1, 3 and 5 for everybody, or "chosen": as many as pay
(`--speculation`), at each number of requests at once. Stories repeat what others told, sums less
so, and what is sampled at temperature 0.8 hardly does; code is the standard library's, `--chat`
takes a file of questions (JSON lines with "turns"). Schedules run in turn, round after round, on
other requests each time, behind some that are not counted; the table shows medians of tokens a
second beside those without drafts (least and most of the rounds' ratios), how many times fewer the
steps are, and how many drafts were right. All must make equal tokens. `--clock cpu` counts seconds
that the process computed, for a machine that others use too: of one thread (`--threads 1`) these
mean the same. `--seconds` bounds the whole: answers are as long, and rounds as many, as fit. Last
it says of each load, and of all together, how near what is chosen comes to the best fixed number,
and 0 to off.

admission: who starts when KV is short, without a model (``policy/admission.py``): as blocks are
free, with room for the longest answer, and as answers were lately (the default). Lengths are drawn
(lognormal), or those of a trace: CSV with the columns ContextTokens and GeneratedTokens (Azure's)
or `Request tokens` and `Response tokens` (BurstGPT's). Counters are exact; seconds are modelled.

targets: the first token sooner at gaps between tokens that are no longer, under a simulated clock
(``policy/targets.py``): first come, first served with chunks of each size, and targets of latency.
Arrivals are drawn, or those of a trace, pressed to loads of a half to 85 %.

swap: what comes of the KV of preempted requests (``policy/swap.py``): computed again, or copied to
host memory, block by block or in long runs and only what is new. Likewise modelled.

fairness: service between tenants, of whom one floods (``policy/fairness.py``). Likewise modelled.

layered: a prompt of N tokens beside requests that generate, in chunks, in groups of layers and as
`--prefill-mode auto` has it (``policy/layered.py``), with N tokens in a step: experts loaded beside
what was predicted, the largest step, the first token's time, and what a model says of energy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from policy.admission import admission, cases_of, show_admitted
from policy.fairness import fairness, show_shared
from policy.layered import layered, show_layered
from policy.speculation import DOMAINS, SOURCES, show_speculation, speculation
from policy.swap import show_given, swap
from policy.targets import LatencyRow, show_targets, targets, targets_by_the_clock

from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import load_decoder
from moeserve.models.library import resolve_model


def targets_of(args: argparse.Namespace) -> list[LatencyRow]:
    if not args.wall:
        return targets(args.lengths, args.requests or 400)
    decoder = load_decoder(resolve_model(args.model), choose_ops(threads=args.threads))
    return targets_by_the_clock(decoder, args.requests or 60)


# What each policy is measured by, and how that is shown.
POLICIES: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any], None]]] = {
    "speculation": (speculation, show_speculation),
    "admission": (lambda args: admission(args.lengths, args.requests or 800), show_admitted),
    "targets": (targets_of, show_targets),
    "swap": (lambda args: swap(cases_of(args.lengths, args.requests or 400)), show_given),
    "fairness": (lambda args: fairness(args.requests or 200), show_shared),
    "layered": (layered, show_layered),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Policies of the scheduler, beside none.")
    parser.add_argument("policy", choices=POLICIES)
    parser.add_argument("--lengths", type=Path, nargs="+", default=[])
    parser.add_argument(
        "--model", nargs="+", default=["demo"], help="several, to speculate; else one"
    )
    parser.add_argument("--draft-model", help="for --source draft; default: the model itself")
    parser.add_argument("--draft-layers", type=int, metavar="N", help="its first N layers alone")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--chat", type=Path, metavar="FILE", help="questions, as JSON lines")
    parser.add_argument("--seconds", type=float, help="to speculate, of all together")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument(
        "--requests",
        type=int,
        help="48 to speculate, or as many as run at once; 800 to admit; 400 for targets",
    )
    parser.add_argument("--prompt", type=int, default=960)
    parser.add_argument("--step", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--answer", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--source", choices=SOURCES, help="auto if it can")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wall", action="store_true", help="targets: on a model, by the clock")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    args = parser.parse_args()
    if args.policy != "speculation":
        if len(args.model) > 1:
            parser.error("--model: one, but to speculate")
        (args.model,) = args.model
    make, show_rows = POLICIES[args.policy]
    rows = make(args)
    if args.policy == "speculation":
        told: Any = {"source": args.source, "clock": args.clock, **asdict(rows)}
    else:
        told = [asdict(row) for row in rows]
    text = json.dumps(told, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text) if args.json else show_rows(rows)


if __name__ == "__main__":
    main()
