"""Answers in a given form: whether they have it, and what it costs.

    python bench/grammars.py schemas [--count N] [--seed N] [--json]
    python bench/grammars.py cost [--model FOLDER] [--rounds N] [--json]

``schemas`` draws JSON Schemas up to eight levels deep, has the shipped model answer each of them,
16 at a time, and validates what was finished with another library. Where an answer is cut off by
its length there is nothing to validate. Exit status 1 if an answer is not valid.

``cost`` decodes 16 streams with and without a grammar in turn, in many short rounds, and compares
the quarter of their steps that ended soonest: what else the machine does only makes a step longer.
``anything`` allows every token but the end; ``records`` is JSON, of which a model that is not asked
for JSON writes a lot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hypothesis.strategies as st
import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from moeserve.core import Counters, FinishReason, Grammar, GrammarKind, RequestId, SamplingParams
from moeserve.core import Request as EngineRequest
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import InvalidRequestError
from moeserve.grammar.checking import GrammarChecker
from moeserve.grammar.masks import GrammarMasks, MaskCounts
from moeserve.grammar.worker import Vocabulary
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

BLOCK, STREAMS, DEEPEST = 16, 16, 8
ANSWER = 384  # tokens of an answer to a schema, at most
DECODED = 48  # tokens of each stream where the cost is measured
Schema = dict[str, Any]

ANYTHING = Grammar(GrammarKind.REGEX, "(.|\n)*@@@@@@")
RECORDS = Grammar(
    GrammarKind.JSON_SCHEMA,
    json.dumps(
        {
            "type": "array",
            "minItems": 200,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["name", "age", "tags"],
                "additionalProperties": False,
            },
        }
    ),
)

# 1. Schemas.
names = st.sampled_from(["a", "b", "name", "with space", "é", 'quo"te', "$x", "items", "type"])
values = st.none() | st.booleans() | st.integers(-99, 99) | st.text('abcé \n"\\', max_size=8)
formats = st.sampled_from(["ipv4", "uuid"])  # as dates it lets 0000-02-30 pass
patterns = st.sampled_from(["^[a-z]{1,6}$", "^x+$", "^(a|b)*c$", "^[0-9]{3}-[0-9]{2}$"])


def bounded(low: str, high: str, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    """Either bound, both or none; the lower one first."""

    def bounds(pair: tuple[Any, Any]) -> Schema:
        known = sorted(x for x in pair if x is not None)
        if len(known) == 2:
            return {low: known[0], high: known[1]}
        return {} if not known else {low if pair[0] is not None else high: known[0]}

    return st.tuples(st.none() | numbers, st.none() | numbers).map(bounds)


def leaves() -> st.SearchStrategy[Schema]:
    integers = bounded("minimum", "maximum", st.integers(-1000, 1000))
    reals = bounded("minimum", "maximum", st.integers(-4000, 4000).map(lambda x: x / 4))
    lengths = bounded("minLength", "maxLength", st.integers(0, 12))
    return st.one_of(
        lengths.map(lambda b: {"type": "string", **b}),
        patterns.map(lambda p: {"type": "string", "pattern": p}),
        formats.map(lambda f: {"type": "string", "format": f}),
        integers.map(lambda b: {"type": "integer", **b}),
        reals.map(lambda b: {"type": "number", **b}),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
        st.lists(values, min_size=1, max_size=5).map(lambda v: {"enum": v}),
        values.map(lambda v: {"const": v}),
    )


def objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    @st.composite
    def build(draw: st.DrawFn) -> Schema:
        properties = draw(st.dictionaries(names, inner, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        more = draw(
            st.sampled_from([{"additionalProperties": False}, {}])
            | inner.map(lambda s: {"additionalProperties": s})
        )
        return {"type": "object", "properties": properties, "required": required, **more}

    return build()


def arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    sizes = bounded("minItems", "maxItems", st.integers(0, 3))
    plain = st.tuples(inner, sizes).map(lambda p: {"type": "array", "items": p[0], **p[1]})
    fixed = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": len(items),
        }
    )
    return plain | fixed


def schemas(depth: int) -> st.SearchStrategy[Schema]:
    """Just so many levels deep on at least one way down, but for what may be left out."""
    if not depth:
        return leaves()
    inner = st.deferred(lambda: schemas(depth - 1))
    either = st.lists(inner | leaves(), min_size=1, max_size=2).map(lambda s: {"anyOf": s})
    referred = inner.map(lambda s: {"$ref": "#/$defs/d", "$defs": {"d": s}})
    kinds = [objects(inner), arrays(inner), either]
    return st.one_of(*kinds) if depth < DEEPEST else st.one_of(*kinds, referred)


def drawn_schemas(count: int, chosen: int) -> list[Schema]:
    found: list[Schema] = []

    @seed(chosen)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, DEEPEST).flatmap(schemas))
    def collect(schema: Schema) -> None:
        found.append(schema)

    while len(found) < count:
        collect()
    return found[:count]


# 2. The engine.
@dataclass(frozen=True, slots=True)
class Model:
    decoder: Decoder
    tokenizer: Tokenizer
    vocabulary: Vocabulary


def load(name: str) -> Model:
    folder = resolve_model(name)
    decoder, tokenizer = load_decoder(folder, ops=choose_ops()), Tokenizer.load(folder)
    words = Vocabulary(folder / "tokenizer.json", decoder.spec.vocab, tokenizer.eos_ids)
    return Model(decoder, tokenizer, words)


def run(
    model: Model, asked: Sequence[SamplingParams], prompt: tuple[int, ...]
) -> tuple[dict[str, list[int]], dict[str, FinishReason | None], MaskCounts, list[float]]:
    """Tokens and ends by request, and the seconds of each step from the third on, when all are
    there and what starts with the first grammar has started."""
    counters, longest = Counters(), max(params.max_tokens for params in asked) + len(prompt)
    blocks = STREAMS * (longest // BLOCK + 1)
    eos = frozenset(model.tokenizer.eos_ids)
    config = SchedulerConfig(longest + 1, STREAMS, 512, len(asked), eos, prefix_cache=False)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK, counters), counters)
    masks = GrammarMasks(model.vocabulary)
    runner = ModelRunner(model.decoder, blocks, BLOCK, eos, masks=masks)
    for i, params in enumerate(asked):
        scheduler.add(EngineRequest(RequestId(str(i)), prompt, params))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    ends: dict[str, FinishReason | None] = {}
    times: list[float] = []
    began = time.perf_counter()
    for step, outcome in enumerate(drive(scheduler, runner)):
        outcome.raise_failure()
        for out in outcome.outs:
            tokens[out.request_id].append(out.token_id)
            ends[out.request_id] = out.finish
        ended = time.perf_counter()
        if step > 1:
            times.append(ended - began)
        began = ended
    masks.close()
    return tokens, ends, masks.counts, times


# 3. What is asked of it.
@dataclass(frozen=True, slots=True)
class SchemaReport:
    """``refused`` at the door; ``cut`` by their length; ``wrong`` are finished, and not valid."""

    schemas: int
    refused: int
    finished: int
    cut: int
    wrong: int
    masks: int
    workers: int
    tokens: int


def check_schemas(model: Model, count: int, chosen: int) -> SchemaReport:
    checker = GrammarChecker(model.vocabulary)
    taken: list[Schema] = []
    for schema in drawn_schemas(count, chosen):
        try:
            checker.check(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
            taken.append(schema)
        except InvalidRequestError as error:
            print(f"refused: {error.message}\n  {json.dumps(schema)}", file=sys.stderr)
    checker.close()
    asked = [
        SamplingParams(
            max_tokens=ANSWER,
            seed=i,
            grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)),
        )
        for i, schema in enumerate(taken)
    ]
    prompt = tuple(model.tokenizer.encode("An answer in JSON: "))
    tokens, ends, counts, _ = run(model, asked, prompt)
    finished = [i for i, end in ends.items() if end is FinishReason.STOP]
    wrong = 0
    for i in finished:
        text = model.tokenizer.decode(tokens[i])
        try:
            validate(json.loads(text), taken[int(i)])
        except (ValueError, jsonschema.ValidationError) as error:
            wrong += 1
            reason = str(error).splitlines()[0]
            print(f"wrong: {reason}\n  {json.dumps(taken[int(i)])}\n  {text!r}", file=sys.stderr)
    made = sum(map(len, tokens.values()))
    cut = len(taken) - len(finished)
    return SchemaReport(
        count, count - len(taken), len(finished), cut, wrong, counts.masks, counts.workers, made
    )


def validate(value: Any, schema: Schema) -> None:
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


@dataclass(frozen=True, slots=True)
class CostRow:
    """Tokens per second; ``cost`` is time with the grammar over time without, less one."""

    grammar: str
    without: float
    with_it: float
    cost: float


def measure_cost(model: Model, rounds: int) -> list[CostRow]:
    prompt = tuple(range(1, 17))
    free = SamplingParams(max_tokens=DECODED, temperature=0, ignore_eos=True)
    bound = {
        name: SamplingParams(max_tokens=DECODED, temperature=0, grammar=grammar)
        for name, grammar in (("anything", ANYTHING), ("records", RECORDS))
    }
    times: dict[str, list[float]] = {name: [] for name in ("", *bound)}
    for r in range(rounds + 1):
        for name in times if r % 2 else reversed(times):
            tokens, _, _, took = run(model, [bound.get(name, free)] * STREAMS, prompt)
            assert all(len(t) == DECODED for t in tokens.values()), "an answer ended early"
            if r:  # the first round warms up
                times[name] += took
    fastest = {name: statistics.quantiles(all_of, n=4)[0] for name, all_of in times.items()}
    rates = {name: STREAMS / seconds for name, seconds in fastest.items()}
    return [CostRow(n, rates[""], rates[n], fastest[n] / fastest[""] - 1) for n in bound]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("schemas", "cost"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)
    model = load(options.model)
    if options.what == "schemas":
        report = check_schemas(model, options.count, options.seed)
        print(json.dumps(asdict(report)))
        return 1 if report.wrong else 0
    rows = measure_cost(model, options.rounds)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    table = Table("grammar", "without, tok/s", "with, tok/s", "cost")
    for row in rows:
        table.add_row(row.grammar, f"{row.without:.0f}", f"{row.with_it:.0f}", f"{row.cost:+.1%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
