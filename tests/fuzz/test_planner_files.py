"""Files of routing and plans: read, or a PlacementError that names the file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from moeserve.errors import PlacementError
from moeserve.placement.formats import runtimes
from moeserve.placement.formats.routing_files import read
from moeserve.placement.plan import Plan, contiguous, dump, load

EXAMPLES = 150
IDS = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 1], [0, 1]]], np.int16)
PLAN = Plan(contiguous(layers=2, experts=4, slots=6, devices=2), 4, 2, 1, (1, 2))


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, topk_ids=IDS, seq_lens=np.array([1, 2]), domain_ids=np.array([0, 1]))
    return out.getvalue()


def _torch() -> bytes:
    import torch

    out = io.BytesIO()
    ids = torch.tensor(IDS.transpose(1, 0, 2).astype(np.int64))
    torch.save({"records": [{"topk_ids_of_layer": ids}] * 2, "logical_count": ids[0]}, out)
    return out.getvalue()


def _safetensors() -> bytes:
    return save({"topk_ids": IDS}, {"num_experts": "4", "moe_layers": "[1, 2]"})


COUNTS = json.dumps({"logical_count": [[1, 2], [3, 4.5]]}).encode()
ROUTING = {".npz": _npz(), ".pt": _torch(), ".safetensors": _safetensors(), ".json": COUNTS}


def refused_by_name(path: Path, act: Any) -> None:
    said = path.name
    try:
        act()
    except PlacementError as error:
        said = error.message
    assert path.name in said
    assert len(said) < 2000


@pytest.mark.parametrize("suffix", ROUTING)
@given(data=st.data())
def test_routing_with_other_bytes(
    suffix: str, data: st.DataObject, spoiled: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"routing{suffix}"
    path.write_bytes(spoiled(ROUTING[suffix], data))
    refused_by_name(path, lambda: read(path))


@given(data=st.data())
def test_count_tables_and_records_of_anything(
    data: st.DataObject, values: st.SearchStrategy[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "counts.json"
    tables = st.lists(st.lists(values, max_size=3) | values, max_size=3) | values
    names = st.sampled_from(["logical_count", "records", "load", "topk_ids_of_layer"])
    records = st.fixed_dictionaries(
        {"records": st.lists(st.fixed_dictionaries({"topk_ids_of_layer": tables}), max_size=3)}
    )
    document = data.draw(st.dictionaries(names, tables, max_size=2) | records | tables)
    path.write_text(json.dumps(document))
    refused_by_name(path, lambda: read(path))


@given(data=st.data())
def test_plans_with_other_values(
    data: st.DataObject,
    values: st.SearchStrategy[Any],
    edited: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_text(json.dumps(edited(json.loads(dump(PLAN)), data, values)))
    refused_by_name(path, lambda: load(path))


@pytest.mark.parametrize("form", runtimes.FORMATS)
@given(data=st.data())
def test_plans_of_other_runtimes(
    form: str,
    data: st.DataObject,
    values: st.SearchStrategy[Any],
    edited: Any,
    spoiled: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"theirs.{form}"
    content = '{"redundancy_expert_num": 1, "1": [0], "2": [1]}'
    if form != "lightllm":
        content = runtimes.export(PLAN, form)
    if form != "tensorrt" and data.draw(st.booleans()):
        path.write_text(json.dumps(edited(json.loads(content), data, values)))
    else:
        path.write_bytes(spoiled(content.encode(), data))
    refused_by_name(path, lambda: runtimes.load(path, form, num_experts=4, num_devices=2))
