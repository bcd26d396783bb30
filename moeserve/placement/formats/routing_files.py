"""Read routing from whatever holds it.

==================  ==============================================================================
``.npz``            ``topk_ids`` [tokens, layers, k] with ``seq_lens`` (and ``domain_ids``), or a
                    count table ``logical_count`` / ``expert_counts``
``.safetensors``    the same names; ``moe_layers``, ``num_experts``, ``domains`` as metadata
``.json``           ``logical_count``, ``expert_load`` or another name below, or a bare table:
                    [layers, experts] or [steps, layers, experts]
``.pt``             SGLang recorder dumps: ``logical_count``, or ``records`` of per-token
                    ``topk_ids_of_layer``; read without unpickling objects
==================  ==============================================================================

Layers without any load (dense layers) are left out of count tables, and layers numbered as found.
A file may be given a weight: ``FILE:weight=2``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.files import (
    MALFORMED,
    MOST_EXPERTS,
    MOST_LAYERS,
    MemoryBudget,
    read_json,
    reason,
    require_regular,
    require_size,
    shown,
    whole_number,
)
from moeserve.placement.formats import torchfile
from moeserve.placement.formats.archive import open_archive
from moeserve.placement.routing import Routing, Workload, joined, workload_of_tokens

TRACE_NAMES = ("topk_ids", "seq_lens", "domain_ids")
COUNT_NAMES = (
    "logical_count", "expert_counts", "expert_load", "global_expert_load", "load", "weight",
)  # fmt: skip
_MOST_HEADER_BYTES = 4 << 20


def read_all(files: Sequence[str], *, num_experts: int | None = None) -> Routing:
    """Every file as one or more workloads of one model; experts as the largest file knows."""
    parts = [_named(f, num_experts) for f in files]
    if not parts:
        raise PlacementError("no routing given; pass at least one --routing FILE")
    most = max(part.num_experts for part in parts)
    if any(part.num_experts < most for part in parts):
        parts = [_named(f, most) for f in files]
    return joined(parts)


def _named(name: str, num_experts: int | None) -> Routing:
    path, weight = name, 1.0
    if ":weight=" in name:
        path, text = name.rsplit(":weight=", 1)
        try:
            weight = float(text)
        except ValueError as cause:
            raise PlacementError(f"{name}: weight {text!r} is not a number") from cause
    return read(Path(path), num_experts=num_experts, weight=weight)


def read(path: Path, *, num_experts: int | None = None, weight: float = 1.0) -> Routing:
    if num_experts is not None:
        require_size(str(path), 1, num_experts)
    require_regular(path)
    match path.suffix:
        case ".npz":
            return _from_arrays(path, _npz(path), {}, num_experts, weight)
        case ".safetensors":
            arrays, metadata = _safetensors(path)
            return _from_arrays(path, arrays, metadata, num_experts, weight)
        case ".json":
            return _from_document(path, read_json(path), num_experts, weight)
        case ".pt" | ".pth":
            document = torchfile.read(path)
            _require_tensors(path, document)
            return _from_document(path, document, num_experts, weight)
    raise PlacementError(f"{path}: expected .npz, .safetensors, .json or .pt")


def _wanted(names: Iterable[str]) -> list[str]:
    """The arrays that are read: a trace if there is one, else the first count table."""
    found = set(names)
    if "topk_ids" in found:
        return [name for name in TRACE_NAMES if name in found]
    return [name for name in COUNT_NAMES if name in found][:1]


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    with open_archive(path, ".npz") as archive:
        arrays = [name.removesuffix(".npy") for name in archive.names if name.endswith(".npy")]
        return {name: archive.array(f"{name}.npy") for name in _wanted(arrays)}


def _safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    _require_small_header(path)
    try:
        with safe_open(path, framework="np") as archive:
            wanted = _wanted(archive.keys())
            arrays = {name: archive.get_tensor(name) for name in wanted}
            return arrays, dict(archive.metadata() or {})
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError) as cause:
        raise PlacementError(f"{path} is not a readable .safetensors: {reason(cause)}") from cause


def _require_small_header(path: Path) -> None:
    """Its JSON is read as a whole, and takes many times its length."""
    with path.open("rb") as file:
        declared = int.from_bytes(file.read(8), "little")
    if declared > _MOST_HEADER_BYTES:
        raise PlacementError(
            f"{path} is not a readable .safetensors: a header of {declared} bytes, at most "
            f"{_MOST_HEADER_BYTES}"
        )


def _from_arrays(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
    num_experts: int | None,
    weight: float,
) -> Routing:
    if "topk_ids" not in arrays:
        for name in COUNT_NAMES:
            if name in arrays:
                return _counts(path, arrays[name], weight)
        raise PlacementError(
            f"{path} holds neither: expected topk_ids or one of {', '.join(COUNT_NAMES)}"
        )
    declared = _number(path, metadata, "num_experts")
    if declared is not None and num_experts is not None and declared > num_experts:
        raise PlacementError(f"{path} is of a model with {declared} experts, not {num_experts}")
    workload = workload_of_tokens(
        path.name,
        arrays["topk_ids"],
        arrays.get("seq_lens"),
        num_experts=num_experts if num_experts is not None else declared,
        domain_ids=arrays.get("domain_ids"),
        weight=weight,
    )
    layers = workload.load_LE.shape[0]
    return Routing((workload,), _layer_numbers(path, metadata, layers))


def _number(path: Path, metadata: Mapping[str, str], key: str) -> int | None:
    if key not in metadata:
        return None
    try:
        number = int(metadata[key])
    except ValueError as cause:
        given = shown(metadata[key])
        raise PlacementError(f"{path}: metadata {key}={given} is no number") from cause
    return whole_number(number, f"{path}: metadata {key}", 1, MOST_EXPERTS)


def _layer_numbers(path: Path, metadata: Mapping[str, str], layers: int) -> tuple[int, ...]:
    if "moe_layers" not in metadata:
        return tuple(range(layers))
    text = metadata["moe_layers"]
    try:
        listed = json.loads(text) if text.startswith("[") else text.split(",")
        numbers = [int(l) for l in listed]
    except MALFORMED as cause:
        raise PlacementError(f"{path}: metadata moe_layers={shown(text)} is no list") from cause
    return tuple(whole_number(n, f"{path}: moe_layers", 0, MOST_LAYERS - 1) for n in numbers)


def _counts(path: Path, table: Any, weight: float) -> Routing:
    try:
        if isinstance(table, np.ndarray) and table.dtype.kind not in "iufb":
            raise TypeError(f"its type is {table.dtype}")
        load_LE = np.asarray(table, np.float64)
    except MALFORMED as cause:
        raise PlacementError(
            f"{path}: ragged or non-numeric count table: {reason(cause)}"
        ) from cause
    if load_LE.ndim == 3:
        with np.errstate(over="ignore", invalid="ignore"):  # refused where it is checked
            load_LE = load_LE.sum(axis=0)
    if load_LE.ndim != 2 or not load_LE.size:
        raise PlacementError(
            f"{path}: counts have shape {load_LE.shape}, expected layers x experts"
        )
    require_size(f"{path}: counts", *load_LE.shape)
    kept_L = np.flatnonzero(~(load_LE == 0).all(axis=1))
    if not len(kept_L):
        raise PlacementError(f"{path}: all counts are zero")
    workload = Workload(path.name, load_LE[kept_L], weight)
    return Routing((workload,), tuple(int(l) for l in kept_L))


def _from_document(path: Path, document: Any, num_experts: int | None, weight: float) -> Routing:
    if isinstance(document, list):
        return _counts(path, document, weight)
    if not isinstance(document, dict):
        raise PlacementError(f"{path}: expected an object or a table of counts")
    if "records" in document:
        return _from_records(path, document["records"], num_experts, weight)
    for name in COUNT_NAMES:
        if name in document:
            return _counts(path, document[name], weight)
    raise PlacementError(
        f"{path} has keys {[shown(key) for key in list(document)[:10]]}; expected records or one "
        f"of {', '.join(COUNT_NAMES)}"
    )


def _require_tensors(path: Path, document: Any) -> None:
    """PlacementError where a list stands for a tensor: a pickle can name one list many times, so
    that it is of any size."""
    if not isinstance(document, dict):
        raise PlacementError(f"{path}: expected an object, as recorders dump it")
    for name in COUNT_NAMES:
        if not isinstance(document.get(name, np.empty(0)), np.ndarray):
            raise PlacementError(f"{path}: {name} is no tensor")
    records = document.get("records")
    for record in records if isinstance(records, list) else ():
        ids = record.get("topk_ids_of_layer") if isinstance(record, dict) else None
        if ids is not None and not isinstance(ids, np.ndarray):
            raise PlacementError(f"{path}: topk_ids_of_layer is no tensor")


def _from_records(path: Path, records: Any, num_experts: int | None, weight: float) -> Routing:
    """SGLang's per-token recorder: each record is a forward pass, here taken as a sequence."""
    if not isinstance(records, list) or not records:
        raise PlacementError(f"{path}: records is empty; record in mode per_token")
    passes = []
    budget = MemoryBudget(path, require_regular(path))
    for i, record in enumerate(records):
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise PlacementError(
                f"{path}: record {i} lacks topk_ids_of_layer; record in mode per_token"
            )
        try:
            ids_LTK = np.asarray(record["topk_ids_of_layer"])
        except MALFORMED as cause:
            raise PlacementError(
                f"{path}: record {i}: ragged or non-numeric: {reason(cause)}"
            ) from cause
        if ids_LTK.ndim != 3 or not np.issubdtype(ids_LTK.dtype, np.integer):
            raise PlacementError(f"{path}: record {i}: expected whole numbers [layers, tokens, k]")
        require_size(f"{path}: record {i}", ids_LTK.shape[0], ids_LTK.shape[2])
        # A record may be there many times and stand once in the file.
        budget.charge(ids_LTK.nbytes, "the records together")
        passes.append(ids_LTK.transpose(1, 0, 2))
    if len({p.shape[1:] for p in passes}) > 1:
        raise PlacementError(f"{path}: ragged records: layers and k differ between them")
    topk_TLK = np.concatenate(passes)
    used_L = np.flatnonzero((topk_TLK >= 0).any(axis=(0, 2)))
    topk_TLK = topk_TLK[:, used_L]
    seen_T = (topk_TLK >= 0).any(axis=(1, 2))
    seq_lens = np.array([(p[:, used_L] >= 0).any(axis=(1, 2)).sum() for p in passes], np.int64)
    workload = workload_of_tokens(
        path.name, topk_TLK[seen_T], seq_lens, num_experts=num_experts, weight=weight
    )
    return Routing((workload,), tuple(int(l) for l in used_L))
