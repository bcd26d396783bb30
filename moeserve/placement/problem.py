"""What is asked of the solver; an infeasible wish is an error that names the constraint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Cluster, Dataflow, Phase
from moeserve.placement.plan import Plan
from moeserve.placement.routing import Routing


@dataclass(frozen=True, slots=True)
class Moves:
    """An existing plan, and what leaving it costs.

    Moving an expert costs ``expert_bytes * per_byte`` bytes of traffic; a copy of an activation
    saves ``copy_bytes`` each time, over ``horizon_tokens`` tokens.
    """

    previous: Plan
    expert_bytes: int
    copy_bytes: int
    horizon_tokens: int
    per_byte: float = 1.0

    def __post_init__(self) -> None:
        if min(self.expert_bytes, self.copy_bytes, self.horizon_tokens) < 1:
            raise PlacementError(
                "weighing moves needs expert bytes, bytes per copy and a horizon in tokens, all "
                "positive (--expert-bytes, --dispatch-bytes, --combine-bytes, --horizon-tokens)"
            )
        if not math.isfinite(self.per_byte) or self.per_byte < 0:
            raise PlacementError(f"cost per moved byte {self.per_byte} must be finite and >= 0")

    @property
    def copies_per_token(self) -> float:
        """The copies per token that one moved expert must save to pay for itself."""
        return self.expert_bytes * self.per_byte / self.copy_bytes / self.horizon_tokens


@dataclass(frozen=True, slots=True)
class Problem:
    """``max_imbalance`` bounds max/mean load where grouping trades balance for copies:
    that of the mixture; ``max_workload_imbalance`` that of each workload in it. ``variance_price``
    v makes grouping pay v k / 2 copies a token-layer (k experts a token) for each unit of variance,
    mean over devices, that the experts of a device add to its load, in fair shares, by rising and
    falling together (``solvers.covariance``).

    ``apart`` and ``together`` are pairs of experts that must not, or must, share a device in
    every layer. ``batch`` is the tokens of a decode step, read only in that phase.
    """

    cluster: Cluster
    slots: int
    dataflow: Dataflow = Dataflow.HOME_DEDUP
    phase: Phase = Phase.PREFILL
    max_imbalance: float = 1.03
    max_workload_imbalance: float = 2.0
    batch: int = 256
    expert_bytes: int = 0
    apart: tuple[tuple[int, int], ...] = ()
    together: tuple[tuple[int, int], ...] = ()
    moves: Moves | None = None
    groups: int = 1
    variance_price: float = 0.0

    @property
    def slots_per_device(self) -> int:
        return self.slots // self.cluster.devices


def check(problem: Problem, routing: Routing) -> None:
    """Refuse what cannot be done, before anything is searched or written."""
    cluster, experts = problem.cluster, routing.num_experts
    if problem.slots < experts:
        raise PlacementError(
            f"{problem.slots} slots cannot hold {experts} experts; every expert needs one "
            f"(--slots {-(-experts // cluster.devices) * cluster.devices} or more)"
        )
    if problem.slots % cluster.devices:
        fit = -(-problem.slots // cluster.devices) * cluster.devices
        raise PlacementError(
            f"{problem.slots} slots do not divide over {cluster.devices} devices; use --slots {fit}"
        )
    for name in ("max_imbalance", "max_workload_imbalance"):
        limit = getattr(problem, name)
        if not math.isfinite(limit) or limit < 1:
            raise PlacementError(f"{name}={limit}: must be finite and at least 1")
    if not math.isfinite(problem.variance_price) or problem.variance_price < 0:
        raise PlacementError(
            f"variance_price={problem.variance_price}: must be finite and at least 0"
        )
    if problem.batch < 1:
        raise PlacementError(f"batch={problem.batch}: must be at least 1 token")
    needed = problem.expert_bytes * problem.slots_per_device * routing.num_layers
    if cluster.memory and needed > cluster.memory:
        raise PlacementError(
            f"memory: {problem.slots_per_device} slots x {routing.num_layers} layers x "
            f"{problem.expert_bytes} bytes = {needed} bytes per device, but a device has "
            f"{cluster.memory}; use more devices or fewer slots"
        )
    _check_pairs(problem, experts)
    if problem.moves is not None:
        _check_previous(problem, problem.moves.previous, routing)


def _check_pairs(problem: Problem, experts: int) -> None:
    for name, pairs in (("apart", problem.apart), ("together", problem.together)):
        for a, b in pairs:
            if not (0 <= a < experts and 0 <= b < experts) or a == b:
                raise PlacementError(
                    f"{name}: ({a}, {b}) must be two different experts below {experts}"
                )
    bundle = {e: e for e in range(experts)}
    for a, b in problem.together:
        joined, gone = bundle[a], bundle[b]
        bundle = {e: joined if of == gone else of for e, of in bundle.items()}
    for a, b in problem.apart:
        if bundle[a] == bundle[b]:
            raise PlacementError(f"experts {a} and {b} must be apart, but also together")
    largest = max(list(bundle.values()).count(root) for root in set(bundle.values()))
    if largest > problem.slots_per_device:
        raise PlacementError(
            f"{largest} experts must be together, but a device has {problem.slots_per_device} slots"
        )
    if problem.together and problem.slots != experts:
        raise PlacementError("experts can be kept together only without redundant slots")


def _check_previous(problem: Problem, previous: Plan, routing: Routing) -> None:
    was = (previous.num_layers, previous.num_experts, previous.num_devices, previous.num_slots)
    now = (routing.num_layers, routing.num_experts, problem.cluster.devices, problem.slots)
    if was != now:
        raise PlacementError(
            f"the existing plan has (layers, experts, devices, slots) = {was}, asked is {now}; "
            "a plan can only be changed into one of the same size"
        )


def require_pairs(problem: Problem, plan: Plan) -> None:
    """A plan that breaks a pair is refused."""
    rows = plan.expert_LS.reshape(plan.num_layers, plan.num_devices, -1)
    for wanted, pairs in ((False, problem.apart), (True, problem.together)):
        for a, b in pairs:
            both_L = ((rows == a).any(axis=2) & (rows == b).any(axis=2)).any(axis=1)
            if (both_L != wanted).any():
                what = "together" if wanted else "apart"
                raise PlacementError(
                    f"experts {a} and {b} could not be kept {what} in layer "
                    f"{int(np.flatnonzero(both_L != wanted)[0])}; ask for fewer pairs"
                )
