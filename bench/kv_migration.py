"""How long a request stalls when it moves to another member while it runs.

    python bench/kv_migration.py [--model DIR] [--context 128 1024 4096] [--moves 5] [--out FILE]

Two ranks with one model (the demo model), which serve one another over gRPC, in one process: so
they share its interpreter and its cores, and times are an upper bound. Another request decodes at
the source all the while, by whose steps the stall is counted: those between the last token that the
moving request gets there and the first that it gets at its target. ``moved_ms`` of ``ms`` is until
the target's engine has the request; the rest is that engine's first step. One JSON line per
context: the median and the most of the moves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.core import Counters, Event, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.loop import Engine, EngineLock
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.rates import StepRates
from moeserve.engine.request_state import EventSink
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import NEW, History, KvSource
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.pools.kv.arrivals import Arrivals
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import ServedTerms

RUN, HOST, BLOCK, CHUNK, LONGEST = b"bench", "127.0.0.1", 16, 512, 8192
WAIT_S = 60.0


@dataclass
class Sink:
    """When each event came, and at which step of the source."""

    steps: Callable[[], int]
    tokens: list[int] = field(default_factory=list)
    at: list[tuple[float, int]] = field(default_factory=list)
    ended: bool = False

    def deliver(self, events: Sequence[Event], /) -> None:
        now = time.perf_counter(), self.steps()
        for event in events:
            self.tokens += event.token_ids
            self.at += [now] * len(event.token_ids)
            self.ended |= event.finish is not None

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        self.ended = True


class TimedExchange(KvExchange):
    """Knows when the engine got each request."""

    submitted: dict[RequestId, float]

    def submit(self, request: Request, sink: EventSink, history: History = NEW) -> None:
        self.submitted[request.id] = time.perf_counter()
        super().submit(request, sink, history)


class Rank:
    """An engine with a server, and what stands before it."""

    def __init__(self, decoder: Decoder) -> None:
        blocks, eos_ids = 2 * LONGEST // BLOCK, frozenset(decoder.spec.eos_ids)
        config = SchedulerConfig(LONGEST, 8, CHUNK, eos_ids=eos_ids)
        self.counted = Counters()
        scheduler = Scheduler(config, BlockPool(blocks, BLOCK, self.counted), self.counted)
        runner = ModelRunner(decoder, blocks, BLOCK, eos_ids)
        lock = EngineLock()
        self.engine = Engine(scheduler, runner, lock=lock)
        self.house = TimedExchange(
            self.engine, scheduler, lock, watch_kv(runner, decoder.ops), StepRates()
        )
        self.house.submitted = {}
        self.terms = ServedTerms("m", "model", decoder.spec.vocab, LONGEST)
        self.counters = KvCounters()
        self.port = 0
        self.arrivals: Arrivals


@contextlib.asynccontextmanager
async def rank(decoder: Decoder) -> AsyncIterator[Rank]:
    made = Rank(decoder)
    kv = KvServer(made.house, made.terms, made.counters)
    server, made.port = open_server(HOST, Trust(), RUN, [kv.handlers()])
    await server.start()
    channels = ChannelPool(Trust(), RUN)
    made.arrivals = Arrivals(made.house, made.terms, channels, made.counters)
    made.engine.start()
    try:
        yield made
    finally:
        await made.arrivals.close()
        await channels.close()
        await server.stop(None)
        await asyncio.to_thread(kv.close)
        await asyncio.to_thread(made.engine.stop)
        made.house.close()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not what():  # noqa: ASYNC110 - told on other threads
            await asyncio.sleep(0.001)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(256, (length,), generator=draw).tolist())


async def move(a: Rank, b: Rank, context: int, number: int) -> dict[str, float]:
    """One request from ``a`` to ``b``: what its stall was."""
    name = RequestId(f"moves-{context}-{number}")
    params = SamplingParams(400, temperature=0.0, ignore_eos=True)
    ask = Request(name, prompt(1000 * context + number, context), params)
    steps = lambda: a.counted.steps  # noqa: E731
    before, after = Sink(steps), Sink(steps)
    a.house.submit(ask, before, NEW)
    await until(lambda: len(before.tokens) >= 8)
    known, rounds = tuple(before.tokens), a.counters.rounds
    positions = a.counters.last_positions
    source = KvSource(f"{HOST}:{a.port}", running=name)
    b.arrivals.submit(ask, after, History(sources=(source,), output_ids=known, moved=True))
    await until(lambda: before.ended and len(after.tokens) > len(before.tokens) - len(known))
    assert [*known, *after.tokens][: len(before.tokens)] == before.tokens
    fresh = after.at[len(before.tokens) - len(known)]
    last = before.at[-1]
    b.arrivals.abort(name)
    return {
        "steps": fresh[1] - last[1],
        "ms": 1000 * (fresh[0] - last[0]),
        "moved_ms": 1000 * (b.house.submitted[name] - last[0]),
        "step_ms": 1000 * statistics.median(
            y[0] - x[0] for x, y in zip(before.at, before.at[1:], strict=False)
        ),
        "rounds": a.counters.rounds - rounds,
        "last_positions": a.counters.last_positions - positions,
    }  # fmt: skip


def stretched(model: str, folder: Path) -> Path:
    """A model, for contexts that it was not trained for: what it says does not matter."""
    found = resolve_model(model)
    for file in found.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((found / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    text = json.dumps({**config, "max_position_embeddings": LONGEST})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


async def measure(model: str, contexts: list[int], moves: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        decoder = load_decoder(stretched(model, Path(folder)), choose_ops())
    found = []
    async with rank(decoder) as a, rank(decoder) as b:
        for context in contexts:
            steady = Sink(lambda: 0)
            name = RequestId(f"steady-{context}")
            params = SamplingParams(LONGEST - 200, temperature=0.0, ignore_eos=True)
            a.house.submit(Request(name, prompt(1, 100), params), steady, NEW)
            rows = [await move(a, b, context, n) for n in range(moves)]
            a.house.abort(name)
            await until(lambda steady=steady: steady.ended)
            one: dict[str, Any] = {"context": context, "moves": moves}
            for key in rows[0]:
                values = [row[key] for row in rows]
                one[key] = {"median": statistics.median(values), "most": max(values)}
            found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--moves", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    text = "\n".join(map(json.dumps, asyncio.run(measure(args.model, args.context, args.moves))))
    print(text)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
