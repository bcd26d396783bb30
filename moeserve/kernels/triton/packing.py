"""Packed weights on a device: plain tensors as the reference has them, and where those of several
matrices begin. Letters: see ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix
from moeserve.kernels.ops import Linear
from moeserve.kernels.records import LINE, WeightKind
from moeserve.kernels.reference.records import kind_of

ALIGNED = 16  # elements: kernels read so many at once
KINDS = {WeightKind.FP32: 0, WeightKind.BF16: 1, WeightKind.INT8: 2, WeightKind.INT4: 3}


@dataclass(frozen=True, slots=True)
class Arrays:
    """Of one matrix, as kernels take them; ``levels`` int8 [16]."""

    kind: WeightKind
    data: Tensor
    scale: Tensor | None
    bias: Tensor | None
    zero: Tensor | None
    levels: Tensor | None
    group: int

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """What kernels take of it, in their order."""
        return self.data, self.scale, self.zero, self.levels, self.bias

    @property
    def of_codes(self) -> bool:
        return self.kind in (WeightKind.INT8, WeightKind.INT4)


class Packed(tuple[Matrix, Tensor | None]):
    """Matrix and bias, as ``reference.records`` expects them, and their arrays."""

    arrays: Arrays

    @staticmethod
    def on(device: torch.device, matrix: Matrix, bias_N: Tensor | None) -> Packed:
        """Every array lies on the device, without gaps; where it does already it is not copied.

        InternalError for int4 in groups of an odd number.
        """
        bias = None if bias_N is None else there(bias_N.float(), device)
        kind, zero, levels, group = kind_of(matrix), None, None, 1
        scale = None
        if isinstance(matrix, Int8Matrix):
            matrix = Int8Matrix(there(matrix.codes, device), there(matrix.scale, device))
            data, scale = matrix.codes, matrix.scale
        elif isinstance(matrix, Int4Matrix):
            if matrix.group % 2:
                raise InternalError(f"int4 in groups of {matrix.group}: expected an even number")
            arrays = [there(a, device) for a in (matrix.packed, matrix.scale, matrix.zero)]
            matrix = Int4Matrix(arrays[0], arrays[1], arrays[2], matrix.group, matrix.levels)
            data, scale, zero = arrays
            group = min(matrix.group, max(1, matrix.shape[-1]))
            if matrix.levels is not None:
                levels = torch.tensor(matrix.levels, dtype=torch.int8).to(device)
        else:
            data = matrix = there(matrix, device)
        packed = Packed((matrix, bias))
        packed.arrays = Arrays(kind, data, scale, bias, zero, levels, group)
        return packed


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without gaps and beginning on a line; a copy only where it was not."""
    found = tensor.to(device).contiguous()
    return found.clone() if found.data_ptr() % LINE else found


class MatrixGroup(list[Linear]):
    """Matrices of one form. ``first`` has the arrays of the first; ``offsets`` int64 [4, E]: so
    many elements beyond its data, scale, bias and zero those of each begin."""

    first: Arrays
    offsets: Tensor

    @staticmethod
    def of(linears: Iterable[Linear]) -> MatrixGroup:
        group = MatrixGroup(linears)
        group.first = group[0].data.arrays
        starts = [starts_of(linear.data.arrays) for linear in group]
        rows = [[at - starts[0][i] for at in (s[i] for s in starts)] for i in range(4)]
        assert all(at % ALIGNED == 0 for row in rows for at in row), "an array is not aligned"
        group.offsets = torch.tensor(rows, dtype=torch.int64).to(group.first.data.device)
        return group


def starts_of(arrays: Arrays) -> list[int]:
    """In elements; 0 where there is no such array."""
    found = (arrays.data, arrays.scale, arrays.bias, arrays.zero)
    return [0 if a is None else a.data_ptr() // a.itemsize for a in found]
