"""Costs are those of a token followed by hand, in every dataflow."""

from __future__ import annotations

import numpy as np
import pytest

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.cost import (
    device_loads,
    histogram_homes,
    imbalance,
    phase_loads,
    split_loads,
    traffic,
)
from moeserve.placement.formats.runtimes import export
from moeserve.placement.layer_use import layer_uses, slots_of_tokens
from moeserve.placement.plan import Plan, held, moved_slots
from moeserve.placement.routing import Routing, workload_of_tokens
from moeserve.placement.split import slots_of, split_batch

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


def test_an_empty_slot_has_no_load_and_no_tokens() -> None:
    plan = Plan(np.array([[1, -1, 0, 2]], np.int32), 3, 2, 1, (0,))
    assert plan.num_empty == 1
    assert plan.copies_LE.tolist() == [[1, 1, 1]]
    assert held(plan)[0].tolist() == [[False, True, False], [True, False, True]]
    assert device_loads(plan, np.array([[4.0, 1.0, 3.0]])).tolist() == [[1.0, 7.0]]
    slots = slots_of_tokens(plan.expert_LS[0], np.array([[0, 1], [2, -1]], np.int32), 3)
    assert slots.tolist() == [[2, 0], [3, -1]]
    other = Plan(np.array([[2, 1, 0, -1]], np.int32), 3, 2, 1, (0,))
    assert moved_slots(plan, other) == 1
    assert other.sorted().expert_LS.tolist() == [[1, 2, 0, -1]]
    topk = np.array([[[0, 1]], [[1, 2]]], np.int32)
    assert traffic(plan, topk, home_T=np.array([0, 0], np.int32), batch=2).copies == 2.0
    with pytest.raises(PlacementError, match="1 slots of the plan are empty"):
        export(plan, "sglang")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1, -1, 0, 1], "device 0 has no expert"),
        ([0, 1, -1, 0], "device 1 has no expert"),
        ([0, -2, 1, 0], "unknown expert -2"),
        ([0, -1, 0, -1], "expert 1 has no slot"),
    ],
)
def test_empty_slots_are_the_last_of_a_device_that_has_others(row: list[int], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        Plan(np.array([row], np.int32), 2, 2, 1, (0,))
    with pytest.raises(PlacementError, match="before a filled one"):
        Plan(np.array([[0, -1, 1, 0, 1, 1]], np.int32), 2, 2, 1, (0,))


def replicated_plan(devices: int, experts: int, extra: int) -> Plan:
    row = np.concatenate((np.arange(experts), np.arange(extra * devices) % experts))
    per = len(row) // devices
    rows = np.stack([row, np.roll(row, per + 1)]).astype(np.int32)
    return Plan(rows, experts, devices, 1, (0, 1))


def test_replicas_cost_what_senders_choose() -> None:
    """Batch by batch, layer by layer, against the rule that the runtime follows."""
    plan = replicated_plan(4, 8, 2)
    random = np.random.default_rng(0)
    topk = np.argsort(random.random((75, 2, 8)), axis=2)[:, :, :3].astype(np.int32)
    home_T = random.integers(4, size=75).astype(np.int32)
    copies, loads = np.zeros(2), np.zeros((2, 4))
    for layer in range(2):
        slots = slots_of(plan.expert_LS[layer], 8)
        for home in range(4):
            mine = np.flatnonzero(home_T == home)
            for part in (mine[:16], mine[16:32], mine[32:]):
                slot_TK = split_batch(topk[part, layer], slots, ranks=4, home=home)
                device_TK = slot_TK // plan.slots_per_device
                copies[layer] += sum(2 * len(set(row) - {home}) for row in device_TK.tolist())
                loads[layer] += np.bincount(device_TK.ravel(), minlength=4)

    found = traffic(plan, topk, home_T=home_T, batch=16)
    assert found.copies_L == pytest.approx(copies / 75)
    assert split_loads(plan, topk, home_T=home_T, batch=16).tolist() == loads.tolist()


def test_without_replicas_batches_do_not_matter() -> None:
    topk = np.argsort(np.random.default_rng(1).random((50, 2, 8)), axis=2)[:, :, :3]
    each = [traffic(PLAN, topk.astype(np.int32), batch=batch).copies for batch in (1, 7, 64)]
    assert len(set(each)) == 1


def test_choosing_replicas_saves_copies_and_evens_out_load_against_taking_turns() -> None:
    random = np.random.default_rng(2)
    row = [0, 1, 2, 3, 12, 4, 5, 6, 7, 0, 8, 9, 10, 11, 1, 12, 13, 14, 15, 2]
    plan = Plan(np.array([row, row], np.int32), 16, 4, 1, (0, 1))
    popular = random.gumbel(size=(512, 2, 16)) + np.linspace(2, 0, 16)
    topk = np.argsort(-popular, axis=2)[:, :, :4].astype(np.int32)
    in_turn = [use.device_TK for use in layer_uses(plan, topk)]
    turned = np.stack([np.bincount(d.ravel(), minlength=4) for d in in_turn])
    turned_copies = np.mean([np.mean([len(set(r)) for r in d.tolist()]) for d in in_turn])

    chosen = split_loads(plan, topk)

    assert (chosen.max(axis=1) <= turned.max(axis=1)).all()
    assert traffic(plan, topk).copies < 2 * turned_copies * (1 - 1 / 4)


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
