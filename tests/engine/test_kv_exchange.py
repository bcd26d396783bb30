"""KV that one engine computes and another goes on from: the answers are those of one engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from moeserve.config.options import LoadOptions
from moeserve.core import (
    BlockId,
    CacheScope,
    Counters,
    Event,
    FinishReason,
    Grammar,
    GrammarKind,
    Logprobs,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.loop import Engine, EngineLock, Unobserved
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.choices import Drafter
from moeserve.engine.rates import RatedSteps, StepRates
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import HeldKv, History, SequenceState
from moeserve.errors import ExhaustedError, InternalError, InvalidRequestError
from moeserve.grammar.masks import GrammarMasks
from moeserve.grammar.worker import Vocabulary
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
    within: Callable[[], None] | None = None,
) -> Iterator[Rank]:
    """``within`` is called in the middle of every step that samples."""

    config = SchedulerConfig(
        256,
        max_num_seqs=8,
        max_num_batched_tokens=chunk,
        eos_ids=frozenset(decoder.spec.eos_ids),
    )
    counters = Counters()
    pool = BlockPool(blocks, BLOCK, counters)
    scheduler = Scheduler(config, pool, counters, drafter=drafter)
    eos_ids = frozenset(decoder.spec.eos_ids)
    on_logits = None if within is None else lambda chunk, logits_V: within()
    runner = ModelRunner(decoder, blocks, BLOCK, eos_ids, on_logits=on_logits, masks=masks)
    lock, rates = EngineLock(), StepRates()
    engine = Engine(scheduler, runner, RatedSteps(Unobserved(), rates), lock=lock)
    tensors = watch_kv(runner, decoder.ops)
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
    return go_on_in(borrow(target, request, made), target, source, request, held, made)


def borrow(target: Rank, request: Request, made: Client) -> HeldKv:
    borrowed = target.house.borrow((*request.prompt_ids, *made.token_ids), request.scope)
    assert borrowed is not None
    return borrowed


def go_on_in(
    borrowed: HeldKv,
    target: Rank,
    source: Rank,
    request: Request,
    held: HeldKv,
    made: Client,
) -> Client:
    history = (*request.prompt_ids, *made.token_ids)
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


@pytest.fixture(params=MODELS[::3], ids="-".join)
def detached(request: pytest.FixtureRequest, load: Load) -> Decoder:
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
        # All have their blocks before the first goes on, which may take those that are left.
        room = [
            borrow(b, request, made) for request, (made, _) in zip(requests, first, strict=True)
        ]
        rest = [
            go_on_in(borrowed, b, a, request, held, made)
            for borrowed, request, (made, held) in zip(room, requests, first, strict=True)
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


def vocabulary(demo: Decoder) -> Vocabulary:
    return Vocabulary(resolve_model("demo") / "tokenizer.json", demo.spec.vocab, (0,))


def test_a_grammar_goes_on_where_it_was(demo: Decoder) -> None:
    grammar = Grammar(GrammarKind.REGEX, "[a-z]{3} [0-9]{4} [a-z]{5}")
    request = ask("a", prompt(7, 10), grammar=grammar, ignore_eos=False, max_tokens=30, **SAMPLED)
    one, other, third = (GrammarMasks(vocabulary(demo)) for _ in range(3))
    with rank(demo, masks=one) as alone, rank(demo, masks=other) as a, rank(demo, masks=third) as b:
        made, held = prefill(a, request)
        rest = go_on(b, a, request, held, made)
        assert rest.wait() is FinishReason.STOP
        whole = alone.ask(request)
        whole.wait()
        same(whole, made, rest)


@dataclass(frozen=True)
class Guess(Drafter):
    """Drafts of an answer that is known, every third of which is wrong."""

    answer: Sequence[int]

    def propose(self, seqs: Sequence[SequenceState], beside: int) -> Sequence[Sequence[int]]:
        return [self.guess(seq.request, seq.output_ids) for seq in seqs]

    def guess(self, request: Request, output_ids: Sequence[int]) -> Sequence[int]:
        known = self.answer[len(output_ids) : len(output_ids) + 3]
        return [t if (len(output_ids) + i) % 3 else (t + 1) % VOCAB for i, t in enumerate(known)]


def test_drafts_follow_what_came(decoder: Decoder) -> None:
    request = ask("a", prompt(8, 11), max_tokens=17, **SAMPLED)
    with rank(decoder) as alone:
        whole = alone.ask(request)
        whole.wait()
    guess = Guess(whole.token_ids)
    with rank(decoder, drafter=guess) as a, rank(decoder, drafter=guess) as b:
        made, held = prefill(a, request)
        rest = go_on(b, a, request, held, made)
        rest.wait()
        same(whole, made, rest)
        assert b.scheduler.counters.accepted_tokens > 0
        assert b.scheduler.counters.accepted_tokens < b.scheduler.counters.drafted_tokens


def test_an_imported_request_that_is_preempted_is_computed_anew(decoder: Decoder) -> None:
    requests = [ask(f"r{i}", prompt(20 + i, 10), max_tokens=20, **SAMPLED) for i in range(3)]
    with rank(decoder) as alone, rank(decoder) as a, rank(decoder, 13) as b:
        first = [prefill(a, request) for request in requests]
        # All have their blocks before the first goes on, which may take those that are left.
        room = [
            borrow(b, request, made) for request, (made, _) in zip(requests, first, strict=True)
        ]
        rest = [
            go_on_in(borrowed, b, a, request, held, made)
            for borrowed, request, (made, held) in zip(room, requests, first, strict=True)
        ]
        for request, (made, _), more in zip(requests, first, rest, strict=True):
            more.wait()
            whole = alone.ask(request)
            whole.wait()
            same(whole, made, more)
        assert b.scheduler.counters.preemptions > 0


@dataclass
class Taker:
    """Detaches a request when its client has so many tokens, wherever it is asked."""

    at: Rank
    client: Client
    request: Request
    tokens: int
    found: tuple[HeldKv, tuple[int, ...]] | None = None

    def __call__(self) -> None:
        if self.found is None and len(self.client.token_ids) >= self.tokens:
            self.found = self.at.house.detach(self.request.id)


@pytest.mark.parametrize("during", [False, True], ids=["between steps", "in a step"])
@pytest.mark.parametrize("drafts", [False, True], ids=["", "drafts"])
def test_a_running_request_is_detached_and_goes_on_elsewhere(
    detached: Decoder, drafts: bool, during: bool
) -> None:
    """More than once, and in the middle of others; what its sink had before is all there is."""
    request = ask("a", prompt(30, 13), max_tokens=40, **PENALTIES)
    other = ask("b", prompt(31, 6), max_tokens=40, **SAMPLED)
    with rank(detached) as alone:
        whole, whole_other = alone.ask(request), alone.ask(other)
        whole.wait()
        whole_other.wait()
    guess = Guess(whole.token_ids) if drafts else None
    asked: list[Callable[[], None]] = []

    def within() -> None:
        if during and asked:
            asked[-1]()

    parts: list[Client] = []
    with (
        rank(detached, drafter=guess, within=within) as a,
        rank(detached, drafter=guess, within=within) as b,
    ):
        beside, client, at, to = a.ask(other), Client(), a, b
        history = History()
        for tokens in (1, 9, 14):
            taker = Taker(at, client, request, tokens)
            asked.append(taker)
            end = at.house.on_step(taker) if not during else asked.clear
            at.house.submit(request, client, history)
            client.wait()
            end()
            assert len(client.returned) == 1
            assert at.house.look(request.id) is None
            parts.append(client)
            assert taker.found is not None
            held, output_ids = taker.found
            assert [t for p in parts for t in p.token_ids] == list(output_ids)
            assert held.computed == len(request.prompt_ids) + len(output_ids) - 1
            borrowed = to.house.borrow((*request.prompt_ids, *output_ids), request.scope)
            assert borrowed is not None
            kv = copy(at.house, held, to.house, borrowed)
            at.house.give_back(held)
            history = History(output_ids, held.computed, moved=True, kv=kv)
            client, at, to = Client(), to, at
        at.house.submit(request, client, history)
        client.wait()
        beside.wait()
        same(whole, *parts, client)
        same(whole_other, beside)


def test_what_a_request_has_computed_can_be_copied_while_it_runs(decoder: Decoder) -> None:
    """Then only the end of it has to follow when it is detached."""
    request = ask("a", prompt(40, 21), max_tokens=30)
    with rank(decoder) as alone, rank(decoder, chunk=8) as a, rank(decoder) as b:
        whole = alone.ask(request)
        whole.wait()
        room = (*request.prompt_ids, *[0] * 30)
        borrowed = b.house.borrow(room, CacheScope("of nobody"))
        assert borrowed is not None
        copies, client = [HeldKv(borrowed.blocks, 0)], Client()
        taker = Taker(a, client, request, 11)

        def follow() -> None:
            taker()
            if (seen := a.house.look(request.id)) is not None:
                full = HeldKv(seen.blocks, seen.computed // BLOCK * BLOCK)
                if full.computed > copies[-1].computed:
                    copies.append(copy(a.house, full, b.house, copies[-1]))
                a.house.give_back(seen)

        end = a.house.on_step(follow)
        a.house.submit(request, client, History())
        client.wait()
        end()
        assert taker.found is not None
        held, output_ids = taker.found
        assert len(copies) > 4
        kv = copy(a.house, held, b.house, copies[-1])
        a.house.give_back(held)
        rest = b.ask(request, History(output_ids, held.computed, moved=True, kv=kv))
        rest.wait()
        same(whole, client, rest)


def test_on_step_tells_between_two_steps_and_a_failing_listener_harms_nobody(
    demo: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    """What is detached where it tells has lost nothing: no chunk of it is under way."""
    request = ask("a", prompt(41, 5), max_tokens=50)
    with rank(demo) as a:
        computed: list[int] = []
        client = Client()
        taker = Taker(a, client, request, 7)

        def tell() -> None:
            computed.append(a.scheduler.counters.computed_tokens)
            taker()

        def fail() -> None:
            raise RuntimeError("somebody else's fault")

        ends = [a.house.on_step(fail), a.house.on_step(tell)]
        a.house.submit(request, client, History())
        client.wait()
        for end in ends:
            end()
        assert taker.found is not None
        held, output_ids = taker.found
        assert output_ids == tuple(client.token_ids)
        assert a.scheduler.counters.computed_tokens == held.computed == 5 + 6
        a.house.give_back(held)
        told = len(computed)
        assert a.ask(ask("b", prompt(42, 3))).wait() is FinishReason.LENGTH
        assert len(computed) == told
    assert "somebody else's fault" in caplog.text


def test_between_steps_tells_once_a_step_and_never_within_one(demo: Decoder) -> None:
    request = ask("a", prompt(43, 40), max_tokens=5)
    with rank(demo, chunk=8) as a:
        between: list[int] = []
        steps = lambda: a.scheduler.counters.steps  # noqa: E731
        end = a.house.between_steps(lambda: between.append(steps()))
        assert a.ask(request).wait() is FinishReason.LENGTH
        end()
        assert between == list(range(between[0], between[0] + len(between)))
        assert len(between) >= 40 // 8 + 4


def test_what_cannot_be_detached_stays(demo: Decoder) -> None:
    with rank(demo) as a:
        assert a.house.detach(RequestId("nobody")) is None
        assert a.house.look(RequestId("nobody")) is None

        class Plain:
            def deliver(self, events: Sequence[Event]) -> None:
                if events[-1].finish is not None:
                    over.set()

        over = threading.Event()
        a.house.submit(ask("a", prompt(1, 4), max_tokens=30), Plain(), History())
        assert a.house.detach(RequestId("a")) is None
        assert over.wait(WAIT_S)
        assert a.house.detach(RequestId("a")) is None


def test_a_request_that_ends_in_any_other_way_gives_its_kv_back(demo: Decoder) -> None:
    request = ask("a", prompt(50, 9), max_tokens=100)
    with rank(demo) as a, rank(demo) as b:
        made, held = prefill(a, request)
        end = b.house.on_step(lambda: b.house.abort(request.id))
        assert go_on(b, a, request, held, made).wait() is FinishReason.ABORT
        end()
        # Late while it waits behind a request that runs.
        made, held = prefill(a, request)
        late = replace(request, deadline=0.0)
        assert go_on(b, a, late, held, made).wait() is FinishReason.DEADLINE
        # Refused.
        borrowed = b.house.borrow(request.prompt_ids, request.scope)
        assert borrowed is not None
        unservable = replace(request, params=replace(request.params, max_tokens=0))
        with pytest.raises(InvalidRequestError, match="max_tokens=0"):
            b.ask(unservable, History(kv=borrowed))
        b.house.give_back(borrowed, forget=True)


def test_a_refused_request_leaves_its_references_to_the_caller(demo: Decoder) -> None:
    with rank(demo, 8) as a:
        borrowed = a.house.borrow(prompt(1, 9), CacheScope())
        assert borrowed is not None
        with pytest.raises(ExhaustedError, match="KV blocks, and there are 8"):
            a.ask(ask("a", prompt(1, 9), max_tokens=99), History(kv=borrowed))
        assert a.references() == 3
        a.house.give_back(borrowed)


def test_an_engine_that_stops_gives_back_what_it_had(demo: Decoder) -> None:
    """``rank`` finds nothing held when it is over."""
    request = ask("a", prompt(51, 9), max_tokens=200)
    with rank(demo) as a, rank(demo) as b:
        made, held = prefill(a, request)
        left = go_on(b, a, request, held, made)
        kept = a.ask(ask("kept", prompt(52, 6), max_tokens=2), History(keep=True))
        kept.wait()
        left.wait_for(2)
    assert left.wait() in (FinishReason.UNAVAILABLE, FinishReason.LENGTH)


def test_bytes_of_another_size_are_refused(demo: Decoder) -> None:
    with rank(demo) as a:
        held = a.house.borrow(prompt(1, 9), CacheScope())
        assert held is not None
        size = a.house.layouts[0].nbytes
        for wrong in (torch.empty(3, size - 1, dtype=torch.uint8), torch.empty(3, size)):
            with pytest.raises(InternalError, match="are not 3 KV blocks"):
                a.house.import_kv(0, held.blocks, wrong)
            with pytest.raises(InternalError, match="are not 3 KV blocks"):
                a.house.export_kv(0, held.blocks, wrong)
        wide = torch.empty(3, 2 * size, dtype=torch.uint8)[:, :size]
        with pytest.raises(InternalError, match="rows must follow one another"):
            a.house.export_kv(0, held.blocks, wide)
        a.house.give_back(held)


def test_copies_beside_running_steps_change_nothing(decoder: Decoder) -> None:
    """Threads import, export and compare other blocks while requests run."""
    requests = [ask(f"r{i}", prompt(60 + i, 9), max_tokens=40, **SAMPLED) for i in range(4)]
    with rank(decoder) as alone:
        whole = [alone.ask(request) for request in requests]
        for client in whole:
            client.wait()
    with rank(decoder, 128) as a:
        lent = [a.house.borrow(prompt(70 + i, 24), CacheScope()) for i in range(2)]
        stop = threading.Event()
        differ: list[int] = []
        rounds = [0, 0]

        def work(number: int) -> None:
            held = lent[number]
            assert held is not None
            draw = torch.Generator().manual_seed(number)
            while not stop.is_set():
                for layer, layout in enumerate(a.house.layouts):
                    shape = (len(held.blocks), layout.nbytes)
                    data = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
                    a.house.import_kv(layer, held.blocks, data)
                    found = torch.zeros_like(data)
                    a.house.export_kv(layer, held.blocks, found)
                    if not torch.equal(found, data):
                        differ.append(layer)
                rounds[number] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        clients = [a.ask(request) for request in requests]
        for client in clients:
            client.wait()
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
        for one, client in zip(whole, clients, strict=True):
            same(one, client)
        assert differ == []
        assert min(rounds) > 0
        for held in lent:
            assert held is not None
            a.house.give_back(held)


def test_who_waits_for_lent_blocks_starts_when_they_come_back(demo: Decoder) -> None:
    with rank(demo, 8) as a:
        lent = a.house.borrow(prompt(1, 6 * BLOCK), CacheScope())
        assert lent is not None
        waits = a.ask(ask("a", prompt(2, 3 * BLOCK), max_tokens=4))
        late = a.ask(replace(ask("b", prompt(3, 9)), deadline=time.monotonic() + 0.1))
        assert late.wait() is FinishReason.DEADLINE  # also where no step is run
        assert not waits.over.is_set()
        assert a.house.load_figures().waiting_tokens == 3 * BLOCK
        a.house.give_back(lent)
        assert waits.wait() is FinishReason.LENGTH


def test_figures_are_those_of_the_rank(demo: Decoder) -> None:
    with rank(demo, 32) as a:
        quiet = a.house.load_figures()
        assert (quiet.running, quiet.waiting, quiet.waiting_tokens) == (0, 0, 0)
        assert (quiet.free_blocks, quiet.total_blocks) == (32, 32)
        assert (quiet.prefill_rate, quiet.step_s) == (0.0, 0.0)
        a.ask(ask("a", prompt(1, 30), max_tokens=4)).wait()
        after = a.house.load_figures()
        assert after.prefill_rate > 0
        assert after.step_s > 0
        assert after.free_blocks == 32


def test_layers_of_a_step_can_be_copied_while_the_others_run(decoder: Decoder) -> None:
    """Chunk by chunk, each layer as soon as it is done; nothing is left to copy at the end."""
    request = ask("a", prompt(80, 90), max_tokens=8)
    first = replace(request, params=replace(request.params, max_tokens=1))
    with rank(decoder) as alone, rank(decoder, chunk=32) as a, rank(decoder) as b:
        whole = alone.ask(request)
        whole.wait()
        borrowed = b.house.borrow((*request.prompt_ids, 0), request.scope)
        assert borrowed is not None
        early, chunks, layers = 0, 0, len(a.house.layouts)
        client = a.ask(first, History(keep=True))
        done = [0] * layers
        while not client.over.is_set():
            seen = a.house.look_within(request.id)
            if seen is None:
                continue
            chunks += 1
            while (ready := a.house.layers_done(seen.step)) < layers or min(done) < seen.stop:
                for layer in range(ready):
                    if done[layer] < seen.stop:
                        early += ready < layers
                        copy_layer(a, seen.held.blocks, b, borrowed.blocks, layer, seen.stop)
                        done[layer] = seen.stop
            a.house.give_back(seen.held)
        held = a.house.take_kept(request.id)
        assert held is not None
        for layer in range(layers):
            copy_layer(a, held.blocks, b, borrowed.blocks, layer, held.computed, done[layer])
        a.house.give_back(held)
        kv = HeldKv(borrowed.blocks, held.computed)
        history = History(tuple(client.token_ids), held.computed, moved=True, kv=kv)
        rest = b.ask(request, history)
        rest.wait()
        same(whole, client, rest)


def copy_layer(
    source: Rank,
    blocks: Sequence[BlockId],
    target: Rank,
    to: Sequence[BlockId],
    layer: int,
    stop: int,
    start: int = 0,
) -> None:
    first, last = start // BLOCK, -(-stop // BLOCK)
    nbytes = source.house.layouts[layer].nbytes
    data = torch.empty(last - first, nbytes, dtype=torch.uint8)
    source.house.export_kv(layer, blocks[first:last], data)
    target.house.import_kv(layer, to[first:last], data)
