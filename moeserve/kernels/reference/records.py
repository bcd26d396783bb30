"""Packed matrices and experts as bytes at fixed places, of plain tensors: the twin of ``cpu``'s.

What is written are the tensors as they are; what is made over memory are views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix
from moeserve.kernels.ops import Experts, Linear, RecordLayout, lay_out_record
from moeserve.kernels.records import (
    MatrixForm,
    WeightKind,
    arrays_in,
    laid_out,
    require_place,
    require_records,
    write_arrays,
)

Held = tuple[Matrix, Tensor | None]


class ReferenceRecords:
    """The part of the op table that lays packed weights over memory."""

    def matrix_form(self, linear: Linear) -> MatrixForm:
        if isinstance(linear.data, list):
            return replace(form_of_all(linear.data), count=len(linear.data))
        return form_of_all([linear])

    def matrix_bytes(self, form: MatrixForm) -> int:
        return (form.count or 1) * laid_out(array_sizes(form))

    def write_matrix(self, linear: Linear, into: Tensor) -> None:
        form = replace(self.matrix_form(linear), count=None)
        parts = linear.data if isinstance(linear.data, list) else [linear]
        for place, part in zip(into.view(len(parts), -1), parts, strict=True):
            write_arrays(arrays_of(part, form), place)

    def linear_over(self, memory: Tensor, form: MatrixForm) -> Linear:
        require_place(memory, self.matrix_bytes(form))
        if form.count is None:
            return matrix_over(memory, form)
        one = replace(form, count=None)
        parts = memory[: self.matrix_bytes(form)].view(form.count, -1)
        data = [matrix_over(part, one) for part in parts]
        return Linear(form.out_features, form.in_features, data)

    def record_layout(self, experts: Experts) -> RecordLayout:
        ups, downs = cast("tuple[list[Linear], list[Linear]]", experts.data)
        gate_up = replace(form_of_all(ups), paired=True)
        return lay_out_record(self.matrix_bytes, gate_up, form_of_all(downs), experts.activation)

    def write_record(self, experts: Experts, e: int, into: Tensor) -> None:
        ups, downs = cast("tuple[list[Linear], list[Linear]]", experts.data)
        layout = self.record_layout(experts)
        assert into.shape == (layout.nbytes,), (into.shape, layout)
        end = layout.down_at + self.matrix_bytes(layout.down)
        write_arrays(arrays_of(ups[e], layout.gate_up), into[: layout.down_at])
        write_arrays(arrays_of(downs[e], layout.down), into[layout.down_at : end])
        into[end:].zero_()

    def experts_over(
        self, memory: Tensor, layout: RecordLayout, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        require_records(memory, layout.nbytes, slots, order)
        starts = [r * layout.nbytes for r in (range(slots) if order is None else order)]
        ups = [matrix_over(memory.view(-1)[at:], layout.gate_up) for at in starts]
        downs = [matrix_over(memory.view(-1)[at + layout.down_at :], layout.down) for at in starts]
        return Experts(slots, layout.hidden, layout.intermediate, layout.activation, (ups, downs))


def form_of_all(linears: Sequence[Linear]) -> MatrixForm:
    """Of each, where all are kept alike."""
    matrix, bias = cast("Held", linears[0].data)
    first, biased = linears[0], bias is not None
    kind = kind_of(matrix)
    if not isinstance(matrix, Int4Matrix):
        return MatrixForm(kind, first.out_features, first.in_features, biased=biased)
    zeros = [cast("Int4Matrix", linear.data[0]).zero for linear in linears]
    same = int(zeros[0].flatten()[0]) if zeros[0].numel() else 0
    return MatrixForm(
        kind,
        first.out_features,
        first.in_features,
        biased=biased,
        group=matrix.group,
        zero=None if any(bool((z != same).any()) for z in zeros) else same,
        levels=matrix.levels,
    )


def kind_of(matrix: Matrix) -> WeightKind:
    if isinstance(matrix, Int8Matrix):
        return WeightKind.INT8
    if isinstance(matrix, Int4Matrix):
        return WeightKind.INT4
    return WeightKind.BF16 if matrix.dtype is torch.bfloat16 else WeightKind.FP32


def array_sizes(form: MatrixForm) -> tuple[int, int, int, int]:
    """Bytes of one matrix's data, scales, biases and zero points."""
    n, k = form.out_features, form.in_features
    data = {WeightKind.FP32: 4 * k, WeightKind.BF16: 2 * k, WeightKind.INT8: k}.get(
        form.kind, k // 2
    )
    zeros = n * form.groups if form.kind is WeightKind.INT4 and form.zero is None else 0
    return n * data, 4 * n * form.groups, 4 * n * form.biased, zeros


def arrays_of(linear: Linear, form: MatrixForm) -> list[Tensor | None]:
    """As bytes, in the order of ``array_sizes``."""
    matrix, bias = cast("Held", linear.data)
    if isinstance(matrix, Int4Matrix):
        zero = matrix.zero if form.zero is None else None
        arrays = [matrix.packed, matrix.scale, bias, zero]
    elif isinstance(matrix, Int8Matrix):
        arrays = [matrix.codes, matrix.scale, bias, None]
    else:
        arrays = [matrix, None, bias, None]
    return [None if a is None else a.contiguous().view(-1).view(torch.uint8) for a in arrays]


def matrix_over(memory: Tensor, form: MatrixForm) -> Linear:
    n, k, groups = form.out_features, form.in_features, form.groups
    data, scale, bias, zero = arrays_in(memory, array_sizes(form))
    assert data is not None, form
    biases = None if bias is None else bias.view(torch.float32)
    matrix: Matrix
    if scale is None:
        plain = torch.bfloat16 if form.kind is WeightKind.BF16 else torch.float32
        matrix = data.view(plain).view(n, k)
    elif form.kind is WeightKind.INT8:
        matrix = Int8Matrix(data.view(torch.int8).view(n, k), scale.view(torch.float32))
    else:
        zeros = torch.tensor(form.zero or 0, dtype=torch.uint8).expand(n, groups)
        matrix = Int4Matrix(
            data.view(n, k // 2),
            scale.view(torch.float32).view(n, groups),
            zeros if zero is None else zero.view(n, groups),
            form.group,
            form.levels,
        )
    return Linear(n, k, (matrix, biases))
