"""A plan is taken for the model and the ranks it was made for, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeserve.comm.layout import layouts, own_experts, plan_of
from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow
from moeserve.placement.plan import Plan, dump

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
