"""What ranks that are measured work on: sequences, their routing in one process, and plans.

The demo model writes its sequences itself, so that experts are chosen as on text it knows; a model
of random weights gets random tokens. Plans are fitted on sequences of their own, of which no rank
sees any. Letters as in ``placement``: T tokens, L layers, K choices, E experts, R ranks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.config.options import LoadOptions
from moeserve.evaluate.texts import sampled_windows
from moeserve.kernels.ops import RouterSpec
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import DEMO, resolve_model
from moeserve.models.spec import MoeSpec
from moeserve.placement.cluster import Cluster, Dataflow
from moeserve.placement.cost import traffic
from moeserve.placement.plan import Plan, contiguous
from moeserve.placement.problem import Problem
from moeserve.placement.routing import Routing, split, workload_of_tokens
from moeserve.placement.solvers.portfolio import Budget, Solver
from moeserve.placement.solvers.robust import solve_asked

BLOCK = 16
SLACK = 1.1  # how much a solved plan may be out of balance
HELD_OUT = 0.1  # as `moeserve place solve` does

I32 = NDArray[np.int32]
Say = Callable[[str], None]

PLANS = {
    "contiguous": Solver.CONTIGUOUS,
    "EPLB": Solver.EPLB,
    "MoETuner": Solver.MOETUNER,
    "solved": Solver.AUTO,
}


@dataclass(frozen=True, slots=True)
class StepInputs:
    """``settings`` are for ``rank.set_up``. ``topk_RS[r][s]`` is the routing of a sequence of a
    rank."""

    model: str
    quantization: str
    sequences_RS: Sequence[Sequence[Sequence[int]]]
    topk_RS: Sequence[Sequence[I32]]
    plans: Mapping[str, Plan]
    hidden: int
    top_k: int

    def settings(self, threads: int, backend: str) -> dict[str, Any]:
        plans = {
            name: {
                str(layer): plan.expert_LS[l].tolist() for l, layer in enumerate(plan.moe_layers)
            }
            for name, plan in self.plans.items()
        }
        return {
            "model": str(resolve_model(self.model)),
            "quantization": self.quantization,
            "threads": threads,
            "backend": backend,
            "experts": next(iter(self.plans.values())).num_experts,
            "plans": plans,
            "sequences": self.sequences_RS,
        }

    def predicted_copies(
        self, spans_R: Sequence[Sequence[tuple[int, int, int]]], plan: str, flow: Dataflow
    ) -> float:
        """Copies to other ranks per token and layer, one way, by the cost model."""
        topk, homes = [], []
        for r, spans in enumerate(spans_R):
            for sequence, start, stop in spans:
                topk.append(self.topk_RS[r][sequence][start:stop])
                homes.append(np.full(stop - start, r, np.int32))
        home_T = np.concatenate(homes)
        moves = traffic(self.plans[plan], np.concatenate(topk), dataflow=flow, home_T=home_T)
        return moves.copies / 2


class _Routes:
    """Keeps the ids of the layers of one forward pass."""

    def __init__(self) -> None:
        self.layers: list[NDArray[np.int32]] = []

    def record(self, layer: int, ids_TC: NDArray[np.int32]) -> None:
        del layer
        self.layers.append(ids_TC.copy())


def prepare(
    model: str,
    quantization: str,
    *,
    ranks: int,
    each: int,
    tokens: int,
    plans: Sequence[str],
    seconds: float,
    say: Say,
) -> StepInputs:
    """``each`` sequences for every rank, ``tokens`` long; half as many again fit the plans."""
    ops = choose_ops(threads=None)
    options = LoadOptions.model_validate({"quantization": quantization})
    decoder = load_decoder(resolve_model(model), ops=ops, options=options)
    fitting = -(-ranks * each // 2) if len(plans) > 1 else 0
    count = ranks * each + fitting
    say(f"{model}: {count} sequences of {tokens} tokens")
    sequences = _sequences(decoder, model, count, tokens)
    topk = [_routed(decoder, ids) for ids in sequences]
    router = _routers(decoder)[0]
    found = {}
    for name in plans:
        say(f"{model}: plan {name}")
        found[name] = _plan(decoder, name, model, ranks, topk[ranks * each :], seconds)
    return StepInputs(
        model=model,
        quantization=quantization,
        sequences_RS=[sequences[r * each : (r + 1) * each] for r in range(ranks)],
        topk_RS=[topk[r * each : (r + 1) * each] for r in range(ranks)],
        plans=found,
        hidden=decoder.spec.hidden,
        top_k=router.top_k,
    )


def _routers(decoder: Decoder) -> list[RouterSpec]:
    """Of the layers with experts."""
    return [s.mlp.router for s in decoder.spec.layers if isinstance(s.mlp, MoeSpec)]


def _plan(
    decoder: Decoder, name: str, model: str, ranks: int, fitting: Sequence[I32], seconds: float
) -> Plan:
    """A plan of ``PLANS`` for one rank a node, solved on the routing of the fitting sequences."""
    routers = _routers(decoder)
    experts, layers = routers[0].num_experts, decoder.spec.moe_layers
    if name == "contiguous":
        rows = contiguous(
            layers=len(routers), experts=experts, slots=experts, devices=ranks, nodes=ranks
        )
        return Plan(rows, experts, ranks, ranks, layers)
    lens = np.array([len(topk_TLK) for topk_TLK in fitting], np.int64)
    work = workload_of_tokens(model, np.concatenate(fitting), lens, num_experts=experts)
    problem = Problem(Cluster(ranks, ranks), experts, max_imbalance=SLACK)
    fitted, held = split(Routing((work,), layers), HELD_OUT)
    return solve_asked(problem, fitted, held, PLANS[name], Budget(seconds)).plan


def _sequences(decoder: Decoder, model: str, count: int, tokens: int) -> list[list[int]]:
    if model == DEMO:
        # A window has one token more than it scores the context of.
        windows = sampled_windows(
            decoder, window=tokens, tokens=count * (tokens - tokens // 2), seed=1
        )
        return [list(w.ids[:tokens]) for w in windows[:count]]
    drawn = random.Random(1)
    return [[drawn.randrange(decoder.spec.vocab) for _ in range(tokens)] for _ in range(count)]


def _routed(decoder: Decoder, ids: Sequence[int]) -> I32:
    """[T, L, K] of one sequence."""
    blocks = tuple(range(-(-len(ids) // BLOCK)))
    routes = _Routes()
    step = pack_spans([Span(ids, 0, blocks)], BLOCK)
    decoder.trunk(step, decoder.new_cache(len(blocks), BLOCK), routes)
    found: I32 = np.stack(routes.layers, axis=1)
    return found
