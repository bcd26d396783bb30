"""What the cost model says of a plan is what ranks count when they serve by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moeserve.comm.build import copy_bytes, parallel_over
from moeserve.comm.dispatcher import DispatchStats, FlatDispatcher
from moeserve.comm.exchange.base import Exchange
from moeserve.comm.group import Topology
from moeserve.comm.layout import layouts, own_experts
from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer
from moeserve.observe.progress import Progress
from moeserve.placement import cost
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.plan import Plan
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers.portfolio import Budget, solve

WORLD, BLOCK, EXPERTS, LENGTH, WAIT_S = 4, 16, 32, 96, 60.0
ROOT = Path(__file__).resolve().parents[2]
# The exchange of (name, rank, world) in one group of threads.
Post = Callable[[str, int, int], Exchange]


@dataclass
class Routes:
    """A routing observer that keeps everything."""

    layers: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def record(self, layer: int, ids_TC: NDArray[np.int32]) -> None:
        self.layers[layer] = ids_TC.copy()


def prompts(count: int) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.load(resolve_model("demo"))
    # Text that no change of the project changes.
    text = (ROOT / "LICENSE").read_text()
    ids = tokenizer.encode(text)
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return [tuple(ids[start : start + LENGTH]) for start in starts]


def spans_of(some: Sequence[Sequence[int]]) -> list[Span]:
    blocks = -(-LENGTH // BLOCK)
    return [Span(p, 0, range(i * blocks, (i + 1) * blocks)) for i, p in enumerate(some)]


def routing_of(decoder: Decoder, some: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """[T, L, K] of one process."""
    routes = Routes()
    cache = decoder.new_cache(len(some) * LENGTH // BLOCK, BLOCK)
    decoder.forward(pack_spans(spans_of(some), BLOCK), cache, routes)
    return np.stack([routes.layers[layer] for layer in decoder.spec.moe_layers], axis=1)


def served(
    ops: Ops, post: Post, plan: Plan, homes: Sequence[Sequence[Sequence[int]]]
) -> list[DispatchStats]:
    """Each rank runs the prompts of its home in one step."""
    where = layouts(plan, plan.moe_layers, EXPERTS, WORLD)
    counted: dict[int, DispatchStats] = {}

    def run(rank: int) -> None:
        decoder = load_decoder(
            resolve_model("demo"), ops=ops, options=LoadOptions(quantization="int8"),
            experts=own_experts(where, rank),
        )  # fmt: skip
        moves = FlatDispatcher(ops, post("all", rank, WORLD), Topology((0,) * WORLD), Progress())
        parallel = parallel_over(ops, decoder.stack.layers, where, moves, Progress())
        cache = decoder.new_cache(len(homes[rank]) * LENGTH // BLOCK, BLOCK)
        decoder.over(parallel).forward(pack_spans(spans_of(homes[rank]), BLOCK), cache)
        counted[rank] = moves.stats

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [counted[rank] for rank in range(WORLD)]


@pytest.mark.parametrize("extra", [0, 2], ids=["one slot each", "replicas"])
def test_counted_copies_and_bytes_are_those_predicted(
    ops: Ops, new_post: Callable[[], Post], extra: int
) -> None:
    """Fitted on half of the texts, served on the other; predicted without knowing the homes."""
    whole = load_decoder(resolve_model("demo"), ops=ops, options=LoadOptions(quantization="int8"))
    texts = prompts(32)
    fit, other = texts[0::2], texts[1::2]
    layers = whole.spec.moe_layers
    trace = workload_of_tokens(
        "licence", routing_of(whole, fit), np.full(len(fit), LENGTH), num_experts=EXPERTS
    )
    slots = EXPERTS + extra * WORLD
    problem = Problem(Cluster(WORLD), slots, Dataflow.HOME_DEDUP)
    plan = solve(problem, Routing((trace,), layers), budget=Budget(None, threads=1))
    topk_TLK = routing_of(whole, other)
    each = len(other) // WORLD
    home_T = np.repeat(np.arange(WORLD, dtype=np.int32), each * LENGTH)

    stats = served(ops, new_post(), plan, [other[r * each : (r + 1) * each] for r in range(WORLD)])

    sent = sum(m.copies for m in stats)
    per_token_layer = 2 * sent / len(topk_TLK) / len(layers)
    known = cost.traffic(plan, topk_TLK, home_T=home_T, batch=each * LENGTH)
    assert per_token_layer == pytest.approx(known.copies, rel=1e-12)
    predicted = cost.traffic(plan, topk_TLK, batch=each * LENGTH)
    assert per_token_layer == pytest.approx(predicted.copies, rel=0.02)
    mlp = whole.stack.layers[layers[0]].mlp
    assert isinstance(mlp, tuple)
    weigh = copy_bytes(ops, mlp[1], mlp[0].weights.spec.top_k)
    on_devices = copy_bytes(ops, mlp[1], mlp[0].weights.spec.top_k, wide=True)
    assert on_devices.dispatch == weigh.dispatch
    assert on_devices.combine == 1 + 4 * whole.spec.hidden
    expected = predicted.copies / 2 * (weigh.dispatch + weigh.combine) * len(layers)
    counted = sum(m.dispatch_bytes + m.combine_bytes for m in stats)
    assert counted / len(topk_TLK) == pytest.approx(expected, rel=0.02)
