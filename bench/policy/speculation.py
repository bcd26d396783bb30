"""Drafts of every kind on the production scheduler, runner and decoder: none, fixed numbers, or as
many as pay (``policies.py`` says what the schedules are).

Each schedule has a scheduler and a runner of its own, which stay: first they answer requests that
are not counted, then others in each round, so that what steps cost and how often guesses are right
is known, as it is in a server. No prompt comes twice, as far as there are so many. With a bound of
seconds for all, each case (model, domain, requests at once) has a share of what is left, by the
root of how many run at once: answers are as long as fits, and as many rounds as fit are run, one at
least.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.draft_model import DraftModel
from moeserve.engine.model_runner import DraftMaker, ModelRunner
from moeserve.engine.mtp_drafts import MtpDrafts
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.policies.made import MadeDrafts
from moeserve.engine.policies.ngrams import NgramDrafts
from moeserve.engine.policies.speculation import FixedDrafts, Speculation
from moeserve.engine.rates import is_decode
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_cost import DecodeCost, FittedStepCost
from moeserve.forecast.first_layers import cut
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

BLOCK = 16
FIXED = ("0", "1", "3", "5")
SCHEDULES = ("off", *FIXED, "chosen")
SOURCES = ("auto", "mtp", "ngram", "draft")
DOMAINS = ("stories", "sums", "code", "chat", "sampled")
OPENINGS = (
    "Once upon a time, there was a little {} named",
    "One day, a {} went to the park and saw",
    "There was a big {} who liked to",
    "A small {} lived in a house near the",
)
ANIMALS = "girl boy dog cat bird fish bear rabbit mouse frog duck horse cow pig".split()
KINDS = ("", "happy ", "clever ", "lazy ", "young ", "hungry ", "brave ")
QUESTIONS = (
    "Question: What does a {} eat?\nAnswer:",
    "Question: Why would a {} go to school?\nAnswer:",
    "Question: Can you tell me how a {} finds its way home?\nAnswer:",
)
# Of a prompt, the most tokens; of an answer, the fewest where time is short.
LONGEST_PROMPT, SHORTEST = 64, 12
# What all schedules of a round take, in times of the one without drafts, as a first guess.
COST_OF_ROUND = 1.5 * len(SCHEDULES)


@dataclass(frozen=True, slots=True)
class Domain:
    """Prompts of one kind."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    temperature: float


@dataclass(frozen=True)
class Model:
    """With what drafts for it: ``draft`` where ``source`` is a draft model."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    source: str
    draft: Decoder | None


@dataclass(frozen=True, slots=True)
class Run:
    """What one schedule made of a round's requests."""

    seconds: float
    made: int
    steps: int
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of rounds, sums of drafts; ``ratio`` is of tokens a second to those without drafts,
    in the same round. ``source`` is what really drafted."""

    model: str
    source: str
    domain: str
    batch: int
    schedule: str
    answer: int
    rounds: int
    tokens_per_s: float
    ratio: float
    least: float
    most: float
    per_step: float
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Tokens a second of ``chosen`` to those of the ``best`` fixed number, and of 0 to off; over
    all loads of a domain where ``batch`` is None, each load with as many tokens."""

    model: str
    domain: str
    batch: int | None
    best: str
    chosen: float
    zero: float


@dataclass(frozen=True, slots=True)
class Speculated:
    rows: list[Row]
    verdicts: list[Verdict]


def domains(tokenizer: Tokenizer, names: Sequence[str], chat: Path | None) -> list[Domain]:
    """The same for every model, as far as its tokens are; code is the standard library's."""
    code = inspect.getsource(argparse) + inspect.getsource(textwrap) + inspect.getsource(inspect)
    texts = {
        "stories": [o.format(k + a) for k, o, a in itertools.product(KINDS, OPENINGS, ANIMALS)],
        "sums": [
            f"{a * 37} + {a * 11 + 5} = {a * 48 + 5}\n{a * 29} - {a} =" for a in range(3, 400)
        ],
        "code": [f"    def {part[:200]}" for part in code.split("    def ")[1:]],
        "chat": [q.format(k + a) for k, q, a in itertools.product(KINDS, QUESTIONS, ANIMALS)],
    }
    if chat is not None:
        lines = chat.read_text(encoding="utf-8").splitlines()
        texts["chat"] = [f"Question: {json.loads(line)['turns'][0]}\nAnswer:" for line in lines]
    texts["sampled"] = texts["stories"]
    made = []
    for name in names:
        ids = [tuple(tokenizer.encode(text)[-LONGEST_PROMPT:]) for text in texts[name]]
        made.append(Domain(name, tuple(ids), 0.8 if name == "sampled" else 0.0))
    return made


def drafter_of(
    schedule: str, source: str, decodes: DecodeCost, steps: FittedStepCost
) -> Drafter | None:
    if schedule == "off":
        return None
    found = NgramDrafts() if source in ("auto", "ngram") else None
    made = None if source == "ngram" else MadeDrafts()
    if schedule == "chosen":
        return Speculation(found, decodes, steps, made=made)
    if schedule == "0":
        return Speculation(found, decodes, steps, most=0, made=made)
    return FixedDrafts(found, int(schedule), made)


def maker_of(model: Model, batch: int, blocks: int) -> DraftMaker | None:
    if model.source == "ngram":
        return None
    if model.draft is not None:
        return DraftModel(model.decoder, model.draft, blocks, BLOCK, 512)
    return MtpDrafts(model.decoder, batch)


class Serving:
    """A scheduler and a runner, with drafts by one schedule. Steps cost what ``clock`` says, which
    is learnt as the engine does it."""

    def __init__(
        self, model: Model, batch: int, longest: int, schedule: str, clock: Callable[[], float]
    ) -> None:
        self.counters = Counters()
        self.tokens: dict[RequestId, list[int]] = {}
        self._clock, self._decodes, self._steps = clock, DecodeCost(), FittedStepCost()
        blocks = batch * (longest // BLOCK + 2)
        drafter = drafter_of(schedule, model.source, self._decodes, self._steps)
        self._scheduler = Scheduler(
            SchedulerConfig(longest, batch, max(512, batch), prefix_cache=False),
            BlockPool(blocks, BLOCK, self.counters),
            self.counters,
            drafter=drafter,
        )
        drafts = None if drafter is None else maker_of(model, batch, blocks)
        self._runner = ModelRunner(model.decoder, blocks, BLOCK, drafts=drafts)

    def answer(self, prompts: Iterable[Sequence[int]], answer: int, temperature: float) -> Run:
        """All of them, so many at once."""
        before = replace(self.counters)
        for prompt in prompts:
            number = len(self.tokens)
            params = SamplingParams(
                temperature=temperature, max_tokens=answer, ignore_eos=True, seed=number
            )
            self.tokens[RequestId(str(number))] = []
            self._scheduler.add(Request(RequestId(str(number)), tuple(prompt), params))
        began = last = self._clock()
        while self._scheduler.has_work:
            plan = self._scheduler.plan(0.0)
            outs = self._scheduler.apply(self._runner.run(plan))
            now = self._clock()
            alone = now - last - self._decodes.drafting_s
            self._steps.note(plan.num_tokens, alone)
            if all(map(is_decode, plan.chunks)):
                self._decodes.note(plan.num_tokens, alone)
            last = now
            for out in outs:
                self.tokens[out.request_id].append(out.token_id)
        after = self.counters
        return Run(
            last - began,
            after.generated_tokens - before.generated_tokens,
            after.steps - before.steps,
            after.drafted_tokens - before.drafted_tokens,
            after.accepted_tokens - before.accepted_tokens,
        )


def sizes_of(
    model: Model, domain: Domain, batch: int, args: argparse.Namespace, share_s: float | None
) -> tuple[int, int]:
    """Requests of a round, and tokens of an answer, of which all rounds take no more than their
    share."""
    if share_s is None:
        return max(args.requests or 48, batch), args.answer
    asked = max(args.requests or 4, batch)
    serving = Serving(model, batch, LONGEST_PROMPT + SHORTEST, "off", time.perf_counter)
    for _ in range(2):  # the first has things to make
        seconds = serving.answer(domain.prompts[:batch], SHORTEST, domain.temperature).seconds
    of_each = batch + args.rounds * asked
    fits = int(share_s / (COST_OF_ROUND * seconds / (batch * SHORTEST) * of_each))
    return asked, max(SHORTEST, min(args.answer, fits))


def run_rounds(
    model: Model, domain: Domain, batch: int, args: argparse.Namespace, share_s: float | None
) -> tuple[int, dict[str, list[Run]]]:
    """Tokens of an answer, and the rounds of each schedule, all with the same requests."""
    began = time.perf_counter()
    asked, answer = sizes_of(model, domain, batch, args, share_s)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    longest = max(map(len, domain.prompts)) + answer
    all_of = {name: Serving(model, batch, longest, name, clock) for name in SCHEDULES}
    prompts = itertools.cycle(domain.prompts)
    first = tuple(itertools.islice(prompts, batch))
    for serving in all_of.values():
        serving.answer(first, answer, domain.temperature)
    runs: dict[str, list[Run]] = {schedule: [] for schedule in SCHEDULES}
    for done in range(args.rounds):
        taken = time.perf_counter() - began
        if share_s is not None and done and taken * (done + 2) / (done + 1) > share_s:
            break
        these = tuple(itertools.islice(prompts, asked))
        for name, serving in all_of.items():
            runs[name].append(serving.answer(these, answer, domain.temperature))
    for name, serving in all_of.items():
        if serving.tokens != all_of["off"].tokens:
            raise SystemExit(f"{domain.name}, batch {batch}, {name}: other tokens than off")
    return answer, runs


def rows_of(
    model: Model, domain: Domain, batch: int, args: argparse.Namespace, share_s: float | None
) -> list[Row]:
    answer, runs = run_rounds(model, domain, batch, args, share_s)
    plain = runs["off"]
    rows = []
    for schedule, made in runs.items():
        ratios = [off.seconds / one.seconds for off, one in zip(plain, made, strict=True)]
        rows.append(
            Row(
                model.name,
                model.source,
                domain.name,
                batch,
                schedule,
                answer,
                len(made),
                statistics.median(one.made / one.seconds for one in made),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                sum(one.steps for one in plain) / sum(one.steps for one in made),
                sum(one.drafted for one in made),
                sum(one.accepted for one in made),
            )
        )
    return rows


def open_model(name: str, args: argparse.Namespace) -> Model:
    path = resolve_model(name)
    decoder = load_decoder(path, choose_ops(threads=args.threads))
    source, draft = args.source, None
    if source is None:
        source = "ngram" if decoder.mtp is None else "auto"
        source = "draft" if args.draft_model or args.draft_layers else source
    if source in ("mtp", "auto") and decoder.mtp is None:
        source = "ngram"
    if source == "draft" and args.draft_model is not None:
        draft = replace(load_decoder(resolve_model(args.draft_model), decoder.ops), mtp=None)
    elif source == "draft":
        layers = decoder.spec.layers[: args.draft_layers]
        draft = cut(decoder, replace(decoder.spec, layers=layers, mtp=None))
    return Model(name, decoder, Tokenizer.load(path), source, draft)


def speculation(args: argparse.Namespace) -> Speculated:
    end = None if args.seconds is None else time.perf_counter() + args.seconds
    cases = list(itertools.product(args.model, args.domains, args.batch))
    rows: list[Row] = []
    model: Model | None = None
    for at, (name, domain, batch) in enumerate(
        track(cases, "speculation", console=Console(stderr=True))
    ):
        if model is None or model.name != name:
            model = open_model(name, args)
        share_s = None
        if end is not None:
            left = sum(math.sqrt(of) for _, _, of in cases[at:])
            share_s = (end - time.perf_counter()) * math.sqrt(batch) / left
        (asked,) = domains(model.tokenizer, [domain], args.chat)
        rows += rows_of(model, asked, batch, args, share_s)
    return Speculated(rows, verdicts_of(rows))


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """Of each load, then of all loads of a domain."""
    found: list[Verdict] = []
    for (model, domain), group in itertools.groupby(rows, lambda row: (row.model, row.domain)):
        taken: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
        batches = []
        for row in group:
            taken[row.schedule].append(1 / row.tokens_per_s)
            batches += [row.batch] if row.schedule == "off" else []
        loads = [{name: one[i] for name, one in taken.items()} for i in range(len(batches))]
        everything = {name: sum(one) for name, one in taken.items()}
        for batch, load in [*zip(batches, loads, strict=True), (None, everything)]:
            best = min(FIXED, key=load.__getitem__)
            chosen, zero = load[best] / load["chosen"], load["off"] / load["0"]
            found.append(Verdict(model, domain, batch, best, chosen, zero))
    return found


def show_speculation(found: Speculated) -> None:
    table = Table(box=SIMPLE)
    names = ("model", "domain", "batch", "drafts", "tokens/s", "to off", "fewer steps", "right")
    for name in names:
        table.add_column(name, justify="left" if name in ("domain", "drafts") else "right")
    for row in found.rows:
        table.add_row(
            Path(row.model).name,
            row.domain,
            str(row.batch),
            row.schedule,
            f"{row.tokens_per_s:,.0f}",
            f"{row.ratio:.2f} ({row.least:.2f}-{row.most:.2f})",
            f"{row.per_step:.2f}x",
            f"{row.accepted / row.drafted:.0%}" if row.drafted else "-",
        )
    console = Console(width=110)
    console.print(table)
    for one in found.verdicts:
        load = "all loads" if one.batch is None else f"{one.batch} at once"
        console.print(
            f"{Path(one.model).name}, {one.domain}, {load}: chosen is {one.chosen:.2f} times the "
            f"best fixed number ({one.best}); 0 is {one.zero:.2f} times off"
        )
