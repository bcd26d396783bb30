"""Real engines: what a request gets of two members is what it gets of one, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_house import Sink

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.config.options import LoadOptions
from moeserve.core import Counters, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.loop import Engine, EngineLock
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.rates import StepRates
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History, KvSource
from moeserve.kernels.ops import KvCache, Part, Step
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.pools.kv.arrivals import Arrivals
from moeserve.pools.kv.channels import ChannelPool
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import ServedTerms

RUN = b"run"
WAIT_S = 60.0
MODELS = [
    ("demo", "auto", "auto"),
    ("deepseek_v3", "float32", "int8"),
    ("gpt_oss", "float32", "float32"),
]
LONGEST = 256
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "top_p": 0.9, "seed": 3},
    {
        "temperature": 1.0,
        "seed": 4,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logprobs": 0,
    },
    {"temperature": 0.0, "prompt_logprobs": 1},
)


class Rank:
    """An engine with a server, and what stands before it."""

    def __init__(self, decoder: Decoder, block_size: int, chunk: int) -> None:
        blocks, eos_ids = 512 // block_size, frozenset(decoder.spec.eos_ids)
        config = SchedulerConfig(LONGEST, 8, chunk, eos_ids=eos_ids)
        self.pool = BlockPool(blocks, block_size, Counters())
        self.scheduler = Scheduler(config, self.pool, Counters())
        self.runner = ModelRunner(decoder, blocks, block_size, eos_ids)
        lock = EngineLock()
        self.engine = Engine(self.scheduler, self.runner, lock=lock)
        tensors = watch_kv(self.runner, decoder.ops)
        self.house = KvExchange(self.engine, self.scheduler, lock, tensors, StepRates())
        self.terms = ServedTerms("m", "model", decoder.spec.vocab, LONGEST)
        self.counters = KvCounters()
        self.port = 0
        self.arrivals: Arrivals

    @property
    def source(self) -> KvSource:
        return KvSource(f"127.0.0.1:{self.port}")

    def ask(self, request: Request, *sources: KvSource, **history: Any) -> Sink:
        sink = Sink()
        self.arrivals.submit(request, sink, History(sources=sources, **history))
        return sink


@contextlib.asynccontextmanager
async def rank(decoder: Decoder, block_size: int = 4, chunk: int = 16) -> AsyncIterator[Rank]:
    made = Rank(decoder, block_size, chunk)
    kv = KvServer(made.house, made.terms, made.counters)
    server, made.port = open_server("127.0.0.1", Trust(), RUN, [kv.handlers()])
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
        made.runner.masks.close()
        made.pool.check()
    assert made.pool.num_references() == 0, "somebody holds a block"
    assert made.counters.borrowed == made.counters.calls == made.counters.serving == 0


async def ended(*sinks: Sink) -> None:
    async with asyncio.timeout(WAIT_S):
        while not all(sink.ended.is_set() for sink in sinks):  # noqa: ASYNC110 - of many
            await asyncio.sleep(0.002)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(256, (length,), generator=draw).tolist())


def same(whole: Sink, *parts: Sink) -> None:
    events = [event for part in parts for event in part.events]
    assert [t for e in events for t in e.token_ids] == whole.tokens
    assert [p for e in events for p in e.logprobs] == [p for e in whole.events for p in e.logprobs]
    assert [p for e in events for p in e.prompt_logprobs] == whole.scores
    assert parts[-1].last.finish is whole.last.finish


Load = Callable[..., Decoder]


@pytest.fixture(scope="module")
def load(tiny_checkpoint: Callable[[str], Path]) -> Load:
    made: dict[tuple[str, str, str], Decoder] = {}

    def get(name: str, dtype: str, kv_dtype: str) -> Decoder:
        key = name, dtype, kv_dtype
        if key not in made:
            folder = resolve_model(name) if name == "demo" else tiny_checkpoint(name)
            options = LoadOptions(dtype=dtype, kv_dtype=kv_dtype)  # type: ignore[arg-type]
            made[key] = load_decoder(folder, choose_ops(), options)
        return made[key]

    return get


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids="-".join)
async def test_two_members_answer_as_one(
    load: Load, model: tuple[str, str, str], sizes: tuple[int, int]
) -> None:
    """Block sizes that differ, prompts in several chunks, whatever is asked of the answer."""
    decoder = load(*model)
    asked = [
        Request(RequestId(f"r{i}-{n}"), prompt(n, n), SamplingParams(9, ignore_eos=True, **params))
        for n in (1, 8, 31, 50)
        for i, params in enumerate(PARAMS)
    ]
    async with rank(decoder) as alone, rank(decoder, sizes[0]) as a, rank(decoder, sizes[1]) as b:
        whole = [alone.ask(request) for request in asked]
        moved = [b.ask(request, a.source) for request in asked]
        await ended(*whole, *moved)
        for one, other in zip(whole, moved, strict=True):
            same(one, other)
        assert b.counters.sources_lost == {}
        assert b.counters.recomputed == 0
        # What one request leaves in the cache the next one shares.
        shared = sum(len(r.prompt_ids) for r in asked) - b.counters.fetched
        assert 0 <= shared <= sum(len(r.prompt_ids) for r in asked) * 3 // 4
        assert b.scheduler.counters.computed_tokens == 8 * len(asked)


@pytest.mark.parametrize("model", MODELS[:2], ids="-".join)
async def test_a_running_request_moves(load: Load, model: tuple[str, str, str]) -> None:
    decoder = load(*model)
    for params in PARAMS[:3]:
        ask = Request(
            RequestId("moves"), prompt(5, 40), SamplingParams(210, ignore_eos=True, **params)
        )
        async with rank(decoder) as alone, rank(decoder) as a, rank(decoder, 6) as b:
            whole = alone.ask(ask)
            await ended(whole)
            one = a.ask(ask)
            async with asyncio.timeout(WAIT_S):
                while len(one.tokens) < 10:  # noqa: ASYNC110 - told on another thread
                    await asyncio.sleep(0.001)
            known = tuple(one.tokens)
            running = KvSource(a.source.address, running="moves")
            two = b.ask(ask, running, output_ids=known, moved=True)
            await ended(one, two)
            assert [*known, *two.tokens] == whole.tokens
            assert one.tokens == whole.tokens[: len(one.tokens)]
            assert one.returned
            assert b.counters.sources_lost == {}
            assert b.counters.fetched >= 40 + 8
            logprobs = [p for e in whole.events for p in e.logprobs]
            found = [p for e in two.events for p in e.logprobs]
            assert found == logprobs[len(logprobs) - len(found) :]
            if params.get("logprobs") is not None:
                assert len(found) == len(two.tokens)


@dataclass
class SlowLayers:
    """A layer runner that calls ``after`` each layer's attention, before its experts run."""

    decoder: Decoder
    after: Callable[[int], None] = lambda layer: None

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
    ) -> None:
        ops = self.decoder.ops
        for layer, (of_stack, cache) in enumerate(
            zip(self.decoder.stack.layers, caches, strict=True)
        ):
            for x_TH, step in zip(hidden, steps, strict=True):
                if step is None:
                    continue
                ops.attend(x_TH, of_stack.attention, step, cache)
                self.after(layer)
                if isinstance(of_stack.mlp, Part):
                    ops.dense(x_TH, of_stack.mlp)
                else:
                    router, experts = of_stack.mlp
                    ops.moe(x_TH, experts, ops.route(x_TH, router, step))


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)], ids=str)
async def test_layers_leave_while_the_step_runs_that_computes_them(
    load: Load, sizes: tuple[int, int]
) -> None:
    """The last layer waits until all others have left: the first token comes only then."""
    decoder = load(*MODELS[1])
    slow = SlowLayers(decoder)
    ask = Request(RequestId("long"), prompt(6, 57), SamplingParams(9, ignore_eos=True))
    async with (
        rank(decoder) as alone,
        rank(decoder.over(slow), sizes[0], chunk=64) as a,
        rank(decoder, sizes[1]) as b,
    ):
        early = [(layout.nbytes // sizes[0]) * 56 for layout in a.house.layouts[:-1]]
        seen: list[int] = []

        def after(layer: int) -> None:
            if layer == len(early) - 1 and not seen:
                until = time.monotonic() + WAIT_S
                while a.counters.sent_within < sum(early) and time.monotonic() < until:
                    time.sleep(0.001)
                seen.append(a.counters.sent_within)

        slow.after = after
        whole, moved = alone.ask(ask), b.ask(ask, a.source)
        await ended(whole, moved)
        same(whole, moved)
        assert seen[0] >= sum(early), "layers wait for the last one"
        assert b.counters.recomputed == 0
        assert b.counters.sources_lost == {}
        assert sum(b.counters.bytes.values()) == 57 * sum(
            layout.nbytes // sizes[0] for layout in a.house.layouts
        ), "nothing is sent twice"


async def test_what_was_moved_was_not_cached(load: Load) -> None:
    """Whoever reads of cached tokens reads of work that was saved, not of work done elsewhere."""
    decoder = load(*MODELS[0])
    first = Request(RequestId("first"), prompt(3, 40), SamplingParams(5, ignore_eos=True))
    async with rank(decoder) as a, rank(decoder) as b:
        fresh = b.ask(first, a.source)
        await ended(fresh)
        assert {e.cached_tokens for e in fresh.events} == {0}
        longer = replace(first, id=RequestId("longer"), prompt_ids=(*first.prompt_ids, *range(8)))
        shared = b.ask(longer, a.source)
        await ended(shared)
        assert {e.cached_tokens for e in shared.events} == {40}
        assert b.counters.recomputed == 0
