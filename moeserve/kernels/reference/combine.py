"""Exact sums of contributions in plain torch: the oracle of ``Combine.EXACT``.

Rounding is done in fp64, where units are whole numbers; sums are int64. Letters: H hidden, L limbs
of an exact sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from moeserve.kernels.matrix import Matrix
from moeserve.kernels.ops import Experts, Linear
from moeserve.kernels.wire import GRID_BITS, LEAST_EXPONENT, LOWEST, WIDE_GRID_BITS

LIMB = 2**16


def matrix_of(linear: Linear) -> Matrix:
    return cast("tuple[Matrix, Tensor | None]", linear.data)[0]


def limbs_of(experts: Experts) -> int:
    matrix = matrix_of(experts.data[1][0])
    return 2 if isinstance(matrix, Tensor) and matrix.dtype is torch.float32 else 1


def unit_of(x_H: Tensor, experts: Experts) -> float:
    mean = x_H.square().mean()
    if not mean.isfinite():
        return float("nan")
    exponent = int(torch.frexp(mean.sqrt()).exponent) - 1 if mean > 0 else LEAST_EXPONENT
    bits = WIDE_GRID_BITS if limbs_of(experts) == 2 else GRID_BITS
    return 2.0 ** (max(exponent, LEAST_EXPONENT) - bits)


def exact_sum(shares: Sequence[Tensor], unit: float, limbs: int, top_k: int, hidden: int) -> Tensor:
    """int32 [L, H]: weighed contributions, fp32 [H] each, rounded to whole units and added.

    A contribution that is no number, or so great that ``top_k`` of them could overflow, makes the
    element ``LOWEST``.
    """
    bound = 2.0 ** (30 - (top_k - 1).bit_length())
    total_LH = torch.zeros(limbs, hidden, dtype=torch.int64)
    lost_H = torch.zeros(hidden, dtype=torch.bool)
    for share_H in shares:
        units_H = share_H.double() / unit
        high_H = units_H / LIMB ** (limbs - 1)  # in units of the first limb
        too_great_H = ~(high_H.abs() <= bound)  # or NaN
        lost_H |= too_great_H
        units_H = units_H.masked_fill(too_great_H, 0.0)
        high_H = high_H.masked_fill(too_great_H, 0.0).round()
        total_LH[0] += high_H.long()
        if limbs == 2:
            total_LH[1] += (units_H.round() - high_H * LIMB).long()
    total_LH[0, lost_H] = LOWEST
    return total_LH.int()


def sum_to_float(sum_LH: Tensor, unit: float) -> Tensor:
    """fp32 [H]."""
    whole_H = sum_LH[0].long()
    if len(sum_LH) == 2:
        whole_H = whole_H * LIMB + sum_LH[1]
    value_H = whole_H.float() * unit
    return value_H.masked_fill(sum_LH[0] == LOWEST, torch.nan)


def add_sums(sums: Sequence[Tensor], limbs: int, hidden: int) -> Tensor:
    """int32 [L, H] of sums of several devices."""
    total_LH = torch.zeros(limbs, hidden, dtype=torch.int64)
    lost_H = torch.zeros(hidden, dtype=torch.bool)
    for sum_LH in sums:
        total_LH += sum_LH
        lost_H |= sum_LH[0] == LOWEST
    total_LH[0, lost_H] = LOWEST
    return total_LH.int()
