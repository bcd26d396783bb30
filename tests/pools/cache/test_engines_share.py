"""Engines that share what they compute through the pool give the answers of one engine alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve.config.options import LoadOptions
from moeserve.core import Counters, Event, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.loop import Engine, EngineLock, Unobserved
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.rates import RatedSteps, StepRates
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import History
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.pools.cache.cache_members import CacheMembers
from moeserve.pools.cache.pool import PagePool, PoolTerms
from moeserve.pools.cache.pooled_house import PooledHouse

pytestmark = pytest.mark.long

PAGE, WAIT_S = 16, 60.0
# What is fast here may be slow where others work.
PATIENT = {"answer_s": 20.0, "progress_s": 20.0, "put_s": 20.0, "find_s": 40.0}
MODELS = [
    ("demo", "auto", "auto"),
    ("qwen3_moe", "float32", "int8"),
    ("deepseek_v3", "bfloat16", "bfloat16"),
    ("deepseek_v3", "float32", "int8"),
]


@dataclass
class Answer:
    """A sink that keeps what comes."""

    events: list[Event] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event], /) -> None:
        self.events += events
        if events[-1].finish is not None:
            self.over.set()

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        raise AssertionError("given back")

    async def tokens(self) -> list[tuple[int, object]]:
        assert await asyncio.to_thread(self.over.wait, WAIT_S), "no end has come"
        assert self.events[-1].finish is FinishReason.LENGTH, self.events[-1]
        made = [t for e in self.events for t in e.token_ids]
        scores = [p for e in self.events for p in e.logprobs]
        return list(zip(made, scores, strict=True))


@dataclass(frozen=True)
class PooledRank:
    """An engine with the pool behind it."""

    scheduler: Scheduler
    plain: KvExchange
    house: PooledHouse
    pool: PagePool

    async def ask(self, request: Request) -> list[tuple[int, object]]:
        answer = Answer()
        self.house.submit(request, answer, History())
        return await answer.tokens()

    @property
    def computed(self) -> int:
        return self.scheduler.counters.computed_tokens


@pytest.fixture(scope="module")
def load_family(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str, str, str], Decoder]:
    """A decoder by checkpoint, type of its weights and of its KV."""

    def load(name: str, dtype: str, kv_dtype: str) -> Decoder:
        folder = resolve_model(name) if name == "demo" else tiny_checkpoint(name)
        options = LoadOptions.model_validate({"dtype": dtype, "kv_dtype": kv_dtype})
        return load_decoder(folder, choose_ops(), options)

    return load


@pytest.fixture
async def open_rank(channels: Any) -> AsyncIterator[Callable[..., Any]]:
    opened: list[Any] = []

    async def make(decoder: Decoder, members: Sequence[Any], block_size: int) -> PooledRank:
        config = SchedulerConfig(
            256,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            eos_ids=frozenset(decoder.spec.eos_ids),
            prefix_cache=True,
        )
        blocks = BlockPool(512 // block_size, block_size, Counters())
        scheduler = Scheduler(config, blocks, blocks._counters)
        runner = ModelRunner(decoder, 512 // block_size, block_size, config.eos_ids)
        lock, rates = EngineLock(), StepRates()
        engine = Engine(scheduler, runner, RatedSteps(Unobserved(), rates), lock=lock)
        tensors = watch_kv(runner, decoder.ops)
        plain = KvExchange(engine, scheduler, lock, tensors, rates)
        known = CacheMembers()
        known.set(members)
        pool = PagePool(known, channels, PoolTerms("m", len(plain.layouts), PAGE), **PATIENT)
        house = PooledHouse(plain, pool, fetch_s=40.0)
        engine.__enter__()
        opened.append((engine, plain, house, pool, scheduler, runner))
        return PooledRank(scheduler, plain, house, pool)

    yield make
    for engine, plain, house, pool, scheduler, runner in opened:
        await house.close()
        await pool.close()
        engine.__exit__(None, None, None)
        plain.close()
        scheduler.pool.check()
        assert scheduler.pool.num_references() == 0, "somebody holds a block"
        runner.masks.close()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(200, (length,), generator=draw).tolist())


def ask(name: str, ids: Sequence[int], **params: Any) -> Request:
    chosen = {"max_tokens": 6, "temperature": 0.0, "logprobs": 3, "ignore_eos": True, **params}
    return Request(RequestId(name), tuple(ids), SamplingParams(**chosen))


@pytest.mark.parametrize(("family", "dtype", "kv_dtype"), MODELS)
async def test_answers_are_those_of_one_engine(
    family: str,
    dtype: str,
    kv_dtype: str,
    load_family: Any,
    make_keeper: Any,
    open_rank: Any,
    until: Any,
) -> None:
    decoder = load_family(family, dtype, kv_dtype)
    members = [(await make_keeper(name)).member for name in "ab"]
    alone = await open_rank(decoder, [], 4)
    one, other = await open_rank(decoder, members, 4), await open_rank(decoder, members, 8)
    shared = prompt(1, 5 * PAGE)
    prompts = [shared + prompt(seed, 3 + 7 * seed) for seed in range(2, 5)]
    for number, ids in enumerate(prompts):
        sampled = {"temperature": 0.7, "seed": 5, "max_tokens": 1 + 4 * number}
        request = ask(f"r{number}", ids, **sampled)
        expected = await alone.ask(request)
        assert await one.ask(request) == expected
        await until(lambda: not one.house._leaving)
        assert await one.pool.puts.flush(10)
        assert await other.ask(request) == expected
        await until(lambda: not other.house._leaving)
    assert one.house.counts.put_pages > 5
    # What was fetched is not computed; the rest is what the ranks had of their own.
    assert other.house.counts.fetched_tokens >= 5 * PAGE
    assert other.computed <= one.computed - 5 * PAGE + 8 * len(prompts)
