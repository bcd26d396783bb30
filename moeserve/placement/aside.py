"""A plan solved in a process of its own, of low priority, beside one that serves.

``solve_aside`` sends the present plan and sampled tokens as JSON and gets slots back; the child
(``main``) calls the portfolio of solvers on one thread. Letters: T tokens, L layers, K choices per
token, S slots.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import DeadlineError, PlacementError, UnavailableError
from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan, slot_table
from moeserve.placement.problem import Moves, Problem
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.solvers.portfolio import Budget, Solver, solve
from moeserve.process.answer import Channel
from moeserve.process.ask import ask_once

START_S = 60.0  # that a process of low priority may take to start, beside busy ranks
OVERSHOOT = 3.0  # times its limit that the solver may take before it is ended


@dataclass(frozen=True, slots=True)
class MoveWeights:
    """What a moved expert costs and a saved copy is worth, as in ``problem.Moves``: bytes of an
    expert and of a copy (the mean of its ways out and back), tokens in which a move should pay."""

    expert_bytes: int
    copy_bytes: int
    horizon_tokens: int


@dataclass(frozen=True, slots=True)
class SolveSettings:
    """``seconds`` is the solver's limit. Without ``weights`` it may move experts for nothing."""

    seconds: float = 10.0
    weights: MoveWeights | None = None
    niceness: int = 10


DEFAULTS = SolveSettings()


def solve_aside(
    plan: Plan, topk_TLK: NDArray[np.int32], settings: SolveSettings = DEFAULTS
) -> Plan:
    """A plan of the same shape, for the tokens given. PlacementError, also when it is late."""
    weights = settings.weights
    request = {
        "do": "solve",
        "seconds": settings.seconds,
        "topk_ids": packed(topk_TLK),
        "experts": plan.num_experts,
        "devices": plan.num_devices,
        "nodes": plan.num_nodes,
        "expert_of_slot": plan.expert_LS.tolist(),
        "weights": None if weights is None else [
            weights.expert_bytes, weights.copy_bytes, weights.horizon_tokens,
        ],
    }  # fmt: skip
    limit_s = START_S + OVERSHOOT * settings.seconds
    command = [sys.executable, "-m", __name__]
    try:
        found = ask_once(
            "the solver", command, request, timeout_s=limit_s, niceness=settings.niceness
        )
    except DeadlineError as late:
        raise PlacementError(f"the solver did not end within {limit_s:g} s") from late
    except UnavailableError as failed:
        raise PlacementError(f"the solver failed: {failed.message}") from failed
    if "error" in found:
        raise PlacementError(f"the solver failed: {found['error']}")
    expert_LS = slot_table(found["expert_of_slot"])
    return replace(plan, expert_LS=expert_LS, guide_LED=None, figures={})


def packed(ids: NDArray[np.int32]) -> dict[str, Any]:
    """An array as JSON that takes little time to write."""
    raw = np.ascontiguousarray(ids, dtype="<i4").tobytes()
    return {"shape": list(ids.shape), "int32": base64.b64encode(raw).decode("ascii")}


def unpacked(sent: Mapping[str, Any]) -> NDArray[np.int32]:
    raw = base64.b64decode(sent["int32"], validate=True)
    return np.frombuffer(raw, "<i4").reshape(sent["shape"]).astype(np.int32)


def answer(
    seconds: float,
    topk_ids: Mapping[str, Any],
    experts: int,
    devices: int,
    nodes: int,
    expert_of_slot: list[list[int]],
    weights: list[int] | None,
) -> dict[str, Any]:
    """The child's side: slots, or why there are none."""
    try:
        previous = slot_table(expert_of_slot)
        layers = tuple(range(len(previous)))
        workload = workload_of_tokens("sampled now", unpacked(topk_ids), None, num_experts=experts)
        moves = None
        if weights is not None:
            moves = Moves(Plan(previous, experts, devices, nodes, layers), *weights)
        problem = Problem(Cluster(devices, nodes), previous.shape[1], moves=moves)
        routing = Routing((workload,), layers)
        found = solve(problem, routing, Solver.AUTO, Budget(seconds, threads=1))
    except PlacementError as error:
        return {"error": error.message}
    return {"expert_of_slot": found.expert_LS.tolist()}


def main() -> None:
    """Answer the one request that comes on standard input."""
    Channel().serve({"solve": answer})


if __name__ == "__main__":
    main()
