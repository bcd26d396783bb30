"""Packed matrices and experts as bytes at fixed places, and kernels over such bytes.

What is written are the arrays as they were packed, so nothing is computed here. Letters: ``ops``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.packing import PackedExperts, Panels, array_sizes, panels_of
from moeserve.kernels.ops import Activation, Experts, Linear, RecordLayout, lay_out_record
from moeserve.kernels.records import (
    MatrixForm,
    arrays_in,
    laid_out,
    require_place,
    require_records,
    write_arrays,
)


class NativeRecords:
    """The part of the op table that lays packed weights over memory."""

    def matrix_form(self, linear: Linear) -> MatrixForm:
        return cast("Panels", linear.data).form

    def matrix_bytes(self, form: MatrixForm) -> int:
        return laid_out(stack_sizes(form))

    def write_matrix(self, linear: Linear, into: Tensor) -> None:
        write_arrays(cast("Panels", linear.data).arrays, into)

    def linear_over(self, memory: Tensor, form: MatrixForm) -> Linear:
        require_place(memory, self.matrix_bytes(form))
        count = form.count or 1
        arrays = [
            None if array is None else array.view(count, -1)
            for array in arrays_in(memory, stack_sizes(form))
        ]
        return Linear(form.out_features, form.in_features, panels_of(form, count, arrays))

    def record_layout(self, experts: Experts) -> RecordLayout:
        packed = cast("PackedExperts", experts.data)
        forms = [replace(panels.form, count=None) for panels in (packed.gate_up, packed.down)]
        return lay_out_record(self.matrix_bytes, forms[0], forms[1], experts.activation)

    def write_record(self, experts: Experts, e: int, into: Tensor) -> None:
        packed, layout = cast("PackedExperts", experts.data), self.record_layout(experts)
        assert into.shape == (layout.nbytes,), (into.shape, layout)
        assert 0 <= e < experts.num_experts, (e, experts)
        record = e if packed.order is None else int(packed.order[e])
        end = layout.down_at + self.matrix_bytes(layout.down)
        places = into[: layout.down_at], into[layout.down_at : end]
        for panels, place in zip((packed.gate_up, packed.down), places, strict=True):
            write_arrays([None if a is None else a[record] for a in panels.arrays], place)
        into[end:].zero_()

    def experts_over(
        self, memory: Tensor, layout: RecordLayout, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        records = require_records(memory, layout.nbytes, slots, order)
        by_record = memory.view(-1)[: records * layout.nbytes].view(records, layout.nbytes)
        panels = []
        for form, start in ((layout.gate_up, 0), (layout.down, layout.down_at)):
            arrays = arrays_in(by_record[:, start:], array_sizes(form))
            panels.append(panels_of(form, records, arrays))
        picked = None if order is None else torch.tensor(order, dtype=torch.int32)
        handle = _cpu.Experts(
            panels[0].handle,
            panels[1].handle,
            slots,
            layout.activation is Activation.CLAMPED,
            layout.nbytes,
            0 if picked is None else picked.data_ptr(),
        )
        packed = PackedExperts(handle, panels[0], panels[1], picked)
        return Experts(slots, layout.hidden, layout.intermediate, layout.activation, packed)


def stack_sizes(form: MatrixForm) -> list[int]:
    return [(form.count or 1) * size for size in array_sizes(form)]
