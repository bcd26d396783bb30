"""A plan solved in a process of its own, of low priority, beside one that serves.

``solve_aside`` sends the present plan and sampled tokens as JSON and gets slots back; the child
(``main``) does what ``moeserve place solve`` does, on one thread: how cautious a plan is, and
whether any is better than the present one, is judged on parts of the sample that were left out. It
ends at its limit of seconds, and takes no more of a CPU than serving leaves it (``niceness``).
Letters: T tokens, L layers, K choices per token, S slots.
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
from moeserve.placement.solvers.portfolio import Budget, Solver
from moeserve.placement.solvers.robust import solve_asked
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


def replanned(
    problem: Problem,
    previous: Plan,
    topk_TLK: NDArray[np.int32],
    weights: MoveWeights | None,
    budget: Budget,
) -> Plan:
    """What the child finds for ``problem``, in place of a plan of its size."""
    if weights is not None:
        moves = Moves(previous, weights.expert_bytes, weights.copy_bytes, weights.horizon_tokens)
        problem = replace(problem, moves=moves)
    workload = workload_of_tokens("sampled now", topk_TLK, None, num_experts=previous.num_experts)
    routing = Routing((workload,), previous.moe_layers)
    return solve_asked(problem, routing, None, Solver.AUTO, budget).plan


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
        rows = slot_table(expert_of_slot)
        previous = Plan(rows, experts, devices, nodes, tuple(range(len(rows))))
        problem = Problem(Cluster(devices, nodes), rows.shape[1])
        moving = None if weights is None else MoveWeights(*weights)
        plan = replanned(problem, previous, unpacked(topk_ids), moving, Budget(seconds, threads=1))
    except PlacementError as error:
        return {"error": error.message}
    return {"expert_of_slot": plan.expert_LS.tolist()}


def main() -> None:
    """Answer the one request that comes on standard input."""
    Channel().serve({"solve": answer})


if __name__ == "__main__":
    main()
