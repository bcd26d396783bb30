"""Parts of a decoder over memory that has their packed bytes, and the decoder over mapped files.

A skeleton, which the config implies, says what has to be there; ``packed.json`` says in which form.
CheckpointError where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, PlacementError
from moeserve.kernels.ops import (
    Experts,
    Layer,
    Linear,
    Ops,
    RecordLayout,
    Stack,
    lay_out_record,
)
from moeserve.kernels.records import LINE, MatrixForm, rounded_up
from moeserve.models.layer_runner import LayerRunner, LocalLayerRunner
from moeserve.models.packed.checkpoint import PackedCheckpoint, settled
from moeserve.models.packed.layout import (
    ExpertForm,
    Leaf,
    PackedPart,
    PackedRecords,
    TensorForm,
    require_runnable,
)
from moeserve.models.packed.leaves import Value, leaves_of, parts_of, with_leaves
from moeserve.models.spec import MoeSpec
from moeserve.models.weights import torch_dtype

if TYPE_CHECKING:
    from moeserve.models.decoder import Decoder, Mtp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Laid:
    """Packed parts over memory: what lies where is a folder's, how it is used an op table's."""

    checkpoint: PackedCheckpoint
    ops: Ops

    def layer(self, number: int, skeleton: Layer, memory: Tensor, experts: Experts | None) -> Layer:
        """A layer whose trunk lies, or will, in ``memory``; with these routed experts."""
        part = self.checkpoint.header.layers[number].trunk
        parts = parts_of(skeleton)
        found = self.leaves(f"layer {number}", part, leaves_of(parts), memory)
        if experts is not None:
            found["moe.experts"] = experts
        made = {
            name: self.ops.prepare(with_leaves(weights, name, found))
            for name, weights in parts.items()
        }
        mlp = made["dense"] if "dense" in made else (made["router"], made["moe"])
        return Layer(made["attention"], mlp)  # type: ignore[arg-type]

    def leaves(
        self, what: str, part: PackedPart, expected: Mapping[str, Value], memory: Tensor
    ) -> dict[str, Value]:
        """By name, over a region's memory."""
        where = f"{self.checkpoint.path}: {what}"
        if list(part.leaves) != list(expected):
            strange = sorted(set(part.leaves) ^ set(expected))
            raise CheckpointError(
                f"{where}: the config implies other parts than were packed "
                f"({', '.join(strange[:3])}); pack the model again"
            )
        start, found = 0, {}
        for name, leaf in part.leaves.items():
            require_alike(f"{where}: {name}", leaf, expected[name], memory.nbytes)
            end = start + leaf_bytes(self.ops, leaf, expected[name])
            if end > memory.nbytes:
                raise CheckpointError(f"{where}: {name} ends beyond its region; pack it again")
            found[name] = leaf_over(self.ops, leaf, expected[name], memory[start:end])
            start = end
        return found

    def record_layout(self, number: int, spec: MoeSpec, hidden: int) -> RecordLayout:
        """Of a layer's routed experts."""
        records = self.checkpoint.header.layers[number].experts
        where = f"{self.checkpoint.path}: layer {number}, experts"
        if records is None or len(records.digests) != spec.router.num_experts:
            raise CheckpointError(f"{where}: the config implies others; pack the model again")
        form = records.form
        whole = Experts(1, hidden, spec.intermediate, spec.activation, None)
        require_alike(where, form, whole, records.nbytes)
        layout = lay_out_record(self.ops.matrix_bytes, form.gate_up, form.down, spec.activation)
        biased = {form.gate_up.biased, form.down.biased}
        if layout.nbytes != records.nbytes or biased != {spec.expert_bias}:
            raise CheckpointError(f"{where}: records are not as their form; pack the model again")
        return layout

    def experts(
        self, number: int, spec: MoeSpec, hidden: int, own: Sequence[int] | None
    ) -> Experts:
        """Of the mapped file: all of a layer, or ``own`` in this order."""
        layout, num = self.record_layout(number, spec, hidden), spec.router.num_experts
        records = self.checkpoint.header.layers[number].experts
        assert records is not None, number
        picked = None if own is None or list(own) == list(range(num)) else list(own)
        if picked is not None and (not picked or not all(0 <= e < num for e in picked)):
            raise PlacementError(f"layer {number}: experts {picked} wanted of 0..{num - 1}")
        slots = num if picked is None else len(picked)
        self.checkpoint.bytes_read += layout.nbytes * len(range(num) if own is None else set(own))
        memory = records_memory(self.checkpoint, records)
        if self.ops.device.type == "cpu":
            return self.ops.experts_over(memory, layout, slots, picked)
        rows = memory.view(num, -1)
        own_rows = rows if picked is None else rows[torch.tensor(picked)]
        return self.ops.experts_over(on_device(self.ops, own_rows.flatten()), layout, slots)


def on_device(ops: Ops, memory: Tensor) -> Tensor:
    """Mapped bytes where the table reads them: on an accelerator, a copy."""
    return memory if ops.device.type == "cpu" else memory.to(ops.device)


def records_memory(checkpoint: PackedCheckpoint, records: PackedRecords) -> Tensor:
    """All records of a layer, mapped."""
    return checkpoint.mapped(records.file)[records.start : records.start + records.total]


def map_decoder(
    skeleton: Decoder,
    checkpoint: PackedCheckpoint,
    ops: Ops,
    options: LoadOptions,
    own: Mapping[int, Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """``load_decoder`` of a packed folder."""
    header, spec = checkpoint.header, skeleton.spec
    require_runnable(checkpoint.path, header, ops.packing)
    settled(checkpoint.path, header, options)
    laid = Laid(checkpoint, ops)
    if len(header.layers) != len(spec.layers) + (skeleton.mtp is not None):
        raise CheckpointError(
            f"{checkpoint.path}: {len(header.layers)} layers were packed, the config has "
            f"{len(spec.layers)}; pack the model again"
        )
    parts = {"embedding": skeleton.embedding_WH, "head": skeleton.head.weights}
    memory = on_device(ops, checkpoint.memory(header.ends.region))
    ends = laid.leaves("embedding and head", header.ends, leaves_of(parts), memory)

    def layer(number: int, of: Layer) -> Layer:
        mlp = (*spec.layers, *filter(None, [spec.mtp]))[number].mlp
        routed = None
        if isinstance(mlp, MoeSpec):
            routed = laid.experts(number, mlp, spec.hidden, own.get(number))
        trunk = on_device(ops, checkpoint.memory(header.layers[number].trunk.region))
        made = laid.layer(number, of, trunk, routed)
        if progress is not None:
            progress(checkpoint.bytes_read, checkpoint.total_bytes)
        return made

    stack = ops.stack_layers([layer(i, of) for i, of in enumerate(skeleton.stack.layers)])
    whole = replace(
        skeleton,
        ops=ops,
        kv_dtype=torch_dtype(options.kv_dtype) or skeleton.dtype,
        embedding_WH=with_leaves(skeleton.embedding_WH, "embedding", ends),
        stack=stack,
        head=ops.prepare(with_leaves(skeleton.head.weights, "head", ends)),
        mtp=None,
        unread=header.unread,
        runner=LocalLayerRunner(ops, stack),
    )
    if skeleton.mtp is not None:
        memory = on_device(ops, checkpoint.memory(mtp_part(checkpoint).region))
        stack = ops.stack_layers([layer(len(spec.layers), skeleton.mtp.stack.layers[0])])
        mtp = mtp_over(laid, skeleton, whole, memory, stack, LocalLayerRunner(ops, stack))
        whole = replace(whole, mtp=mtp)
    if progress is not None:
        progress(checkpoint.total_bytes, checkpoint.total_bytes)
    return whole


def mtp_parts(embedding_WH: Tensor, head: Linear, mtp: Mtp) -> dict[str, object]:
    """What multi-token prediction has beside its layer; not the decoder's embedding and head, where
    it shares them."""
    parts: dict[str, object] = {
        "embedding_norm": mtp.embedding_norm_H,
        "hidden_norm": mtp.hidden_norm_H,
        "project": mtp.project,
        "norm": mtp.head.weights.norm_H,
    }
    if mtp.embedding_WH is not embedding_WH:
        parts["embedding"] = mtp.embedding_WH
    if mtp.head.weights.head is not head:
        parts["head"] = mtp.head.weights.head
    return parts


def mtp_part(checkpoint: PackedCheckpoint) -> PackedPart:
    """What multi-token prediction has beside its layer, of a model that has it."""
    part = checkpoint.header.mtp
    if part is None:
        raise CheckpointError(
            f"{checkpoint.path}: multi-token prediction was not packed; pack the model again"
        )
    return part


def mtp_over(
    laid: Laid,
    skeleton: Decoder,
    whole: Decoder,
    memory: Tensor,
    stack: Stack,
    runner: LayerRunner,
) -> Mtp:
    """The skeleton's module over ``memory`` that has the bytes of ``mtp_part``; it shares what it
    may with ``whole``. ``stack`` has its layer, and ``runner`` runs that."""
    mtp = skeleton.mtp
    assert mtp is not None, "asked for before"
    expected = leaves_of(mtp_parts(skeleton.embedding_WH, skeleton.head.weights.head, mtp))
    found = laid.leaves("multi-token prediction", mtp_part(laid.checkpoint), expected, memory)
    shared = whole.head.weights.head
    head = replace(mtp.head.weights, norm_H=found["norm"], head=found.get("head", shared))  # type: ignore[arg-type]
    return replace(
        mtp,
        embedding_WH=found.get("embedding", whole.embedding_WH),  # type: ignore[arg-type]
        embedding_norm_H=found["embedding_norm"],  # type: ignore[arg-type]
        hidden_norm_H=found["hidden_norm"],  # type: ignore[arg-type]
        project=found["project"],  # type: ignore[arg-type]
        stack=stack,
        head=laid.ops.prepare(head),
        runner=runner,
    )


def require_alike(where: str, leaf: Leaf, expected: Value, most: int) -> None:
    """CheckpointError where what was packed is not what the config implies, or cannot fit ``most``
    bytes. Nothing is computed of sizes before that is known."""
    if isinstance(expected, Tensor):
        wanted = TensorForm(str(expected.dtype).removeprefix("torch."), tuple(expected.shape))  # type: ignore[arg-type]
        good = leaf == wanted and expected.nbytes <= most
    elif isinstance(expected, Linear):
        count = len(expected.data) if isinstance(expected.data, list) else None
        good = (
            isinstance(leaf, MatrixForm)
            and _is_of(leaf, expected.out_features, expected.in_features, most)
            and (leaf.count, leaf.paired) == (count, False)
            and leaf.biased == (count is None and expected.data[1] is not None)
        )
    else:
        hidden, inner = expected.hidden, expected.intermediate
        good = (
            isinstance(leaf, ExpertForm)
            and _is_of(leaf.gate_up, 2 * inner, hidden, most)
            and _is_of(leaf.down, hidden, inner, most)
            and (leaf.gate_up.count, leaf.gate_up.paired) == (None, True)
            and (leaf.down.count, leaf.down.paired) == (None, False)
        )
    if not good:
        raise CheckpointError(f"{where}: packed as {leaf}, the config implies another")


def _is_of(form: MatrixForm, out: int, into: int, most: int) -> bool:
    fits = out * into * (form.count or 1) <= 2 * most
    return fits and (form.out_features, form.in_features) == (out, into)


def leaf_bytes(ops: Ops, leaf: Leaf, of: Value) -> int:
    """A multiple of a line."""
    if isinstance(leaf, MatrixForm):
        return ops.matrix_bytes(leaf)
    if isinstance(leaf, ExpertForm):
        assert isinstance(of, Experts), of
        layout = lay_out_record(ops.matrix_bytes, leaf.gate_up, leaf.down, of.activation)
        return layout.nbytes
    values = 1
    for size in leaf.shape:
        values *= size
    return rounded_up(values * DTYPES[leaf.dtype].itemsize, LINE)


def leaf_over(ops: Ops, leaf: Leaf, of: Value, memory: Tensor) -> Value:
    if isinstance(leaf, MatrixForm):
        return ops.linear_over(memory, leaf)
    if isinstance(leaf, ExpertForm):
        assert isinstance(of, Experts), of
        layout = lay_out_record(ops.matrix_bytes, leaf.gate_up, leaf.down, of.activation)
        return ops.experts_over(memory, layout, 1)
    assert isinstance(of, Tensor), of
    return memory[: of.nbytes].view(DTYPES[leaf.dtype]).view(leaf.shape)
