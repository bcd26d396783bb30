"""A plan is taken for the model and the ranks it was made for, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moeserve.comm.layout import LayerLayout, check, layouts, own_experts, plan_of
from moeserve.comm.table import NumpyAssignmentTable, table_of
from moeserve.errors import PlacementError
from moeserve.kernels.wire import MOST_SLOTS, Wire
from moeserve.placement.cluster import Dataflow
from moeserve.placement.plan import Plan, contiguous, dump

LAYERS = (1, 2)
PLAN = Plan(np.array([[3, 0, 1, 2], [0, 1, 2, 3]], np.int32), 4, 4, 2, LAYERS)


def write(folder: Path, plan: Plan) -> Path:
    (folder / "plan.json").write_text(dump(plan))
    return folder / "plan.json"


def test_without_a_plan_experts_lie_in_their_order() -> None:
    plan = plan_of(None, LAYERS, 7, (0, 0, 0))
    own = [own_experts(layouts(plan, LAYERS, 7, 3), rank) for rank in range(3)]
    assert [o[1] for o in own] == [(0, 1, 2), (3, 4, 5), (6, 0, 1)]
    assert [o[2] for o in own] == [o[1] for o in own]


def test_beside_ranks_with_requests_the_others_share_the_experts() -> None:
    plan = plan_of(None, LAYERS, 7, (0, 0, 0, 0), attention_ranks=2)
    own = [own_experts(layouts(plan, LAYERS, 7, 4), rank) for rank in range(4)]
    assert [o[1] for o in own] == [(0,), (1,), (0, 1, 2, 3), (4, 5, 6)]
    assert [o[2] for o in own] == [o[1] for o in own]
    assert plan_of(None, LAYERS, 7, (0, 0), 2).expert_LS.tolist() == (
        plan_of(None, LAYERS, 7, (0, 0)).expert_LS.tolist()
    )


def test_a_plan_in_a_file_says_who_holds_what(tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, PLAN), LAYERS, 4, (0, 0, 1, 1))
    own = own_experts(layouts(plan, LAYERS, 4, 4), 0)
    assert own == {1: (3,), 2: (0,)}


@pytest.mark.parametrize("flow", list(Dataflow))
def test_a_plan_of_one_node_and_any_dataflow_fits_any_hosts(tmp_path: Path, flow: Dataflow) -> None:
    plan = replace(PLAN, num_nodes=1, dataflow=flow)
    assert plan_of(write(tmp_path, plan), LAYERS, 4, (0, 1, 0, 1)).dataflow is flow


@pytest.mark.parametrize(
    ("layers", "experts", "nodes", "said"),
    [
        ((1, 3), 4, (0, 0, 1, 1), "layers"),
        (LAYERS, 5, (0, 0, 1, 1), "5 in layers"),
        (LAYERS, 4, (0, 0, 1), "3 ranks serve it"),
        (LAYERS, 4, (0, 1, 0, 1), "run on nodes"),
        (LAYERS, 4, (0, 0, 0, 0), "--nodes"),
    ],
)
def test_a_plan_for_others_is_refused_with_the_file_and_the_reason(
    tmp_path: Path, layers: tuple[int, ...], experts: int, nodes: tuple[int, ...], said: str
) -> None:
    file = write(tmp_path, PLAN)
    with pytest.raises(PlacementError, match=said) as refused:
        plan_of(file, layers, experts, nodes)
    assert str(file) in refused.value.message


def plan_with(slots_per_device: int, devices: int) -> Plan:
    expert_LS = contiguous(layers=1, experts=8, slots=slots_per_device * devices, devices=devices)
    return Plan(expert_LS, 8, devices, 1, (0,))


@pytest.mark.parametrize(
    ("node_R", "most"),
    [
        ((0, 0), MOST_SLOTS),
        ((0, 1), MOST_SLOTS),
        ((0, 0, 1, 1), MOST_SLOTS // 2),
        (None, MOST_SLOTS),
    ],
    ids=["one node", "nodes of one rank", "nodes of two ranks", "nodes not asked"],
)
def test_slots_end_where_a_record_cannot_number_those_of_a_unit(
    node_R: tuple[int, ...] | None, most: int
) -> None:
    world = 2 if node_R is None else len(node_R)
    check(plan_with(most, world), (0,), 8, world, node_R)
    numbered = MOST_SLOTS + world // 2 if most < MOST_SLOTS else MOST_SLOTS + 1
    with pytest.raises(PlacementError, match=f"{numbered} slots .* at most {MOST_SLOTS}; solve"):
        check(plan_with(most + 1, world), (0,), 8, world, node_R)


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_slot_of_a_unit_arrives_as_it_was_numbered(size: int) -> None:
    """Natively and by the twin; one more slot on each rank is refused."""
    world, slots = 2 * size, MOST_SLOTS // size
    experts = world * slots
    layout = LayerLayout(np.arange(experts, dtype=np.int32), experts, world)
    ids_TC = torch.tensor([[experts - 1, 0]], dtype=torch.int32)
    for table in (table_of(layout, size), NumpyAssignmentTable(layout)):
        copies = table.assign(ids_TC, 0, ranks_per_unit=size).copies
        assert copies.slot_NC.tolist() == [[-1, 0], [MOST_SLOTS - 1, -1]]
        wire = Wire(torch.int8, 8, 2)
        record = torch.zeros(1, wire.row_bytes, dtype=torch.uint8)
        at = wire.slots_at
        record[:, at : at + 4] = copies.slot_NC[1:].contiguous().view(torch.uint8)
        relayed = table.relay([record.flatten()], wire, size)
        assert relayed.count_R == [0] * (size - 1) + [1]
        assert relayed.copies.slot_NC.tolist() == [[slots - 1, -1]]
    wider = LayerLayout(np.arange(experts + world, dtype=np.int32), experts + world, world)
    with pytest.raises(PlacementError, match=f"a record numbers at most {MOST_SLOTS}"):
        table_of(wider, size)
