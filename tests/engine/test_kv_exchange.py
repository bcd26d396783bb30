"""KV that one engine computes and another goes on from: the answers are those of one engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from moeserve.config.options import LoadOptions
from moeserve.core import (
    Counters,
    Event,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.kv_tensors import KvTensors
from moeserve.engine.loop import Engine, EngineLock, Unobserved
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies import Drafter
from moeserve.engine.rates import RatedSteps, StepRates
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import HeldKv, History
from moeserve.grammar.masks import GrammarMasks
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.pools.kv.house import KvHouse

WAIT_S = 30.0
BLOCK = 4
MODELS = [
    ("demo", "auto", "auto"),
    ("qwen3_moe", "float32", "int8"),
    ("gpt_oss", "float32", "float32"),
    ("deepseek_v3", "bfloat16", "bfloat16"),
    ("deepseek_v3", "float32", "int8"),
]
VOCAB = 256


@dataclass
class Client:
    """A sink that keeps what comes, and whether the request was given back."""

    events: list[Event] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    returned: list[int] = field(default_factory=list)
    some: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, events: Sequence[Event]) -> None:
        with self.some:
            assert not self.over.is_set(), "an event after the last"
            self.events += events
            self.some.notify_all()
            if events[-1].finish is not None:
                self.over.set()

    def give_back(self, request_id: RequestId, reached: int) -> None:
        assert not self.over.is_set(), "given back after its end"
        self.returned.append(reached)
        self.over.set()

    def wait(self) -> FinishReason | None:
        assert self.over.wait(WAIT_S), "no end has come"
        return self.events[-1].finish if self.events else None

    def wait_for(self, tokens: int) -> None:
        with self.some:
            assert self.some.wait_for(lambda: len(self.token_ids) >= tokens, WAIT_S)

    @property
    def token_ids(self) -> list[int]:
        return [t for e in self.events for t in e.token_ids]

    @property
    def logprobs(self) -> list[Logprobs]:
        return [p for e in self.events for p in e.logprobs]

    @property
    def prompt_logprobs(self) -> list[Logprobs]:
        return [p for e in self.events for p in e.prompt_logprobs]


@dataclass(frozen=True)
class Rank:
    """An engine over a decoder, and its KV."""

    engine: Engine
    scheduler: Scheduler
    house: KvExchange

    def ask(self, request: Request, history: History | None = None) -> Client:
        client = Client()
        self.house.submit(request, client, history or History())
        return client

    def references(self) -> int:
        self.scheduler.pool.check()
        return self.scheduler.pool.num_references()


@contextmanager
def rank(
    decoder: Decoder,
    blocks: int = 64,
    *,
    chunk: int = 64,
    drafter: Drafter | None = None,
    masks: GrammarMasks | None = None,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
) -> Iterator[Rank]:
    config = SchedulerConfig(
        256,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=chunk,
        eos_ids=frozenset(decoder.spec.eos_ids),
        prefix_cache=prefix_cache,
    )
    counters = Counters()
    pool = BlockPool(blocks, BLOCK, counters)
    scheduler = Scheduler(config, pool, counters, drafter=drafter)
    eos_ids = frozenset(decoder.spec.eos_ids)
    runner = ModelRunner(decoder, blocks, BLOCK, eos_ids, masks=masks)
    lock, rates = EngineLock(), StepRates()
    engine = Engine(scheduler, runner, RatedSteps(Unobserved(), rates), lock=lock)
    tensors = KvTensors(decoder.ops, runner.cache.layers)
    house = KvExchange(engine, scheduler, lock, tensors, rates)
    with engine:
        made = Rank(engine, scheduler, house)
        yield made
    house.close()
    assert made.references() == 0, "somebody holds a block"
    runner.masks.close()


def copy(source: KvHouse, held: HeldKv, target: KvHouse, to: HeldKv) -> HeldKv:
    """What is computed of ``held`` and not of ``to``, whole blocks of all layers."""
    assert source.layouts == target.layouts
    first, last = to.computed // BLOCK, -(-held.computed // BLOCK)
    for layer, layout in enumerate(source.layouts):
        data = torch.full((last - first, layout.nbytes), 0xA5, dtype=torch.uint8)
        source.export_kv(layer, held.blocks[first:last], data)
        target.import_kv(layer, to.blocks[first:last], data)
    return HeldKv(to.blocks, held.computed)


def prefill(source: Rank, request: Request) -> tuple[Client, HeldKv]:
    """The first token, made by ``source``, and the KV of the prompt."""
    first = replace(request, params=replace(request.params, max_tokens=1))
    client = source.ask(first, History(keep=True))
    assert client.wait() in (FinishReason.LENGTH, FinishReason.STOP)
    held = source.house.take_kept(request.id)
    assert held is not None
    assert held.computed == len(request.prompt_ids)
    assert source.house.take_kept(request.id) is None
    return client, held


def go_on(target: Rank, source: Rank, request: Request, held: HeldKv, made: Client) -> Client:
    """The rest, made by ``target`` from what ``source`` has computed, which is given back."""
    history = (*request.prompt_ids, *made.token_ids)
    borrowed = target.house.borrow(history, request.scope)
    assert borrowed is not None
    kv = copy(source.house, held, target.house, borrowed)
    target.house.publish(kv, history, request.scope)
    source.house.give_back(held)
    reached = held.computed
    return target.ask(request, History(tuple(made.token_ids), reached, moved=True, kv=kv))


def same(whole: Client, *parts: Client) -> None:
    assert [t for p in parts for t in p.token_ids] == whole.token_ids
    assert [x for p in parts for x in p.logprobs] == whole.logprobs
    assert [x for p in parts for x in p.prompt_logprobs] == whole.prompt_logprobs
    assert parts[-1].events[-1].finish is whole.events[-1].finish


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCAB, (length,), generator=draw).tolist())


def ask(name: str, prompt_ids: Sequence[int], **params: object) -> Request:
    chosen = {"max_tokens": 9, "temperature": 0.0, "logprobs": 3, "ignore_eos": True, **params}
    return Request(RequestId(name), tuple(prompt_ids), SamplingParams(**chosen))  # type: ignore[arg-type]


Load = Callable[[str, str, str], Decoder]


@pytest.fixture(scope="module")
def load(tiny_checkpoint: Callable[[str], Path]) -> Load:
    """A decoder by checkpoint, type of its weights and of its KV."""
    made: dict[tuple[str, str, str], Decoder] = {}

    def get(name: str, dtype: str, kv_dtype: str) -> Decoder:
        key = name, dtype, kv_dtype
        if key not in made:
            folder = resolve_model(name) if name == "demo" else tiny_checkpoint(name)
            made[key] = load_decoder(
                folder, choose_ops(), LoadOptions(dtype=dtype, kv_dtype=kv_dtype)
            )  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(params=MODELS, ids="-".join)
def decoder(request: pytest.FixtureRequest, load: Load) -> Decoder:
    return load(*request.param)


@pytest.fixture
def demo(load: Load) -> Decoder:
    return load("demo", "auto", "auto")


SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
PENALTIES = {
    **SAMPLED,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.4,
}


def test_another_engine_goes_on_with_the_same_bits(decoder: Decoder) -> None:
    """Whole blocks, a partial one, less than one; greedy, sampled, with penalties and scores."""
    requests = [
        ask("a", prompt(1, 4 * BLOCK)),
        ask("b", prompt(2, 3 * BLOCK + 1), **SAMPLED),
        ask("c", prompt(3, BLOCK - 1), **PENALTIES),
        ask("d", prompt(4, 5 * BLOCK + 2), **SAMPLED, prompt_logprobs=2),
        ask("e", prompt(5, 2 * BLOCK), **PENALTIES, prompt_logprobs=0),
    ]
    with rank(decoder) as alone, rank(decoder, chunk=9) as a, rank(decoder) as b:
        first = [prefill(a, request) for request in requests]
        rest = [
            go_on(b, a, request, held, made)
            for request, (made, held) in zip(requests, first, strict=True)
        ]
        for request, (made, _), more in zip(requests, first, rest, strict=True):
            more.wait()
            whole = alone.ask(request)
            whole.wait()
            same(whole, made, more)
        prompts = sum(len(request.prompt_ids) for request in requests)
        assert b.scheduler.counters.computed_tokens == 8 * len(requests)  # no prompt again
        assert a.scheduler.counters.computed_tokens == prompts
        assert b.scheduler.counters.prefix_hit_tokens == 0
