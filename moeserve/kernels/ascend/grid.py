"""Units and exact sums of contributions (``wire.Combine``) on any device.

Elementwise steps alone, and sums of which every order gives the same: integers, and for the mean
square of a row a fixed tree. So a row's numbers never depend on the rows beside it. All in fp32 and
int32, which NPUs have: powers of two scale exactly, and what ``reference.combine`` does in fp64
comes to the same.

Letters: see ``ops``; L limbs of an exact sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.kernels.wire import GRID_BITS, LEAST_EXPONENT, LOWEST, WIDE_GRID_BITS

LIMB = 2**16
EXPONENT, BIAS = 23, 127


def tree_sum(x_TH: Tensor) -> Tensor:
    """[T]: halves added until one is left, so that the order is the row's alone."""
    width = 1 << (x_TH.shape[1] - 1).bit_length()
    x_TH = torch.nn.functional.pad(x_TH, (0, width - x_TH.shape[1]))
    while x_TH.shape[1] > 1:
        half = x_TH.shape[1] // 2
        x_TH = x_TH[:, :half] + x_TH[:, half:]
    return x_TH[:, 0]


def units_of(x_TH: Tensor, limbs: int) -> Tensor:
    """fp32 [T]; NaN where a row's mean square is no number."""
    mean_T = tree_sum(x_TH * x_TH) / torch.full((), float(x_TH.shape[1]), device=x_TH.device)
    exponent_T = (mean_T.contiguous().view(torch.int32) >> EXPONENT) - BIAS
    # Of the root: half, rounded down.
    exponent_T = (exponent_T >> 1).clamp(min=LEAST_EXPONENT)
    bits = WIDE_GRID_BITS if limbs == 2 else GRID_BITS
    unit_T = ((exponent_T - bits + BIAS) << EXPONENT).view(torch.float32)
    return torch.where(mean_T.isfinite(), unit_T, torch.full_like(unit_T, torch.nan))


def exact_sums(y_TCH: Tensor, weight_TC: Tensor, unit_T: Tensor, limbs: int) -> Tensor:
    """int32 [T, L, H]: weighed contributions in whole units, added over the choices; a choice that
    is not here has y 0. ``LOWEST`` where a contribution is no number or too great for C of them."""
    bound = 2.0 ** (30 - (y_TCH.shape[1] - 1).bit_length())
    total_TLH = torch.zeros(
        len(y_TCH), limbs, y_TCH.shape[2], dtype=torch.int32, device=y_TCH.device
    )
    lost_TH = torch.zeros(len(y_TCH), y_TCH.shape[2], dtype=torch.bool, device=y_TCH.device)
    for c in range(y_TCH.shape[1]):
        units_TH = (weight_TC[:, c, None] * y_TCH[:, c]) / unit_T[:, None]
        high_TH = units_TH / LIMB if limbs == 2 else units_TH
        too_great = ~(high_TH.abs() <= bound)  # or NaN
        lost_TH |= too_great
        zero_TH = torch.zeros_like(high_TH)
        high_TH = torch.where(too_great, zero_TH, high_TH).round()
        total_TLH[:, 0] += high_TH.to(torch.int32)
        if limbs == 2:
            # The difference is a multiple of the last bit of units, and below 2^16: exact.
            low_TH = (torch.where(too_great, zero_TH, units_TH) - high_TH * LIMB).round()
            total_TLH[:, 1] += low_TH.to(torch.int32)
    lowest = torch.full_like(total_TLH[:, 0], LOWEST)
    total_TLH[:, 0] = torch.where(lost_TH, lowest, total_TLH[:, 0])
    return total_TLH


def sums_to_float(sum_TLH: Tensor, unit_T: Tensor) -> Tensor:
    """fp32 [T, H]; NaN where a sum is lost."""
    whole_TH = sum_TLH[:, 0].long()
    if sum_TLH.shape[1] == 2:
        whole_TH = whole_TH * LIMB + sum_TLH[:, 1].long()
    value_TH = whole_TH.float() * unit_T[:, None]
    lost_TH = sum_TLH[:, 0] == LOWEST
    return torch.where(lost_TH, torch.full_like(value_TH, torch.nan), value_TH)


def add_rows(sum_NLH: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """int32 [T, L, H]: sums of several ranks added by row; what is lost in one is lost."""
    there = sum_NLH.device
    total = torch.zeros(rows, *sum_NLH.shape[1:], dtype=torch.int64, device=there)
    total.index_add_(0, row_N.long(), sum_NLH.long())
    lost = torch.zeros(rows, sum_NLH.shape[2], dtype=torch.int64, device=there)
    lost.index_add_(0, row_N.long(), (sum_NLH[:, 0] == LOWEST).long())
    total[:, 0] = torch.where(lost > 0, torch.full_like(lost, LOWEST), total[:, 0])
    return total.int()
