"""Plans survive being written, also in other runtimes' formats; broken ones are refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow
from moeserve.placement.formats import runtimes as exchange
from moeserve.placement.plan import Plan, contiguous, dump, load, moved_slots, with_slots


def random_plan(seed: int) -> Plan:
    random = np.random.default_rng(seed)
    devices = int(random.integers(1, 5))
    experts = devices * int(random.integers(1, 4))
    slots = experts + devices * int(random.integers(0, 2))
    layers = int(random.integers(1, 4))
    row = contiguous(layers=layers, experts=experts, slots=slots, devices=devices)
    rows = np.stack([random.permutation(r) for r in row]).astype(np.int32)
    guide = random.integers(0, 256, (layers, experts, devices)).astype(np.uint8)
    return Plan(
        rows, experts, devices, 1, tuple(range(1, layers + 1)), Dataflow.MIGRATE, guide_LED=guide
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_plan_comes_back_as_it_was_written(seed: int) -> None:
    plan = random_plan(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        path.write_text(dump(plan))
        back = load(path)
    assert dump(back) == dump(plan)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted({*exchange.FORMATS} - {"lightllm"})))
def test_other_formats_say_the_same_plan(seed: int, form: str) -> None:
    plan = replace(random_plan(seed), guide_LED=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, form)
        path.write_text(exchange.export(plan, form))
        back = exchange.load(
            path,
            form,
            num_experts=plan.num_experts,
            num_devices=plan.num_devices,
            moe_layers=plan.moe_layers,
        )
    assert back.expert_LS.tolist() == plan.expert_LS.tolist()
    assert back.moe_layers == plan.moe_layers


def test_formats_have_the_shape_their_readers_expect() -> None:
    plan = Plan(np.array([[1, 0, 2, 3]], np.int32), 4, 2, 1, (1,))
    sglang = json.loads(exchange.export(plan, "sglang"))
    assert sglang == {"physical_to_logical_map": [[0, 1, 2, 3], [1, 0, 2, 3]]}
    ascend = json.loads(exchange.export(plan, "ascend"))
    assert ascend["moe_layer_count"] == 1
    assert ascend["layer_list"][0]["device_list"][0] == {"device_id": 0, "device_expert": [1, 0]}
    tensorrt = yaml.safe_load(exchange.export(plan, "tensorrt"))
    assert tensorrt["num_slots"] == 4
    assert tensorrt["initial_global_assignments"] == {1: [1, 0, 2, 3]}


def test_vllm_and_eplb_files_in_every_form(tmp_path: Path) -> None:
    plan = Plan(np.array([[1, 0, 2, 3], [0, 2, 1, 3]], np.int32), 4, 2, 1, (1, 2))
    assert json.loads(exchange.export(plan, "vllm")) == plan.expert_LS.tolist()
    assert json.loads(exchange.export(plan, "eplb")) == {"phy2log": plan.expert_LS.tolist()}
    path = tmp_path / "map"
    known: dict[str, Any] = {"num_experts": 4, "num_devices": 2}
    path.write_text(json.dumps({"physical_to_logical_map": plan.expert_LS.tolist()}))
    assert exchange.load(path, "vllm", **known).expert_LS.tolist() == plan.expert_LS.tolist()
    path.write_text("[1, 0, 2, 3]")
    alike = exchange.load(path, "vllm", **known, moe_layers=(3, 4))
    assert (alike.expert_LS.tolist(), alike.moe_layers) == ([[1, 0, 2, 3]] * 2, (3, 4))
    with pytest.raises(PlacementError, match="which they are with --layers"):
        exchange.load(path, "vllm", **known)
    earlier = json.dumps({"phy2log": [[0, 1, 2, 3]]})
    path.write_text(f"{earlier}\n{exchange.export(plan, 'eplb')}\n")
    assert exchange.load(path, "eplb", **known).expert_LS.tolist() == plan.expert_LS.tolist()
    with pytest.raises(PlacementError, match="has 2 MoE layers, asked are 1"):
        exchange.load(path, "eplb", **known, moe_layers=(5,))


def test_lightllm_says_only_shared_extras(tmp_path: Path) -> None:
    load_LE = np.array([[1.0, 9.0, 2.0, 3.0]])
    plan = Plan(exchange.lightllm_rows(load_LE, 6, 2), 4, 2, 1, (3,))
    path = tmp_path / "config.json"
    path.write_text(exchange.export(plan, "lightllm"))
    assert json.loads(path.read_text()) == {"redundancy_expert_num": 1, "3": [1]}
    back = exchange.load(path, "lightllm", num_experts=4, num_devices=2)
    assert back.expert_LS.tolist() == plan.expert_LS.tolist()
    with pytest.raises(PlacementError, match="keeps experts contiguous"):
        exchange.export(with_slots(plan, np.array([[3, 0, 1, 1, 2, 0]], np.int32)), "lightllm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "reads version 1"),
        ({"format": "other"}, "not a plan of ours"),
        ({"surprise": 1}, "keys differ"),
        ({"num_devices": 2}, "do not divide over 2 devices"),
        ({"num_devices": 0}, "positive whole number"),
        ({"num_nodes": 2}, "do not divide over 2 nodes"),
        ({"num_experts": 2}, "unknown expert"),
        ({"expert_of_slot": [[0, 0, 0]]}, "has no slot"),
        ({"expert_of_slot": [[0, 1], [0]]}, "differ in their number of slots"),
        ({"expert_of_slot": [["a"]]}, "whole numbers"),
        ({"dataflow": "teleport"}, "malformed"),
        ({"moe_layers": [1, 2]}, "layer numbers"),
        ({"guide": {"shape": [1, 1, 1], "uint8": "AA=="}}, "guide has shape"),
        ({"guide": {"shape": [1], "uint8": "!"}}, "malformed"),
    ],
)
def test_a_broken_plan_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    plan = Plan(np.array([[0, 1, 2]], np.int32), 3, 1, 1, (0,))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(dump(plan)) | change))
    with pytest.raises(PlacementError, match=said):
        load(path)


def test_moves_are_counted_by_device_not_by_slot() -> None:
    old = Plan(np.array([[0, 1, 2, 3]], np.int32), 4, 2, 1, (0,))
    assert moved_slots(old, with_slots(old, np.array([[1, 0, 3, 2]], np.int32))) == 0
    assert moved_slots(old, with_slots(old, np.array([[2, 1, 0, 3]], np.int32))) == 2
