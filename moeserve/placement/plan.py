"""The plan: which expert lies in which slot of every layer, as data and as a versioned JSON file.

File, version 1::

    {"format": "moeserve-plan", "version": 1,
     "num_experts": E, "num_devices": D, "num_nodes": N, "moe_layers": [L model layer numbers],
     "dataflow": "home-dedup", "phase": "prefill",
     "expert_of_slot": [L rows of S expert ids],        slot s lies on device s // (S / D);
                                                             -1 is an empty one
     "guide": null | {"shape": [L, E, D], "uint8": base64},   only for dataflow "migrate"
     "figures": {...}}                                   what `solve` reported; not read back

``guide[l, e, d]`` is how likely (of 255) a token that uses expert e in layer l uses device d in
the layer after: a migrating token stays on the device of its own with the largest sum.
Devices that hold fewer experts than others have empty slots, behind those that are filled; one at
least is filled on each device in each layer.
Which copy of an expert a token uses: ``split``; for "migrate" copy ``t % copies`` of token t.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cluster import Dataflow, Phase
from moeserve.placement.files import (
    MALFORMED,
    MOST_DEVICES,
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_PLAN_BYTES,
    MOST_SLOTS,
    read_json,
    reason,
    shown,
    whole_number,
)

FORMAT = "moeserve-plan"
VERSION = 1
EMPTY = -1
MOST_OF = {"num_experts": MOST_EXPERTS, "num_devices": MOST_DEVICES, "num_nodes": MOST_DEVICES}
_KEYS = {
    "format", "version", "num_experts", "num_devices", "num_nodes", "moe_layers", "dataflow",
    "phase", "expert_of_slot", "guide", "figures",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    expert_LS: NDArray[np.int32]
    num_experts: int
    num_devices: int
    num_nodes: int
    moe_layers: tuple[int, ...]
    dataflow: Dataflow = Dataflow.HOME_DEDUP
    phase: Phase = Phase.PREFILL
    guide_LED: NDArray[np.uint8] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.expert_LS.ndim != 2 or not self.expert_LS.size:
            raise PlacementError("a plan needs one row of slots per layer")
        layers, slots = self.expert_LS.shape
        if self.num_devices < 1 or slots % self.num_devices:
            raise PlacementError(
                f"{slots} slots do not divide over {self.num_devices} devices; "
                f"the next count that does is {-(-slots // max(1, self.num_devices)) * max(1, self.num_devices)}"  # noqa: E501
            )
        if self.num_nodes < 1 or self.num_devices % self.num_nodes:
            raise PlacementError(
                f"{self.num_devices} devices do not divide over {self.num_nodes} nodes"
            )
        if len(self.moe_layers) != layers:
            raise PlacementError(f"{len(self.moe_layers)} layer numbers for {layers} rows of slots")
        unknown_LS = (self.expert_LS < EMPTY) | (self.expert_LS >= self.num_experts)
        if unknown_LS.any():
            l, s = np.argwhere(unknown_LS)[0]
            raise PlacementError(
                f"layer {l}, slot {s}: unknown expert {self.expert_LS[l, s]}; "
                f"the model has {self.num_experts}"
            )
        self._check_empty_slots()
        missing_LE = self.copies_LE == 0
        if missing_LE.any():
            l, e = np.argwhere(missing_LE)[0]
            raise PlacementError(f"layer {l}: expert {e} has no slot; every expert needs one")
        shape = (layers, self.num_experts, self.num_devices)
        if self.guide_LED is not None and self.guide_LED.shape != shape:
            raise PlacementError(f"guide has shape {self.guide_LED.shape}, expected {shape}")

    def _check_empty_slots(self) -> None:
        empty_LDS = (self.expert_LS == EMPTY).reshape(len(self.expert_LS), self.num_devices, -1)
        between_LD = (empty_LDS[:, :, :-1] & ~empty_LDS[:, :, 1:]).any(axis=2)
        for wrong_LD, why in (
            (empty_LDS[:, :, 0], "has no expert; each device needs one at least in every layer"),
            (between_LD, "has an empty slot before a filled one; empty ones come last"),
        ):
            if wrong_LD.any():
                l, d = np.argwhere(wrong_LD)[0]
                raise PlacementError(f"layer {l}: device {d} {why}")

    @property
    def num_empty(self) -> int:
        return int((self.expert_LS == EMPTY).sum())

    @property
    def num_layers(self) -> int:
        return int(self.expert_LS.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.expert_LS.shape[1])

    @property
    def slots_per_device(self) -> int:
        return self.num_slots // self.num_devices

    @property
    def copies_LE(self) -> NDArray[np.int64]:
        layers = self.expert_LS.shape[0]
        flat_LS = self.expert_LS + np.arange(layers, dtype=np.int64)[:, None] * self.num_experts
        filled_N = flat_LS[self.expert_LS != EMPTY]
        counts = np.bincount(filled_N, minlength=layers * self.num_experts)
        return counts.reshape(layers, self.num_experts)

    @property
    def device_S(self) -> NDArray[np.int32]:
        slots = np.arange(self.num_slots, dtype=np.int32)
        return slots // np.int32(self.slots_per_device)

    @property
    def node_D(self) -> NDArray[np.int32]:
        devices = np.arange(self.num_devices, dtype=np.int32)
        return devices // np.int32(self.num_devices // self.num_nodes)

    def outline(self) -> dict[str, Any]:
        """Its size and kind, for figures."""
        return {
            "layers": self.num_layers, "experts": self.num_experts, "slots": self.num_slots,
            "devices": self.num_devices, "nodes": self.num_nodes, "dataflow": str(self.dataflow),
            "phase": str(self.phase),
        }  # fmt: skip

    def sorted(self) -> Plan:
        """The same plan with each device's experts in ascending order."""
        return with_slots(self, tidy(self.expert_LS, self.num_devices))


def tidy(expert_LS: NDArray[np.int32], devices: int) -> NDArray[np.int32]:
    """Experts ascending inside each device, empty slots last: equal plans become equal arrays."""
    layers, slots = expert_LS.shape
    last = np.iinfo(np.int32).max
    ordered_LS = np.where(expert_LS == EMPTY, last, expert_LS)
    by_device = np.sort(ordered_LS.reshape(layers, devices, slots // devices), axis=2)
    by_device[by_device == last] = EMPTY
    return np.ascontiguousarray(by_device.reshape(layers, slots), dtype=np.int32)


def with_slots(plan: Plan, expert_LS: NDArray[np.int32]) -> Plan:
    return Plan(
        expert_LS, plan.num_experts, plan.num_devices, plan.num_nodes, plan.moe_layers,
        plan.dataflow, plan.phase, plan.guide_LED, plan.figures,
    )  # fmt: skip


def contiguous(
    *, layers: int, experts: int, slots: int, devices: int, nodes: int = 1
) -> NDArray[np.int32]:
    """Experts in their own order; slots beyond them start again from expert 0."""
    if slots < experts or slots % devices or devices % nodes:
        raise PlacementError(
            f"{experts} experts in {slots} slots on {devices} devices of {nodes} nodes: "
            "slots must be at least the experts and a multiple of the devices"
        )
    row_S = np.arange(slots, dtype=np.int32) % np.int32(experts)
    return np.tile(row_S, (layers, 1))


def moved_slots(old: Plan, new: Plan) -> int:
    """How many experts a change of plan must copy to a device that lacks them."""
    if (old.num_layers, old.num_experts, old.num_devices) != (
        new.num_layers, new.num_experts, new.num_devices,
    ):  # fmt: skip
        raise PlacementError("the two plans differ in layers, experts or devices")
    layer_N, slot_N = np.nonzero(new.expert_LS != EMPTY)
    return int((~held(old)[layer_N, new.device_S[slot_N], new.expert_LS[layer_N, slot_N]]).sum())


def held(plan: Plan) -> NDArray[np.bool_]:
    """[L, D, E]: does the device hold the expert."""
    held_LDE = np.zeros((plan.num_layers, plan.num_devices, plan.num_experts), np.bool_)
    layer_N, slot_N = np.nonzero(plan.expert_LS != EMPTY)
    held_LDE[layer_N, plan.device_S[slot_N], plan.expert_LS[layer_N, slot_N]] = True
    return held_LDE


def dump(plan: Plan) -> str:
    guide = None
    if plan.guide_LED is not None:
        packed = base64.b64encode(np.ascontiguousarray(plan.guide_LED).tobytes()).decode("ascii")
        guide = {"shape": list(plan.guide_LED.shape), "uint8": packed}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": plan.num_experts,
        "num_devices": plan.num_devices,
        "num_nodes": plan.num_nodes,
        "moe_layers": list(plan.moe_layers),
        "dataflow": str(plan.dataflow),
        "phase": str(plan.phase),
        "expert_of_slot": plan.expert_LS.tolist(),
        "guide": guide,
        "figures": dict(plan.figures),
    }
    return json.dumps(document) + "\n"


def write_whole(path: Path, text: str) -> None:
    """All of the file or none of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as cause:
        beside.unlink(missing_ok=True)
        raise PlacementError(f"cannot write {path}: {cause.strerror}") from cause


def load(path: Path) -> Plan:
    document = read_json(path, MOST_PLAN_BYTES)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlacementError(f'{path} is not a plan of ours: "format" must be "{FORMAT}"')
    if document.get("version") != VERSION:
        raise PlacementError(
            f"{path} is plan version {shown(document.get('version'))}; this reads version {VERSION}"
        )
    if document.keys() != _KEYS:
        differing = sorted(document.keys() ^ _KEYS)
        raise PlacementError(f"{path}: keys differ in {[shown(key) for key in differing[:10]]}")
    try:
        return Plan(
            slot_table(document["expert_of_slot"]),
            _count(document, "num_experts"),
            _count(document, "num_devices"),
            _count(document, "num_nodes"),
            _layers(document["moe_layers"]),
            Dataflow(document["dataflow"]),
            Phase(document["phase"]),
            _guide(document["guide"]),
            dict(document["figures"]),
        )
    except PlacementError as cause:
        raise PlacementError(f"{path}: {cause.message}") from cause
    except MALFORMED as cause:  # of which binascii.Error is one
        raise PlacementError(f"{path}: malformed plan: {reason(cause)}") from cause


def slot_table(rows: Any) -> NDArray[np.int32]:
    """[L, S] from nested lists of whole numbers of equal length."""
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) for r in rows):
        raise PlacementError("expert ids must be a list with one list per layer")
    if len(rows) > MOST_LAYERS or len(rows[0]) > MOST_SLOTS:
        raise PlacementError(
            f"{len(rows)} layers of {len(rows[0])} slots; a plan has at most {MOST_LAYERS} of "
            f"{MOST_SLOTS}"
        )
    if len({len(r) for r in rows}) > 1:
        raise PlacementError("layers differ in their number of slots; all must have the same")
    if not all(type(e) is int and abs(e) < 2**31 for r in rows for e in r):
        raise PlacementError("expert ids must be whole numbers")
    return np.array(rows, np.int32)


def _count(document: Mapping[str, Any], key: str) -> int:
    return whole_number(document[key], key, 1, MOST_OF[key])


def _layers(listed: Any) -> tuple[int, ...]:
    if not isinstance(listed, list) or len(listed) > MOST_LAYERS:
        raise PlacementError(f"moe_layers must be a list of at most {MOST_LAYERS} layer numbers")
    return tuple(whole_number(l, "moe_layers", 0, MOST_LAYERS - 1) for l in listed)


def _guide(packed: Any) -> NDArray[np.uint8] | None:
    if packed is None:
        return None
    raw = base64.b64decode(packed["uint8"], validate=True)
    shape = [whole_number(n, "guide's shape", 1, MOST_SLOTS) for n in packed["shape"]]
    return np.frombuffer(raw, np.uint8).reshape(shape)
