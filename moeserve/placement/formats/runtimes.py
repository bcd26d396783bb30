"""Plans in the formats of other runtimes, both ways.

``sglang``     JSON for ``--init-expert-location``: ``physical_to_logical_map`` [layers, slots].
               Dense layers stand in it as identities, since SGLang counts every layer.
``vllm``       JSON list [MoE layers, slots] of expert ids: vLLM's ``physical_to_logical_map``, as
               the proposed ``eplb_config.initial_expert_map_path`` reads it (vllm pull request
               49572; vLLM up to 0.26 reads no placement from a file). Also read: one list for all
               layers, and an object that holds the map under that name. Dense layers are not
               counted.
``ascend``     vLLM-Ascend ``expert_map.json``: layers of devices of expert lists.
``tensorrt``   TensorRT-LLM load-balancer YAML: slots, and the experts of each slot per model layer.
``lightllm``   LightLLM redundancy JSON: experts stay contiguous and every device holds the same
               extra experts of a layer; it cannot express other plans, which are refused.
``eplb``       JSON lines as scripts around DeepSeek's EPLB keep them: ``phy2log`` [MoE layers,
               slots] in each line. Of several lines, rearrangements in turn, the last is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.files import (
    MALFORMED,
    MOST_LAYERS,
    read_json,
    read_text,
    reason,
    require_size,
)
from moeserve.placement.plan import Plan, slot_table, tidy

# Which is read slowly.
_MOST_YAML_BYTES = 16 << 20
FORMATS = ("sglang", "vllm", "ascend", "tensorrt", "lightllm", "eplb")


def export(plan: Plan, form: str) -> str:
    """PlacementError for what the other runtime cannot do, as devices that differ in slots."""
    if plan.num_empty:
        raise PlacementError(
            f"{plan.num_empty} slots of the plan are empty; {_known(form)} knows no such slots: "
            "solve one with as many experts on every device"
        )
    return _EXPORTERS[_known(form)](plan)


def load(
    path: Path,
    form: str,
    *,
    num_experts: int,
    num_devices: int,
    num_nodes: int = 1,
    moe_layers: tuple[int, ...] | None = None,
) -> Plan:
    """The plan in ``path``; what the format leaves out is given."""
    require_size(str(path), 1, num_experts)
    rows, layers = _IMPORTERS[_known(form)](path, num_experts, num_devices, moe_layers)
    try:
        return Plan(slot_table(rows), num_experts, num_devices, num_nodes, layers)
    except PlacementError as cause:
        raise PlacementError(f"{path}: {cause.message}") from cause


def _known(form: str) -> str:
    if form not in FORMATS:
        raise PlacementError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    return form


def _sglang(plan: Plan) -> str:
    identity = [s % plan.num_experts for s in range(plan.num_slots)]
    rows = [identity] * (max(plan.moe_layers) + 1)
    for number, row_S in zip(plan.moe_layers, plan.expert_LS.tolist(), strict=True):
        rows[number] = row_S
    return json.dumps({"physical_to_logical_map": rows}) + "\n"


def _vllm(plan: Plan) -> str:
    return json.dumps(plan.expert_LS.tolist()) + "\n"


def _eplb(plan: Plan) -> str:
    return json.dumps({"phy2log": plan.expert_LS.tolist()}) + "\n"


def _ascend(plan: Plan) -> str:
    layers = []
    for l, row_S in enumerate(plan.expert_LS):
        devices = [
            {"device_id": d, "device_expert": experts}
            for d, experts in enumerate(row_S.reshape(plan.num_devices, -1).tolist())
        ]
        layers.append({"layer_id": l, "device_count": len(devices), "device_list": devices})
    return json.dumps({"moe_layer_count": plan.num_layers, "layer_list": layers}) + "\n"


def _tensorrt(plan: Plan) -> str:
    import yaml

    document = {
        "num_slots": plan.num_slots,
        "initial_global_assignments": dict(
            zip(plan.moe_layers, plan.expert_LS.tolist(), strict=True)
        ),
        "layer_updates_per_iter": 0,
    }
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=1 << 20)


def _lightllm(plan: Plan) -> str:
    extra = plan.slots_per_device - plan.num_experts // plan.num_devices
    document: dict[str, Any] = {"redundancy_expert_num": extra}
    for number, row_S in zip(plan.moe_layers, plan.expert_LS, strict=True):
        spare = _common_extras(row_S, plan.num_experts, plan.num_devices)
        if spare is None:
            raise PlacementError(
                f"layer {number}: LightLLM keeps experts contiguous and adds the same redundant "
                "experts to every device; this plan does otherwise (solve with "
                "--solver lightllm, or export to another format)"
            )
        document[str(number)] = spare
    return json.dumps(document) + "\n"


def _common_extras(row_S: NDArray[np.int32], experts: int, devices: int) -> list[int] | None:
    if experts % devices:
        return None
    own = np.arange(experts).reshape(devices, -1)
    spares = []
    for d, held in enumerate(row_S.reshape(devices, -1).tolist()):
        for e in own[d].tolist():
            if e not in held:
                return None
            held.remove(e)
        spares.append(sorted(held))
    return spares[0] if all(s == spares[0] for s in spares) else None


def lightllm_rows(load_LE: NDArray[np.float64], slots: int, devices: int) -> NDArray[np.int32]:
    """[L, S] the best that LightLLM's format can say: the heaviest experts on every device."""
    experts = load_LE.shape[1]
    if experts % devices or slots % devices or slots < experts:
        raise PlacementError(f"{experts} experts, {slots} slots, {devices} devices: must divide")
    extra = (slots - experts) // devices
    heaviest_LX = np.argsort(-load_LE, axis=1, kind="stable")[:, :extra]
    own = np.broadcast_to(np.arange(experts).reshape(1, devices, -1), (len(load_LE), devices,
                          experts // devices))  # fmt: skip
    spare = np.broadcast_to(heaviest_LX[:, None, :], (len(load_LE), devices, extra))
    rows = np.concatenate((own, spare), axis=2).reshape(len(load_LE), slots)
    return tidy(rows.astype(np.int32), devices)


def _numbered(path: Path, rows: list[Any], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    numbers = tuple(range(len(rows))) if wanted is None else wanted
    if max(numbers, default=-1) >= len(rows):
        raise PlacementError(f"{path} has {len(rows)} layers, asked for layer {max(numbers)}")
    return numbers


_Rows = tuple[list[Any], tuple[int, ...]]


def _from_sglang(path: Path, _e: int, _d: int, wanted: tuple[int, ...] | None) -> _Rows:
    document = read_json(path)
    try:
        rows = document["physical_to_logical_map"]
        numbers = _numbered(path, rows, wanted)
        return [rows[n] for n in numbers], numbers
    except MALFORMED as cause:
        raise PlacementError(f"{path}: no physical_to_logical_map in it") from cause


def _from_vllm(path: Path, _e: int, _d: int, wanted: tuple[int, ...] | None) -> _Rows:
    document = read_json(path)
    rows = document.get("physical_to_logical_map") if isinstance(document, dict) else document
    if not isinstance(rows, list) or not rows:
        raise PlacementError(f"{path}: expected a list of expert ids for each MoE layer")
    if not isinstance(rows[0], list):
        if wanted is None:
            raise PlacementError(
                f"{path} has one list for all layers: say which they are with --layers"
            )
        rows = [rows] * len(wanted)
    return _moe_layers(path, rows, wanted)


def _from_eplb(path: Path, _e: int, _d: int, wanted: tuple[int, ...] | None) -> _Rows:
    lines = read_text(path).split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        rows = json.loads(last)["phy2log"]
        return _moe_layers(path, rows, wanted)
    except MALFORMED as cause:
        raise PlacementError(
            f"{path}: expected phy2log in each line of JSON: {reason(cause)}"
        ) from cause


def _moe_layers(path: Path, rows: list[Any], wanted: tuple[int, ...] | None) -> _Rows:
    """Of a file that knows only the layers that have experts."""
    if wanted is not None and len(wanted) != len(rows):
        raise PlacementError(f"{path} has {len(rows)} MoE layers, asked are {len(wanted)}")
    return rows, wanted or tuple(range(len(rows)))


def _from_ascend(path: Path, _e: int, devices: int, wanted: tuple[int, ...] | None) -> _Rows:
    document = read_json(path)
    try:
        layers = sorted(document["layer_list"], key=lambda layer: int(layer["layer_id"]))
        rows = []
        for layer in layers:
            listed = sorted(layer["device_list"], key=lambda device: int(device["device_id"]))
            if len(listed) != devices:
                raise PlacementError(f"{path} is for {len(listed)} devices, not {devices}")
            rows.append([e for device in listed for e in device["device_expert"]])
    except MALFORMED as cause:
        raise PlacementError(f"{path}: not an expert map: {reason(cause)}") from cause
    return _moe_layers(path, rows, wanted)


def _from_tensorrt(path: Path, _e: int, _d: int, wanted: tuple[int, ...] | None) -> _Rows:
    import yaml

    try:
        document = yaml.safe_load(read_text(path, _MOST_YAML_BYTES))
        table = {int(n): row for n, row in document["initial_global_assignments"].items()}
        numbers = tuple(sorted(table)) if wanted is None else wanted
        return [table[n] for n in numbers], numbers
    except (yaml.YAMLError, *MALFORMED) as cause:
        raise PlacementError(f"{path}: not a load-balancer file: {reason(cause)}") from cause


def _from_lightllm(path: Path, experts: int, devices: int, wanted: tuple[int, ...] | None) -> _Rows:
    document = read_json(path)
    try:
        extra = int(document["redundancy_expert_num"])
        numbers = wanted or tuple(sorted(int(k) for k in document if k.isdigit()))
        rows: list[Any] = []
        for n in numbers:
            spare = document.get(str(n), document.get("default"))
            if spare is None or len(spare) != extra or experts % devices or len(rows) > MOST_LAYERS:
                raise PlacementError(f"{path}: layer {n}: expected {extra} redundant experts")
            own = np.arange(experts).reshape(devices, -1).tolist()
            rows.append([e for mine in own for e in sorted(mine + list(spare))])
    except MALFORMED as cause:
        raise PlacementError(f"{path}: not a redundancy config: {reason(cause)}") from cause
    if not numbers:
        raise PlacementError(f"{path} names no layer; say which with --layers")
    return rows, numbers


_EXPORTERS: dict[str, Callable[[Plan], str]] = {
    "sglang": _sglang, "vllm": _vllm, "ascend": _ascend, "tensorrt": _tensorrt,
    "lightllm": _lightllm, "eplb": _eplb,
}  # fmt: skip
_IMPORTERS: dict[str, Callable[[Path, int, int, tuple[int, ...] | None], _Rows]] = {
    "sglang": _from_sglang,
    "vllm": _from_vllm,
    "ascend": _from_ascend,
    "tensorrt": _from_tensorrt,
    "lightllm": _from_lightllm,
    "eplb": _from_eplb,
}
