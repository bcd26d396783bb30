"""Costs are those of a token followed by hand, in every dataflow."""

from __future__ import annotations

import numpy as np
import pytest

from moeserve.placement.cost import (
    device_loads,
    histogram_homes,
    imbalance,
    phase_loads,
    slots_of_tokens,
    traffic,
)
from moeserve.placement.plan import Plan
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.topology import Dataflow, Phase

# Two layers of eight experts, two on each of four devices, two devices on each of two nodes.
PLAN = Plan(np.tile(np.arange(8, dtype=np.int32), (2, 1)), 8, 4, 2, (0, 1))
# One token: layer 0 uses experts 0, 1, 2 (devices 0, 0, 1), layer 1 experts 0, 6, 7 (0, 3, 3).
TOKEN = np.array([[[0, 1, 2], [0, 6, 7]]], np.int32)
HOME = np.array([0], np.int32)


def copies(flow: Dataflow, home: np.ndarray | None = HOME) -> tuple[list[float], list[float]]:
    moves = traffic(PLAN, TOKEN, dataflow=flow, home_T=home)
    return moves.copies_L.tolist(), moves.cross_L.tolist()


def test_replicated_costs_the_same_whatever_the_plan() -> None:
    assert copies(Dataflow.REPLICATED) == ([6.0, 6.0], [4.0, 4.0])


def test_per_expert_pays_for_every_remote_choice() -> None:
    assert copies(Dataflow.HOME_PER_EXPERT) == ([2.0, 4.0], [0.0, 4.0])


def test_dedup_pays_once_per_remote_device_and_node() -> None:
    assert copies(Dataflow.HOME_DEDUP) == ([2.0, 2.0], [0.0, 2.0])


def test_a_migrating_token_pays_from_where_it_stands() -> None:
    # Layer 0: stays on device 0, one other device out and back. It lands on device 0 (two of its
    # experts), which layer 1 uses too, with device 3 out, and back to wherever it lands.
    assert copies(Dataflow.MIGRATE) == ([2.0, 2.0], [0.0, 2.0])


@pytest.mark.parametrize("flow", [Dataflow.HOME_DEDUP, Dataflow.HOME_PER_EXPERT])
def test_uniform_homes_are_the_exact_mean_over_homes(flow: Dataflow) -> None:
    each = [copies(flow, np.array([d], np.int32)) for d in range(4)]
    mean_copies = np.mean([c for c, _ in each], axis=0)
    mean_cross = np.mean([x for _, x in each], axis=0)
    uniform = copies(flow, None)
    assert uniform[0] == pytest.approx(mean_copies.tolist())
    assert uniform[1] == pytest.approx(mean_cross.tolist())


def test_copies_of_an_expert_share_its_load_and_its_tokens() -> None:
    plan = Plan(np.array([[0, 1, 0, 2]], np.int32), 3, 2, 1, (0,))
    assert device_loads(plan, np.array([[4.0, 1.0, 1.0]])).tolist() == [[3.0, 3.0]]
    assert imbalance(plan, np.array([[4.0, 1.0, 3.0]])).tolist() == [1.25]
    slots = slots_of_tokens(plan.expert_LS[0], np.array([[0, 1], [0, 2], [0, -1]], np.int32), 3)
    assert slots.tolist() == [[0, 1], [2, 3], [0, -1]]


def test_decode_counts_experts_read_not_tokens() -> None:
    load = np.array([[90.0, 9.0, 1.0]])
    assert phase_loads(load, Phase.PREFILL, batch=64, k=1) is load
    read = phase_loads(load, Phase.DECODE, batch=64, k=1)
    assert read[0, 0] == pytest.approx(1.0)
    assert read[0, 2] == pytest.approx(1 - 0.99**64)


def test_homes_by_histogram_go_where_the_experts_are() -> None:
    topk = np.array([[[0, 1], [0, 1]]] * 4 + [[[6, 7], [6, 7]]] * 4, np.int32)
    routing = Routing((workload_of_tokens("two", topk, np.array([4, 4]), num_experts=8),), (0, 1))
    homes = histogram_homes(PLAN, routing, prefix=0.25, slack=4.0)
    assert homes.tolist() == [0] * 4 + [3] * 4
    assert traffic(PLAN, topk, home_T=homes).copies == 0.0
