"""Packed weights as bytes at fixed places: what a matrix is kept as, and where its arrays lie.

A packed matrix is at most four arrays: data, scales, biases, zero points. In memory laid out for it
each begins on a line of 64 bytes. All that one routed expert needs is a record of whole pages.
Bytes of one backend mean nothing to another. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moeserve.errors import InternalError

LINE = 64
PAGE = 4096


class WeightKind(StrEnum):
    """What a product does with each stands in ``ops``."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """All that is known of a packed matrix [N, K] beside its values: equal forms take equal bytes.

    ``count`` matrices are a stack; None is one matrix alone. ``group`` and ``levels`` are int4's,
    and so is ``zero``: the zero point that all groups have, None where each has its own.
    """

    kind: WeightKind
    out_features: int
    in_features: int
    count: int | None = None
    paired: bool = False
    biased: bool = False
    group: int = 0
    zero: int | None = 0
    levels: tuple[int, ...] | None = None

    @property
    def groups(self) -> int:
        """Scales of a row."""
        if self.kind is WeightKind.INT4:
            return -(-self.in_features // max(1, min(self.group, self.in_features)))
        return 1 if self.kind is WeightKind.INT8 else 0


def rounded_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def laid_out(sizes: Sequence[int]) -> int:
    """The bytes of arrays of these sizes, one after the other."""
    return sum(rounded_up(size, LINE) for size in sizes)


def arrays_in(memory: Tensor, sizes: Sequence[int]) -> list[Tensor | None]:
    """Views of the last dimension of ``memory``, uint8; None where an array has no bytes."""
    starts = list(starts_of(sizes))
    return [
        memory[..., start : start + size] if size else None
        for start, size in zip(starts, sizes, strict=True)
    ]


def write_arrays(arrays: Sequence[Tensor | None], into: Tensor) -> None:
    """``arrays_in`` backwards, of uint8 arrays; ``into`` has exactly their bytes, and what lies
    between them becomes zero."""
    sizes = [0 if array is None else array.nbytes for array in arrays]
    assert into.numel() == laid_out(sizes), (into.shape, sizes)
    into.zero_()
    for place, array in zip(arrays_in(into, sizes), arrays, strict=True):
        if place is not None and array is not None:
            place.view(array.shape).copy_(array)


def starts_of(sizes: Sequence[int]) -> Iterator[int]:
    start = 0
    for size in sizes:
        yield start
        start += rounded_up(size, LINE)


def require_place(memory: Tensor, nbytes: int) -> None:
    """InternalError where so many bytes cannot lie there."""
    fits = memory.dtype is torch.uint8 and memory.is_contiguous() and memory.nbytes >= nbytes
    if not fits or memory.data_ptr() % LINE:
        raise InternalError(
            f"{nbytes} packed bytes do not fit {memory.nbytes} bytes of {memory.dtype} at "
            f"{memory.data_ptr():#x}; memory must be contiguous uint8 from a multiple of {LINE} on"
        )


def require_records(memory: Tensor, nbytes: int, slots: int, order: Sequence[int] | None) -> int:
    """How many records of so many bytes are meant; InternalError where a slot has none."""
    if order is not None and len(order) != slots:
        raise InternalError(f"{slots} slots, but an order of {len(order)} records")
    if order is not None and min(order, default=0) < 0:
        raise InternalError(f"record {min(order)} of an order is below 0")
    records = slots if order is None else max(order, default=-1) + 1
    require_place(memory, records * nbytes)
    return records
