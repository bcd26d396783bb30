"""The scheduler's policies, each beside the plain scheduler: the same requests, the same tokens.

    python bench/policies.py speculation [--model demo] [--source auto|mtp|ngram] [--batch 1 4 8]
                                         [--requests N] [--answer N] [--rounds N] [--threads N]
                                         [--clock wall|cpu] [--json]
    python bench/policies.py admission [--lengths FILE.csv ...] [--requests N] [--json]
    python bench/policies.py targets [--lengths FILE.csv ...] [--requests N] [--json]
                                     [--wall [--model demo] [--threads N]]
    python bench/policies.py swap [--lengths FILE.csv ...] [--requests N] [--json]
    python bench/policies.py fairness [--requests N] [--json]
    python bench/policies.py layered [--model demo] [--prompt N] [--step N] [--batch 1 8 32]
                                     [--temperature X] [--rounds N] [--threads N] [--json]

`--out FILE` keeps the figures of any as JSON.

speculation: drafts of the model's own module (mtp), looked up (ngram) or both (auto, of which fixed
numbers are the module's): "off" is without, "0" with all that chooses and never one, 1, 3 and 5 for
everybody, or "chosen": as many as pay (`--speculation`), at each number of requests at once.
Stories repeat what others told, sums less so, and what is sampled at temperature 0.8 hardly does.
Schedules run in turn, round after round; the table shows medians of tokens a second beside those
without drafts (least and most of the rounds' ratios), how many times fewer the steps are, and how
many drafts were right. All must make equal tokens. `--clock cpu` counts seconds that the process
computed, for a machine that others use too: of one thread (`--threads 1`) these mean the same.

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
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from policy.admission import admission, cases_of, show_admitted
from policy.fairness import fairness, show_shared
from policy.layered import layered, show_layered
from policy.swap import show_given, swap
from policy.targets import LatencyRow, show_targets, targets, targets_by_the_clock
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.mtp_drafts import MtpDrafts
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import FixedDrafts, Speculation
from moeserve.engine.rates import is_decode
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, FittedStepCost
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

BLOCK = 16
SCHEDULES = ("off", "0", "1", "3", "5", "chosen")
OPENINGS = (
    "Once upon a time, there was a little {} named",
    "One day, a {} went to the park and saw",
    "There was a big {} who liked to",
    "A small {} lived in a house near the",
)
ANIMALS = "girl boy dog cat bird fish bear rabbit mouse frog duck horse cow pig".split()


@dataclass(frozen=True, slots=True)
class Domain:
    """Prompts of one kind."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class Run:
    """What one schedule made of a domain's requests; ``tokens`` of each."""

    seconds: float
    counters: Counters
    tokens: Mapping[RequestId, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians; ``ratio`` is of tokens a second to those without drafts, in the same round."""

    domain: str
    batch: int
    schedule: str
    tokens_per_s: float
    ratio: float
    least: float
    most: float
    per_step: float
    drafted: int
    accepted: int


def domains(tokenizer: Tokenizer, count: int) -> list[Domain]:
    """The same for every model, as far as its tokens are."""
    stories = [o.format(a) for o, a in itertools.product(OPENINGS, ANIMALS)]
    sums = [f"{a * 37} + {a * 11 + 5} = {a * 48 + 5}\n{a * 29} - {a} =" for a in range(3, 60)]
    encode = tokenizer.encode
    told = tuple(tuple(encode(text)) for text in itertools.islice(itertools.cycle(stories), count))
    asked = tuple(tuple(encode(text)) for text in itertools.islice(itertools.cycle(sums), count))
    return [Domain("stories", told, 0.0), Domain("sums", asked, 0.0), Domain("sampled", told, 0.8)]


def drafter_of(
    schedule: str, source: str, decodes: DecodeCost, steps: FittedStepCost
) -> Drafter | None:
    if schedule == "off":
        return None
    found = None if source == "mtp" else NgramDrafts()
    made = None if source == "ngram" else MadeDrafts()
    if schedule == "chosen":
        return Speculation(found, decodes, steps, made=made)
    if schedule == "0":
        return Speculation(found, decodes, steps, most=0, made=made)
    return FixedDrafts(found, int(schedule), made)


def run(
    decoder: Decoder,
    domain: Domain,
    batch: int,
    answer: int,
    schedule: str,
    source: str = "ngram",
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """All requests, so many at once. What steps cost is learnt as the engine does it."""
    counters, decodes, steps = Counters(), DecodeCost(), FittedStepCost()
    longest = max(map(len, domain.prompts)) + answer
    blocks = batch * (longest // BLOCK + 2)
    config = SchedulerConfig(longest, batch, max(512, batch), prefix_cache=False)
    drafter = drafter_of(schedule, source, decodes, steps)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters, drafter=drafter)
    makes = drafter is not None and source != "ngram"
    drafts = MtpDrafts(decoder, batch) if makes else None
    runner = ModelRunner(decoder, blocks, BLOCK, drafts=drafts)
    tokens: dict[RequestId, list[int]] = {}
    for i, prompt in enumerate(domain.prompts):
        params = SamplingParams(
            temperature=domain.temperature, max_tokens=answer, ignore_eos=True, seed=i
        )
        scheduler.add(Request(RequestId(str(i)), prompt, params))
        tokens[RequestId(str(i))] = []
    began = last = clock()
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        outs = scheduler.apply(runner.run(plan))
        now = clock()
        alone = now - last - decodes.drafting_s
        steps.note(plan.num_tokens, alone)
        if all(map(is_decode, plan.chunks)):
            decodes.note(plan.num_tokens, alone)
        last = now
        for out in outs:
            tokens[out.request_id].append(out.token_id)
    return Run(last - began, counters, tokens)


def rows_of(decoder: Decoder, domain: Domain, batch: int, args: argparse.Namespace) -> list[Row]:
    asked = max(args.requests or 48, batch)
    domain = replace(domain, prompts=domain.prompts[:asked])
    runs: dict[str, list[Run]] = {schedule: [] for schedule in SCHEDULES}
    for _ in range(args.rounds):
        for schedule in SCHEDULES:
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            one = run(decoder, domain, batch, args.answer, schedule, args.source, clock)
            runs[schedule].append(one)
    plain = runs["off"]
    rows = []
    for schedule, made in runs.items():
        if any(one.tokens != plain[0].tokens for one in made):
            raise SystemExit(f"{domain.name}, batch {batch}, {schedule}: other tokens than off")
        count = made[-1].counters
        ratios = [off.seconds / one.seconds for off, one in zip(plain, made, strict=True)]
        seconds = statistics.median(one.seconds for one in made)
        rows.append(
            Row(
                domain.name,
                batch,
                schedule,
                count.generated_tokens / seconds,
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                plain[0].counters.steps / count.steps,
                count.drafted_tokens,
                count.accepted_tokens,
            )
        )
    return rows


def speculation(args: argparse.Namespace) -> list[Row]:
    path = resolve_model(args.model)
    decoder = load_decoder(path, choose_ops(threads=args.threads))
    if args.source is None:
        args.source = "ngram" if decoder.mtp is None else "auto"
    cases = [
        (domain, batch)
        for domain in domains(Tokenizer.load(path), max(args.requests or 48, *args.batch))
        for batch in args.batch
    ]
    rows: list[Row] = []
    for domain, batch in track(cases, "speculation", console=Console(stderr=True)):
        rows += rows_of(decoder, domain, batch, args)
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table(box=SIMPLE)
    names = ("domain", "batch", "drafts", "tokens/s", "to off", "fewer steps", "right")
    for name in names:
        table.add_column(name, justify="left" if name in ("domain", "drafts") else "right")
    for row in rows:
        table.add_row(
            row.domain,
            str(row.batch),
            row.schedule,
            f"{row.tokens_per_s:,.0f}",
            f"{row.ratio:.2f} ({row.least:.2f}-{row.most:.2f})",
            f"{row.per_step:.2f}x",
            f"{row.accepted / row.drafted:.0%}" if row.drafted else "-",
        )
    Console().print(table)


def targets_of(args: argparse.Namespace) -> list[LatencyRow]:
    if not args.wall:
        return targets(args.lengths, args.requests or 400)
    decoder = load_decoder(resolve_model(args.model), choose_ops(threads=args.threads))
    return targets_by_the_clock(decoder, args.requests or 60)


# What each policy is measured by, and how that is shown.
POLICIES: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any], None]]] = {
    "speculation": (speculation, show),
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
    parser.add_argument("--model", default="demo")
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
    parser.add_argument("--source", choices=["auto", "mtp", "ngram"], help="auto if it can")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wall", action="store_true", help="targets: on a model, by the clock")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    args = parser.parse_args()
    make, show_rows = POLICIES[args.policy]
    rows = make(args)
    told: Any = [asdict(row) for row in rows]
    if args.policy == "speculation":
        told = {"model": args.model, "source": args.source, "clock": args.clock, "rows": told}
    text = json.dumps(told, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text) if args.json else show_rows(rows)


if __name__ == "__main__":
    main()
