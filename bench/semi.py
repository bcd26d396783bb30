"""First tokens and gaps of chats beside documents: prompts in a process of their own, or not.

    python bench/semi.py [--model FOLDER] [--seconds S] [--rounds N] [--chats R] [--documents R]
                         [--out FILE]

The whole engine in this process, on the wall clock. Chats (a short prompt, 64 tokens of answer) and
documents (a long prompt, 8 tokens) come by themselves, at so many a second, drawn once and the same
for all: in chunks of 512, in chunks that keep a target between tokens, with ``--split semi``, and
with that and a target to the first token, by which short prompts go first.
Ways alternate over the rounds; figures are of all rounds together. Every way makes the same tokens,
which is checked. Without ``--model`` it is the shipped model, packed into a folder for the time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.config.options import EngineOptions, LoadOptions
from moeserve.core import Event, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.kernels.select import choose_ops
from moeserve.models.library import resolve_model
from moeserve.models.packed.writer import pack_model

WAIT_S = 300.0
CHAT, CHAT_ANSWER, DOCUMENT_ANSWER = 32, 64, 8
WAYS: Mapping[str, Mapping[str, Any]] = {
    "chunks of 512": {},
    "TPOT 30 ms": {"tpot_target": 30},
    "split": {"split": "semi"},
    "split, TTFT 300 ms": {"split": "semi", "ttft_target": 300},
}


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds, of chats' and documents' first tokens, and between two tokens of chats."""

    way: str
    requests: int
    ttft_chat_p50: float
    ttft_chat_p95: float
    ttft_document_p50: float
    ttft_document_p95: float
    gap_p50: float
    gap_p95: float
    gap_p99: float
    gap_longest: float
    tokens_s: float


@dataclass
class Stream:
    """A sink that notes when tokens came."""

    document: bool
    asked: float = 0.0
    at: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            self.at += [now] * len(event.token_ids)
            self.token_ids += event.token_ids
            if event.finish is not None:
                self.ended.set()


@dataclass(frozen=True)
class Arrival:
    """``at`` seconds after the start."""

    at: float
    prompt: tuple[int, ...]
    document: bool


def draw(seconds: float, chats: float, documents: float, long: int, vocab: int) -> list[Arrival]:
    """Poisson arrivals of both kinds."""
    rng, found = random.Random(5), []
    for rate, document in ((chats, False), (documents, True)):
        at = rng.expovariate(rate)
        while at < seconds:
            length = rng.randrange(long // 2, long) if document else CHAT
            prompt = tuple(rng.randrange(1, vocab) for _ in range(length))
            found.append(Arrival(at, prompt, document))
            at += rng.expovariate(rate)
    return sorted(found, key=lambda arrival: arrival.at)


def run(loaded: LoadedModel, arrivals: Sequence[Arrival]) -> tuple[list[Stream], float]:
    """The streams, and how long it took."""
    streams, began = [], time.perf_counter()
    for number, arrival in enumerate(arrivals):
        time.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        answer = DOCUMENT_ANSWER if arrival.document else CHAT_ANSWER
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        stream = Stream(arrival.document, time.perf_counter())
        request = Request(RequestId(f"r{number}"), arrival.prompt, params, time.monotonic())
        loaded.engine.submit(request, stream)
        streams.append(stream)
    for stream in streams:
        if not stream.ended.wait(WAIT_S):
            raise SystemExit("the engine does not answer")
    return streams, time.perf_counter() - began


def row_of(way: str, streams: Sequence[Stream], seconds: float) -> Row:
    firsts = {
        document: [s.at[0] - s.asked for s in streams if s.document is document]
        for document in (False, True)
    }
    gaps = [b - a for s in streams if not s.document for a, b in zip(s.at, s.at[1:], strict=False)]
    return Row(
        way,
        len(streams),
        *(share(firsts[False], q) for q in (50, 95)),
        *(share(firsts[True], q) for q in (50, 95)),
        *(share(gaps, q) for q in (50, 95, 99)),
        max(gaps, default=math.nan),
        sum(len(s.at) for s in streams) / seconds,
    )


def share(values: Sequence[float], percent: int) -> float:
    """NaN of none: a short run has no documents."""
    if len(values) < 2:
        return values[0] if values else math.nan
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(model: Path, seconds: float, rounds: int, chats: float, documents: float) -> list[Row]:
    came: dict[str, list[Stream]] = {way: [] for way in WAYS}
    took = dict.fromkeys(WAYS, 0.0)
    arrivals: list[Arrival] = []
    for r in range(rounds):
        for way in sorted(WAYS, reverse=bool(r % 2)):
            options = {"prefix_cache": False, "kv_memory": 1 << 28, **WAYS[way]}
            loaded = build_engine(EngineOptions(model=str(model), **options))
            try:
                long = loaded.max_model_len - DOCUMENT_ANSWER
                vocab = loaded.spec.vocab
                arrivals = arrivals or draw(seconds, chats, documents, long, vocab)
                run(loaded, arrivals[:2])  # what is first touched
                streams, whole = run(loaded, arrivals)
            finally:
                loaded.close()
            came[way] += streams
            took[way] += whole
    for streams in came.values():
        if [s.token_ids for s in streams] != [s.token_ids for s in came["chunks of 512"]]:
            raise SystemExit("the ways make different tokens")
    return [row_of(way, streams, took[way]) for way, streams in came.items()]


def show(rows: Sequence[Row]) -> None:
    table = Table("prompts", "chat TTFT p50", "p95", "document TTFT p50", "p95", "gap p50", "p95",
                  "p99", "longest", "tokens/s")  # fmt: skip
    for row in rows:
        way, _, *seconds, tokens_s = asdict(row).values()
        table.add_row(way, *(f"{1e3 * s:.0f} ms" for s in seconds), f"{tokens_s:.0f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/semi.py --seconds 15 --out bench/results/semi.json",
    )
    parser.add_argument("--model", type=Path, help="a packed folder")
    parser.add_argument("--seconds", type=float, default=15.0, help="that requests come for")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chats", type=float, default=2.0, help="a second")
    parser.add_argument("--documents", type=float, default=0.5, help="a second")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder) / "demo"
            pack_model(resolve_model("demo"), model, choose_ops(), LoadOptions())
        rows = measure(model, args.seconds, args.rounds, args.chats, args.documents)
    show(rows)
    if args.out is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        said = {"settings": settings, "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
