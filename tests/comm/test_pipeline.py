"""Law 1 over ranks: any number of them, any plan, any microbatches give the bits of one process.

Ranks are threads here, and segments go through queues, so that many plans are tried quickly;
``test_ranks`` does the same over processes and real backends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeserve.comm.build import parallel_over
from moeserve.comm.dispatcher import Dispatcher, FlatDispatcher, HierarchicalDispatcher
from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import LayerLayout
from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.kernels.wire import Combine
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.spec import MoeSpec
from moeserve.observe.progress import Progress

T = TypeVar("T")
DEADLINE_S = 60.0
BLOCK = 8


# The exchange of (name, rank, world) in one group of threads.
Post = Callable[[str, int, int], Exchange]


def in_threads(world: int, work: Callable[[int], T]) -> list[T]:
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world)]


def random_layouts(decoder: Decoder, world: int, extra: int, seed: int) -> dict[int, LayerLayout]:
    """Every expert somewhere, ``extra`` slots a rank for replicas."""
    random, found = np.random.default_rng(seed), {}
    for number, layer in enumerate(decoder.spec.layers):
        if isinstance(layer.mlp, MoeSpec):
            experts = layer.mlp.router.num_experts
            slots = (-(-experts // world) + extra) * world
            more = random.integers(experts, size=slots - experts)
            expert_S = random.permutation(np.concatenate((np.arange(experts), more)))
            found[number] = LayerLayout(expert_S.astype(np.int32), experts, world)
    return found


def rank_of_group(
    path: Path, ops: Ops, layouts: dict[int, LayerLayout], rank: int, how: dict[str, Any]
) -> Decoder:
    mine = {layer: layout.of_rank(rank) for layer, layout in layouts.items()}
    return load_decoder(path, ops=ops, options=LoadOptions(**how), experts=mine)


def dispatcher(ops: Ops, post: Post, rank: int, world: int, size: int) -> Dispatcher:
    topology = Topology(tuple(r // size for r in range(world)))
    if size == 1 or size == world:
        return FlatDispatcher(ops, post("all", rank, world), topology, Progress())
    outer = post(f"rail {rank % size}", rank // size, world // size)
    inner = post(f"node {rank // size}", rank % size, size)
    return HierarchicalDispatcher(ops, outer, inner, topology, Progress())


@dataclass(frozen=True)
class Job:
    """Sequences, the home of each, and how a rank's tokens are cut into microbatches."""

    prompts: list[list[int]]
    home: list[int]
    micro: int
    seed: int


def spans_of(job: Job, rank: int) -> list[list[Span]]:
    """This rank's prompts in microbatches, some cut in two; blocks are the rank's own."""
    random = np.random.default_rng(job.seed + rank)
    parts: list[list[Span]] = [[] for _ in range(job.micro)]
    first = 0
    for prompt, home in zip(job.prompts, job.home, strict=True):
        if home != rank:
            continue
        blocks = list(range(first, first := first + -(-len(prompt) // BLOCK)))
        cut = int(random.integers(len(prompt)))
        m = int(random.integers(job.micro))
        if cut and m + 1 < job.micro:
            parts[m].append(Span(prompt[:cut], 0, blocks, 0))
            parts[m + 1].append(Span(prompt[cut:], cut, blocks, 1))
        else:
            parts[m].append(Span(prompt, 0, blocks, 1))
    return parts


def logits_of_rank(decoder: Decoder, job: Job, rank: int) -> dict[int, Tensor]:
    """By number of the prompt."""
    parts = spans_of(job, rank)
    cache = decoder.new_cache(64, BLOCK)
    rows = decoder.forward_micro([pack_spans(spans, BLOCK) for spans in parts], cache)
    found = {}
    for spans, logits in zip(parts, rows, strict=True):
        for span, row in zip([s for s in spans if s.logits], logits, strict=True):
            number = next(
                i
                for i, prompt in enumerate(job.prompts)
                if job.home[i] == rank
                and prompt[-len(span.token_ids) :] == list(span.token_ids)
                and span.start + len(span.token_ids) == len(prompt)
            )
            found[number] = row
    return found


def alone(decoder: Decoder, prompts: list[list[int]]) -> list[Tensor]:
    return [
        decoder.forward(
            pack_spans([Span(p, 0, list(range(-(-len(p) // BLOCK))), 1)], BLOCK),
            decoder.new_cache(8, BLOCK),
        )[0]
        for p in prompts
    ]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int, Job]:
    world, size = draw(st.sampled_from([(2, 1), (3, 1), (4, 1), (4, 2), (6, 3)]))
    extra = draw(st.integers(0, 2))
    seed = draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    count = draw(st.integers(0, 5))
    prompts = [
        # Distinct beginnings, so that a row's prompt can be told.
        [i, *random.integers(256, size=int(random.integers(1, 30))).tolist()]
        for i in range(count)
    ]
    home = [draw(st.integers(0, world - 1)) for _ in prompts]
    return world, size, extra, Job(prompts, home, draw(st.integers(1, 3)), seed)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "how",
    [{}, {"quantization": "int8"}, {"combine": Combine.ORDERED}],
    ids=["floats", "int8", "ordered"],
)
@given(setting=jobs())
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_ranks_give_the_bits_of_one_process(
    tiny_checkpoint: Callable[[str], Path],
    ops: Ops,
    new_post: Callable[[], Post],
    family: str,
    how: dict[str, Any],
    setting: tuple[int, int, int, Job],
) -> None:
    world, size, extra, job = setting
    path = tiny_checkpoint(family)
    whole = load_decoder(path, ops=ops, options=LoadOptions(**how))
    layouts = random_layouts(whole, world, extra, job.seed)
    post = new_post()

    def work(rank: int) -> dict[int, Tensor]:
        decoder = rank_of_group(path, ops, layouts, rank, how)
        moves = dispatcher(ops, post, rank, world, size)
        over = parallel_over(ops, decoder.stack.layers, layouts, moves, Progress())
        return logits_of_rank(decoder.over(over), job, rank)

    found = {n: row for rows in in_threads(world, work) for n, row in rows.items()}
    expected = alone(whole, job.prompts)
    assert sorted(found) == list(range(len(expected)))
    for number, row in enumerate(expected):
        assert torch.equal(found[number], row), number
