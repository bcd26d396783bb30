"""Requests served by several ranks: tokens, log-probabilities and ends are those of one process.

Ranks are threads of this process, with decoders, exchanges and homes of their own. At the end every
pair of policies that may be set together is (``FACTORS``: a policy is added by a line).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.control.local_mesh import local_meshes
from moeserve.comm.control.rpc import Trust
from moeserve.comm.group import Group, Topology
from moeserve.config.options import EngineOptions, ServeConfig
from moeserve.core import Event, FinishReason, Logprobs, Request, RequestId, SamplingParams
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.engine.kv_exchange import KvExchange
from moeserve.engine.rank_model import EpContext, of_rank
from moeserve.engine.ranks.build import build_rank
from moeserve.engine.ranks.counted import GatheredCounts
from moeserve.engine.ranks.meeting import RankMeeting
from moeserve.engine.ranks.records import RECORD_BYTES
from moeserve.engine.sequence import HeldKv, History
from moeserve.models.library import resolve_model
from moeserve.models.spec import MoeSpec
from moeserve.observe.progress import Progress
from moeserve.placement.plan import Plan, contiguous, dump

MakeCheckpoint = Callable[[str], Path]
WAIT_S = 60.0
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=1)
DRAWN = SamplingParams(temperature=0.9, max_tokens=9, seed=5, top_k=20, repetition_penalty=1.2)
PROMPTS = [[7 * i % 250 + j for j in range(3 + 5 * i)] for i in range(6)]
SMALL = {"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 4}


@dataclass
class ServedRanks:
    """Several ranks that serve; ``loaded`` is rank 0's view of them."""

    loop: asyncio.AbstractEventLoop
    ranks: list[LoadedModel]

    @property
    def loaded(self) -> LoadedModel:
        return self.ranks[0]

    def refresh(self) -> GatheredCounts:
        """What all ranks have counted, once they rest."""
        assert self.loaded.ranks is not None
        self.call(self.loaded.ranks.refresh)
        return self.loaded.ranks

    def call(self, do: Callable[[], Any]) -> Any:
        """On the event loop, as doors do."""

        async def run() -> Any:
            found = do()
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(WAIT_S)


@contextmanager
def serving(
    path: Path, nodes: Sequence[int], doors: tuple[int, ...] = (0,), **settings: object
) -> Iterator[ServedRanks]:
    """Threads, over real sockets."""
    world, store = len(nodes), HashStore()
    meshes = local_meshes(world, RECORD_BYTES, 20.0)
    ranks = {"threads": 1, "microbatches": 1, "ep_deadline": 20.0}
    config = ServeConfig.model_validate({"model": str(path), **SMALL, **ranks, **settings})
    loop = asyncio.new_event_loop()
    runs = threading.Thread(target=loop.run_forever)
    runs.start()

    def build(rank: int) -> LoadedModel:
        mesh = meshes[rank]
        group = Group(rank, world, store, alarm=mesh.alarm)
        context = EpContext(group, Topology(tuple(nodes)), Progress(), config, mesh.alarm)
        meeting = RankMeeting(loop, group, "127.0.0.1", Trust(), mesh.alarm)
        try:
            return build_rank(config, context=context, mesh=mesh, meeting=meeting, doors=doors)
        except BaseException as error:
            mesh.fail(f"rank {rank}: {error!r}", [rank])
            raise

    with ThreadPoolExecutor(world) as pool:
        try:
            loaded = list(pool.map(build, range(world)))
            yield ServedRanks(loop, loaded)
            assert all(pool.map(LoadedModel.close, loaded))
        finally:
            meshes[0].fail("the test is over", [0])
            loop.call_soon_threadsafe(loop.stop)
            runs.join(WAIT_S)
            loop.close()


@dataclass
class Client:
    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        self.events += events
        if any(event.token_ids for event in events):
            self.first.set()
        if events[-1].finish is not None:
            self.ended.set()

    def wait(self) -> FinishReason | None:
        assert self.ended.wait(WAIT_S)
        return self.events[-1].finish

    @property
    def token_ids(self) -> list[int]:
        return [t for e in self.events for t in e.token_ids]

    @property
    def logprobs(self) -> list[Logprobs]:
        """Of the prompt, then of the answer."""
        of_prompt = [p for e in self.events for p in e.prompt_logprobs]
        return of_prompt + [p for e in self.events for p in e.logprobs]


def ask_all(
    group: ServedRanks | LoadedModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    doors: Sequence[int] = (0,),
) -> list[tuple[list[int], list[Logprobs]]]:
    clients = [Client() for _ in prompts]
    for i, (prompt, each, client) in enumerate(zip(prompts, params, clients, strict=True)):
        asked = Request(RequestId(f"r{i}"), tuple(prompt), each)
        if isinstance(group, LoadedModel):
            group.engine.submit(asked, client)
        else:
            engine = group.ranks[doors[i % len(doors)]].engine
            group.call(partial(engine.submit, asked, client))
    for client in clients:
        assert client.wait() in (FinishReason.LENGTH, FinishReason.STOP)
    return [(client.token_ids, client.logprobs) for client in clients]


MIXED = [GREEDY, DRAWN] * 3


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: MakeCheckpoint) -> Callable[[str], list[Any]]:
    """What one process answers to ``PROMPTS``."""
    known: dict[str, list[Any]] = {}

    def answer(family: str) -> list[Any]:
        if family not in known:
            model = str(tiny_checkpoint(family))
            loaded = build_engine(EngineOptions(model=model, threads=1, **SMALL))
            known[family] = ask_all(loaded, PROMPTS, MIXED)
            assert loaded.close()
        return known[family]

    return answer


@pytest.mark.parametrize(
    ("family", "nodes", "backend", "microbatches"),
    [
        ("deepseek_v3", (0, 0), "shm", 1),
        ("qwen2_moe", (0, 0, 0), "shm", 2),
        ("gpt_oss", (0, 1), "torch", 2),
        ("deepseek_v3", (0, 0, 1, 1), "auto", "auto"),
    ],
)
def test_ranks_answer_as_one_process_does(
    tiny_checkpoint: MakeCheckpoint,
    alone: Callable[[str], list[Any]],
    family: str,
    nodes: tuple[int, ...],
    backend: str,
    microbatches: int | str,
) -> None:
    path = tiny_checkpoint(family)
    with serving(path, nodes, ep_backend=backend, microbatches=microbatches) as group:
        answers = ask_all(group, PROMPTS, MIXED)
        assert answers == alone(family)
        assert [len(found) for _, found in answers[::2]] == [len(p) - 1 + 8 for p in PROMPTS[::2]]
        work = group.refresh().work
        group.refresh()
        assert group.loaded.engine.load().free_blocks == len(nodes) * 64
    assert all(stats.tokens for stats in work), "a rank had no request"
    assert len({stats.rounds for stats in work}) == 1
    assert all(stats.copies and stats.came for stats in work)


def test_prompts_in_groups_of_layers_are_answered_and_recorded_as_in_chunks(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """On one rank and on two, whose microbatches the others still take; prompts are longer than a
    step, and share a beginning."""
    path, trace = tiny_checkpoint("deepseek_v3"), tmp_path / "trace.safetensors"
    prompts = [[*range(30)], *([*range(40), *range(7 * i, 16 * i)] for i in range(4))]
    params = [replace(one, prompt_logprobs=None) for one in MIXED[:5]]
    how = {"model": str(path), "record_routing": trace, "prefix_cache": False}
    found, rows = [], []
    for prefill in ("chunk", "layer"):
        loaded = build_engine(EngineOptions(threads=1, prefill_mode=prefill, **how, **SMALL))
        found.append(ask_all(loaded, prompts, params))
        assert (loaded.engine.counters.layered_steps > 0) == (prefill == "layer")
        assert loaded.close()
        recorded = load_file(trace)
        rows.append((sorted(recorded["seq_lens"].tolist()), sorted(recorded["topk_ids"].tolist())))
    with serving(path, (0, 0), prefill_mode="layer", microbatches=2) as group:
        found.append(ask_all(group, prompts, params))
        assert ask_all(group, prompts[:1], params[:1]) == found[0][:1]  # nobody else runs
        assert all(rank.own.executor.states.num_rows == 0 for rank in group.ranks)
        assert sum(rank.engine.counters.layered_steps for rank in group.ranks) > 0
    assert found[1] == found[2] == found[0]
    assert rows[1] == rows[0]


def test_a_solved_plan_with_replicas_changes_nothing(
    tiny_checkpoint: MakeCheckpoint,
    alone: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    path = tiny_checkpoint("qwen2_moe")
    with serving(path, (0, 0)) as group:
        spec = group.loaded.spec
    experts = next(x.mlp.router.num_experts for x in spec.layers if isinstance(x.mlp, MoeSpec))
    expert_LS = contiguous(
        layers=len(spec.moe_layers), experts=experts, slots=experts + 4, devices=2
    )[:, ::-1].copy()
    plan = tmp_path / "plan.json"
    plan.write_text(dump(Plan(expert_LS, experts, 2, 1, spec.moe_layers)))
    with serving(path, (0, 0), plan=plan) as group:
        assert ask_all(group, PROMPTS, MIXED) == alone("qwen2_moe")


def test_homes_near_experts_change_nothing_but_homes(
    tiny_checkpoint: MakeCheckpoint,
    alone: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    """Prompts come twice, so that their kinds are known; all ranks count, recorded or not."""
    path, trace = tiny_checkpoint("deepseek_v3"), tmp_path / "trace.safetensors"
    options = {"homes": "experts", "record_routing": trace, "prefix_cache": False}
    with serving(path, (0, 0), **options) as group:
        for _ in range(2):
            assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")
        assert all(rank.own.uses is not None for rank in group.ranks)
    recorded = [load_file(file)["seq_lens"] for file in (trace, of_rank(trace, 1))]
    assert sum(map(len, recorded)) == 2 * len(PROMPTS)
    assert all(len(lens) for lens in recorded)


def test_a_plan_read_again_while_requests_run_changes_nothing_they_see(
    tiny_checkpoint: MakeCheckpoint,
    alone: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    path, file = tiny_checkpoint("deepseek_v3"), tmp_path / "plan.json"
    row = np.arange(16, dtype=np.int32)
    first = Plan(np.stack([row, row]), 16, 2, 1, (1, 2))
    file.write_text(dump(first))
    with serving(path, (0, 0), plan=file) as group:
        live_plan, count = group.loaded.live_plan, group.loaded.engine.counters
        assert live_plan is not None
        file.write_text(dump(Plan(np.stack([row[::-1], row]).copy(), 16, 2, 1, (1, 2))))
        live_plan.reread(file)
        for _ in range(20):
            assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")
            if count.plan_changes:
                break
        assert (count.plan_changes, count.plan_layers_switched) == (1, 1)
        assert count.plan_bytes_read == 16 * 3 * 32 * 64 * 4
        assert count.plan_paused_s > 0
        assert live_plan.coordinator.plan.expert_LS[0].tolist() == row[::-1].tolist()
        assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")


def test_a_file_that_holds_no_plan_for_these_ranks_leaves_everything_as_it_is(
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = np.arange(16, dtype=np.int32)
    other = Plan(np.stack([row, row]), 16, 4, 1, (1, 2))
    (tmp_path / "plan.json").write_text(dump(other))
    with serving(tiny_checkpoint("deepseek_v3"), (0, 0)) as group:
        live_plan = group.loaded.live_plan
        assert live_plan is not None
        live_plan.reread(tmp_path / "plan.json")
        live_plan.reread(tmp_path / "absent.json")
        assert "2 ranks serve it" in caplog.text
        assert "no such file" in caplog.text.lower()
        assert not live_plan.coordinator.pending


def test_re_planning_looks_at_what_all_ranks_counted(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]]
) -> None:
    with serving(tiny_checkpoint("deepseek_v3"), (0, 0), replan="auto") as group:
        live_plan = group.loaded.live_plan
        assert live_plan is not None
        assert live_plan.replanner is not None
        for _ in range(8):
            assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")
        found = live_plan.replanner.consider()
        assert ("saves" in found.why) is found.apply
        assert found.cost_s > 0
        assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")
        counts = live_plan.coordinator.counts
        assert sorted(counts) == [0, 1]
        for said in counts.values():
            assert np.array(said["load"]).sum(axis=1).tolist() == [4 * said["tokens"]] * 2


@pytest.mark.parametrize("swap_memory", [0, 1 << 20])
def test_few_blocks_preempt_and_nothing_changes(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]], swap_memory: int
) -> None:
    """Which requests meet on a rank is a matter of moments, and so is who is preempted, if any."""
    path = tiny_checkpoint("deepseek_v3")
    small = {"num_blocks": 10, "max_model_len": 40, "swap_memory": swap_memory}
    with serving(path, (0, 0), prefix_cache=False, **small) as group:
        for _ in range(30):
            assert ask_all(group, PROMPTS, MIXED) == alone("deepseek_v3")
            if group.refresh().counters.preemptions:
                break
        counters = group.refresh().counters
        assert counters.preemptions > 0
        assert (counters.swaps > 0) == (swap_memory > 0)


@pytest.mark.parametrize(
    "guessing",
    [{"speculation": "auto"}, {"speculation": "draft", "draft_model": "demo"}],
    ids=["own module", "draft model"],
)
def test_ranks_that_guess_answer_as_a_process_that_does_not(guessing: dict[str, str]) -> None:
    """Each for its own requests, with whatever number of guesses it takes to pay."""
    path = resolve_model("demo")
    loaded = build_engine(EngineOptions(model=str(path), threads=1, **SMALL))
    plain = ask_all(loaded, PROMPTS, MIXED)
    assert loaded.close()
    with serving(path, (0, 0), microbatches=2, **guessing) as group:
        assert ask_all(group, PROMPTS, MIXED) == plain
        counters = group.refresh().counters
    assert counters.drafted_tokens >= counters.drafts > 0


def test_more_ranks_than_requests(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]]
) -> None:
    path = tiny_checkpoint("deepseek_v3")
    with serving(path, (0, 0, 0, 0)) as group:
        (got,) = ask_all(group, PROMPTS[:1], MIXED[:1])
        tokens = [stats.tokens for stats in group.refresh().work]
    assert got == alone("deepseek_v3")[0]
    assert tokens[0] > 0
    assert tokens[1:] == [0, 0, 0]


def test_requests_that_end_early_leave_the_others_as_they_are(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]]
) -> None:
    """One is cancelled while steps run, one is out of time; both on ranks with other requests."""
    path = tiny_checkpoint("deepseek_v3")
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with serving(path, (0, 0), max_num_seqs=8) as group:
        engine, cancelled, late = group.loaded.engine, Client(), Client()
        first = Request(RequestId("cancelled"), (1, 2, 3), long)
        second = Request(RequestId("late"), (4, 5), long, deadline=-1.0)
        group.call(partial(engine.submit, first, cancelled))
        group.call(partial(engine.submit, second, late))
        assert cancelled.first.wait(WAIT_S)
        clients = [Client() for _ in PROMPTS]
        for i, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
            asked = Request(RequestId(f"r{i}"), tuple(prompt), params)
            group.call(partial(engine.submit, asked, clients[i]))
        assert clients[0].first.wait(WAIT_S)
        group.call(partial(engine.abort, RequestId("cancelled")))
        assert cancelled.wait() is FinishReason.ABORT
        assert late.wait() is FinishReason.DEADLINE
        for client in clients:
            client.wait()
        assert [(c.token_ids, c.logprobs) for c in clients] == alone("deepseek_v3")
        group.refresh()
        end = time.monotonic() + WAIT_S  # loads of the last round may be on their way
        while engine.load().free_blocks < 2 * 64:
            assert time.monotonic() < end, engine.load()
            time.sleep(0.01)


def hand_over(source: KvExchange, target: KvExchange, asked: Request) -> tuple[Client, Client]:
    """Its first token from the one, all others from the other, which computes no prompt."""
    first, rest = Client(), Client()
    short = replace(asked, params=replace(asked.params, max_tokens=1))
    source.submit(short, first, History(keep=True))
    first.wait()
    held = source.take_kept(asked.id)
    tokens = (*asked.prompt_ids, *first.token_ids)
    borrowed = target.borrow(tokens, asked.scope)
    assert held is not None
    assert borrowed is not None
    for layer, layout in enumerate(source.layouts):
        data = torch.empty(len(held.blocks), layout.nbytes, dtype=torch.uint8)
        source.export_kv(layer, held.blocks, data)
        target.import_kv(layer, borrowed.blocks[: len(held.blocks)], data)
    source.give_back(held)
    kv = HeldKv(borrowed.blocks, held.computed)
    history = History(tuple(first.token_ids), held.computed, moved=True, kv=kv)
    target.submit(asked, rest, history)
    rest.wait()
    return first, rest


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_rank_of_two_and_a_process_alone_go_on_from_each_others_kv(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]], family: str
) -> None:
    path, expected = tiny_checkpoint(family), alone(family)
    with serving(path, (0, 0), microbatches=2) as group:
        single = build_engine(EngineOptions(model=str(path), threads=1, **SMALL))
        for i, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
            there = group.ranks[i % 2].house
            pair = (there, single.house) if i < 3 else (single.house, there)
            first, rest = hand_over(*pair, Request(RequestId(f"r{i}"), tuple(prompt), params))
            tokens, logprobs = expected[i]
            assert first.token_ids + rest.token_ids == tokens
            assert first.logprobs + rest.logprobs == logprobs
        figures = [loaded.house.load_figures() for loaded in (*group.ranks, single)]
        assert {(f.free_blocks, f.running, f.waiting) for f in figures} == {(64, 0, 0)}
        assert single.close()


# What may be set together, by factor: the settings of each choice. Ranks and cancels are no
# settings; the first choice of each is the plain one.
FACTORS: dict[str, dict[str, Any]] = {
    "admission": {
        "past-future": {},
        "throughput": {"objective": "throughput"},
        "targets": {"ttft_target": 40, "tpot_target": 5},
    },
    "prefill": {
        "chunks": {},
        "layers": {"prefill_mode": "layer"},
        "auto": {"prefill_mode": "auto"},
    },
    "preempted": {"computed again": {}, "swapped": {"swap_memory": 1 << 20}},
    "tenants": {"fair": {}, "as they come": {"fairness": "off"}},
    "speculation": {
        "off": {},
        "ngram": {"speculation": "ngram"},
        "draft": {"speculation": "draft"},
        "auto": {"speculation": "auto"},
    },
    "prefixes": {"cached": {}, "anew": {"prefix_cache": False}},
    "blocks": {"enough": {}, "few": {"num_blocks": 10, "max_model_len": 40}},
    "ranks": {"1": {}, "2": {}, "2, cut": {"microbatches": 2}},
    "cancels": {"none": {}, "some": {}},
}
# Draft models by kind of speculation: the model itself is always right, another one nearly never.
DRAFTING = {"draft": "qwen3_moe", "auto": "deepseek_v3"}
Combination = dict[str, str]


def combinations() -> list[Combination]:
    """So few of them that every pair of choices of two factors is in one: each next one has most of
    the pairs that are missing."""
    every = [dict(zip(FACTORS, one, strict=True)) for one in itertools.product(*FACTORS.values())]
    missing = {pair for one in every for pair in pairs(one)}
    found = []
    while missing:
        found.append(max(every, key=lambda one: len(missing & pairs(one))))
        missing -= pairs(found[-1])
    return found


def pairs(one: Combination) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(one.items(), 2))


def ask_with_cancels(
    group: ServedRanks | LoadedModel, cancels: bool
) -> list[tuple[list[int], list[Logprobs]]]:
    """``ask_all``, twice, so that prefixes are there; beside others that are cancelled."""
    loaded = group if isinstance(group, LoadedModel) else group.loaded
    others = [Client() for _ in range(3 * cancels)]
    long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def start(i: int) -> None:
        loaded.engine.submit(Request(RequestId(f"x{i}"), (1, 2, 3 + i), long), others[i])

    call = (lambda do: do()) if isinstance(group, LoadedModel) else group.call
    for i in range(len(others)):
        call(partial(start, i))
    first = ask_all(group, PROMPTS[:2], MIXED[:2])
    for i in range(len(others)):
        call(partial(loaded.engine.abort, RequestId(f"x{i}")))
    answers = ask_all(group, PROMPTS, MIXED)
    assert all(client.wait() in (FinishReason.ABORT, FinishReason.LENGTH) for client in others)
    assert answers[:2] == first
    return answers


@pytest.mark.parametrize("one", combinations(), ids=lambda one: "-".join(one.values()))
def test_policies_that_are_set_together_change_no_token(
    tiny_checkpoint: MakeCheckpoint, alone: Callable[[str], list[Any]], one: Combination
) -> None:
    path, cancels = tiny_checkpoint("qwen3_moe"), one["cancels"] == "some"
    chosen = [FACTORS[factor][choice] for factor, choice in one.items()]
    settings = SMALL | dict(itertools.chain.from_iterable(each.items() for each in chosen))
    if one["speculation"] in DRAFTING:
        settings["draft_model"] = str(tiny_checkpoint(DRAFTING[one["speculation"]]))
    if one["ranks"] == "1":
        loaded = build_engine(EngineOptions(model=str(path), threads=1, **settings))
        answers = ask_with_cancels(loaded, cancels)
        assert loaded.engine.load().free_blocks == settings["num_blocks"]
        assert loaded.close()
    else:
        with serving(path, (0, 0), **settings) as group:
            answers = ask_with_cancels(group, cancels)
            engines = [rank.own_engine for rank in group.ranks]
            assert all(e.load().free_blocks == settings["num_blocks"] for e in engines if e)
    assert answers == alone("qwen3_moe")
