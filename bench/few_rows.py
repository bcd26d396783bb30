"""What a step of a few tokens of one sequence costs beside a step of one, and what a draft costs.

    python bench/few_rows.py [--model demo] [--tokens 1 2 3 4 6 8] [--drafts 1 3 5] [--context N]
                             [--rounds N] [--threads N] [--json] [--out FILE]

That is what speculation lives on: a step that checks k drafts has k + 1 tokens. The sequence is a
text that the model has told before, so that its tokens choose experts as they do when served; steps
of all sizes run in turn, three at a time, at another place of the text in each round. Microseconds,
medians over rounds, of this thread's CPU time; with several threads of wall time.

First whole steps of the model runner, and what of them is not in native calls. Then the same layers
part by part, each by a call of its own, which costs ten microseconds more. "chosen" are the routed
experts that some token of the step chose, mean over layers. Last, guesses of the model's own module
behind a step of one token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.core import BlockId, Chunk, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.mtp_drafts import MtpDrafts
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.ops import Part
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, ModelKvCache, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

BLOCK = 16
OPENING = "Once upon a time, there was a little girl named"
Runner = ModelRunner[ModelKvCache]
PARTS = ("embed", "attention", "router", "experts", "dense", "head")


@dataclass(frozen=True, slots=True)
class Told:
    """A request and the text that its model makes of it; ``blocks`` hold the KV of all of it."""

    request: Request
    token_ids: tuple[int, ...]
    blocks: tuple[BlockId, ...]

    def chunk(self, start: int, count: int, samples: int) -> Chunk:
        """Tokens of the text from ``start`` on."""
        made = self.token_ids[len(self.request.prompt_ids) : start + 1]
        part = self.token_ids[start : start + count]
        return Chunk(self.request, part, start, self.blocks, samples, made)


def tell(runner: Runner, prompt: Sequence[int], most: int) -> Told:
    """What the model makes of a prompt, greedily."""
    params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
    request = Request(RequestId("told"), tuple(prompt), params)
    told = Told(request, request.prompt_ids, tuple(map(BlockId, range(-(-most // BLOCK)))))
    start = 0
    while len(told.token_ids) < most:
        chunk = told.chunk(start, len(told.token_ids) - start, 1)
        sampled = runner.run(StepPlan((chunk,))).sampled[0]
        start = len(told.token_ids)
        told = replace(told, token_ids=(*told.token_ids, *sampled.token_ids))
    return told


class Watch:
    """Times by name, and by how many tokens the step had."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock
        self._times: dict[tuple[str, int], list[float]] = {}

    def note(self, name: str, size: int, value: float) -> None:
        self._times.setdefault((name, size), []).append(value)

    def median(self, name: str, size: int) -> float:
        return statistics.median(self._times[name, size])


def time_step(
    watch: Watch, runner: Runner, told: Told, start: int, size: int, guesses: int = 0
) -> None:
    """The last of three steps that follow each other, of which each checks ``size - 1`` drafts, or
    has guesses behind its one token."""
    output_ids = list(told.token_ids[len(told.request.prompt_ids) : start])
    name, key = ("drafted ", guesses) if guesses else ("", size)
    for at in range(start, start + 3):
        output_ids.append(told.token_ids[at])
        chunk = told.chunk(at, size, size)._replace(output_ids=output_ids)
        plan = StepPlan((chunk,), draft_next=guesses)
        native, began = _cpu.nanoseconds(), watch.clock()
        result = runner.run(plan)
        taken, native = watch.clock() - began, _cpu.nanoseconds() - native
    watch.note(f"{name}step", key, taken / 1e3)
    watch.note(f"{name}native", key, native / 1e3)
    assert not guesses or len(result.drafted[0].token_ids) == guesses, result


def time_parts(
    watch: Watch, decoder: Decoder, cache: ModelKvCache, told: Told, start: int, size: int
) -> None:
    """The decoder's operations, one after the other, summed over layers."""
    ops, clock = decoder.ops, watch.clock
    part = told.token_ids[start : start + size]
    step = pack_spans([Span(part, start, told.blocks, size)], BLOCK)
    shared = ops.new_step(decoder.rope, step.positions_T, step.slot_T, step.attention)
    spent = dict.fromkeys(PARTS, 0)
    experts: list[int] = []

    def timed(name: str, call: Callable[..., Any], *args: Any) -> Any:
        began = clock()
        found = call(*args)
        spent[name] += clock() - began
        return found

    x_TH = timed("embed", ops.embed, decoder.embedding_WH, step.token_ids_T)
    for layer, kv in zip(decoder.stack.layers, cache.layers, strict=False):
        timed("attention", ops.attend, x_TH, layer.attention, shared, kv)
        if isinstance(layer.mlp, Part):
            timed("dense", ops.dense, x_TH, layer.mlp)
            continue
        router, moe = layer.mlp
        routed = timed("router", ops.route, x_TH, router, shared)
        experts.append(len(routed.ids_TC.unique()))
        timed("experts", ops.moe, x_TH, moe, routed)
    timed("head", ops.head, x_TH, step.logit_rows_R, decoder.head)
    for name, value in spent.items():
        watch.note(name, size, value / 1e3)
    watch.note("chosen", size, statistics.mean(experts) if experts else 0.0)


def measure(decoder: Decoder, prompt: Sequence[int], args: argparse.Namespace) -> Watch:
    most = args.context + 2 * max(*args.tokens, *args.drafts) + 8
    blocks = -(-most // BLOCK)
    drafts = MtpDrafts(decoder, 1) if decoder.mtp is not None and args.drafts else None
    runner = ModelRunner(decoder, blocks, BLOCK, drafts=drafts)
    told = tell(runner, prompt, most)
    watch = Watch(time.thread_time_ns if args.threads == 1 else time.perf_counter_ns)
    first = len(told.request.prompt_ids)
    for i in range(args.rounds):
        start = first + i * 7 % max(1, args.context - first)
        for size in args.tokens:
            time_step(watch, runner, told, start, size)
        for size in args.tokens:
            time_parts(watch, decoder, runner.cache, told, start, size)
        for count in args.drafts if drafts else ():
            time_step(watch, runner, told, start, 1, count)
    return watch


@dataclass(frozen=True, slots=True)
class Row:
    """Of steps of so many tokens, microseconds; ``python`` is what is not in native calls."""

    tokens: int
    step: float
    python: float
    parts: dict[str, float]
    chosen: float


@dataclass(frozen=True, slots=True)
class Drafted:
    """``more``: what guesses cost beside the step by itself; ``python`` of that and the step."""

    count: int
    more: float
    python: float


def rows_of(
    watch: Watch, args: argparse.Namespace, drafts: bool
) -> tuple[list[Row], list[Drafted]]:
    rows = []
    for size in args.tokens:
        step, native = watch.median("step", size), watch.median("native", size)
        parts = {name: watch.median(name, size) for name in PARTS}
        rows.append(Row(size, step, step - native, parts, watch.median("chosen", size)))
    guessed = []
    for count in args.drafts if drafts else ():
        step, native = watch.median("drafted step", count), watch.median("drafted native", count)
        guessed.append(Drafted(count, step - rows[0].step, step - native))
    return rows, guessed


def show(rows: Sequence[Row], guessed: Sequence[Drafted], title: str) -> None:
    table = Table(title=title, box=SIMPLE)
    for head in ("tokens", "step", "of 1", "python", *PARTS, "chosen"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in rows:
        parts = (f"{r.parts[name]:.0f}" for name in PARTS)
        ratio = f"{r.step / rows[0].step:.2f}"
        table.add_row(
            str(r.tokens), f"{r.step:.0f}", ratio, f"{r.python:.0f}", *parts, f"{r.chosen:.1f}"
        )
    console = Console(width=110)
    console.print(table)
    for g in guessed:
        console.print(
            f"{g.count} guesses behind a step: {g.more:.0f} more, {g.more / rows[0].step:.2f} of a "
            f"step; python of both {g.python:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 3, 5])
    parser.add_argument("--context", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="keep that in a file too")
    args = parser.parse_args()
    path = resolve_model(args.model)
    decoder = load_decoder(path, choose_ops(threads=args.threads))
    _cpu.measure(True)
    watch = measure(decoder, Tokenizer.load(path).encode(OPENING), args)
    rows, guessed = rows_of(watch, args, drafts=decoder.mtp is not None)
    text = json.dumps(
        {"threads": _cpu.threads(), "rows": [*map(asdict, rows)], "drafts": [*map(asdict, guessed)]}
    )
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        show(rows, guessed, f"us of a step of one sequence, {_cpu.threads()} threads")


if __name__ == "__main__":
    main()
