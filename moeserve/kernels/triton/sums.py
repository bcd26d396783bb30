"""Contributions of experts become rows, on the device. Letters: see ``wire``; L limbs."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.kernels.ops import Experts
from moeserve.kernels.reference.combine import limbs_of
from moeserve.kernels.triton.device import sums as kernels
from moeserve.kernels.triton.launch import launch, power_at_least
from moeserve.kernels.wire import GRID_BITS, WIDE_GRID_BITS


def grid_bits(experts: Experts) -> int:
    return WIDE_GRID_BITS if limbs_of(experts) == 2 else GRID_BITS


def chain(y_PH: Tensor, ids_TC: Tensor, weights_TC: Tensor) -> Tensor:
    """fp32 [T, H]: fma of the contributions of pairs whose id is not -1, in order of c."""
    (rows, chosen), hidden = ids_TC.shape, y_PH.shape[1]
    out = torch.empty(rows, hidden, device=y_PH.device)
    grid, block = grid_of(rows, hidden)
    launch(
        kernels.chain_kernel,
        grid,
        out.device,
        *(y_PH, ids_TC, weights_TC, out, hidden, chosen),
        BLOCK=block,
    )
    return out


def exact_rows(
    y_PH: Tensor, ids_TC: Tensor, weights_TC: Tensor, units_T: Tensor, experts: Experts
) -> Tensor:
    """fp32 [T, H]."""
    return _exact(y_PH, ids_TC, weights_TC, units_T, (limbs_of(experts), True))


def exact_sums(
    y_PH: Tensor, ids_TC: Tensor, weights_TC: Tensor, units_T: Tensor, experts: Experts
) -> Tensor:
    """int32 [T, L, H]."""
    return _exact(y_PH, ids_TC, weights_TC, units_T, (limbs_of(experts), False))


def _exact(
    y_PH: Tensor, ids_TC: Tensor, weights_TC: Tensor, units_T: Tensor, form: tuple[int, bool]
) -> Tensor:
    (rows, chosen), hidden, (limbs, whole) = ids_TC.shape, y_PH.shape[1], form
    out = _room(rows, hidden, limbs, whole, y_PH.device)
    grid, block = grid_of(rows, hidden)
    launch(
        kernels.exact_kernel,
        grid,
        out.device,
        *(y_PH, ids_TC, weights_TC, units_T, out, hidden, chosen),
        2.0 ** (30 - (chosen - 1).bit_length()),
        LIMBS=limbs,
        WHOLE=whole,
        BLOCK=block,
    )
    return out


def add_copies(
    sums_NLH: Tensor, token_N: Tensor, rows: int, units_T: Tensor | None = None
) -> Tensor:
    """What copies of each row came to, int32 [rows, L, H], or times the units fp32 [rows, H]."""
    limbs, hidden = sums_NLH.shape[1:]
    order, first = by_token(token_N, rows)
    out = _room(rows, hidden, limbs, units_T is not None, sums_NLH.device)
    grid, block = grid_of(rows, hidden)
    launch(
        kernels.gather_kernel,
        grid,
        out.device,
        *(sums_NLH, first, order, units_T, out, hidden),
        LIMBS=limbs,
        WHOLE=units_T is not None,
        BLOCK=block,
    )
    return out


def by_token(token_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Copies in order of their tokens, and where those of each token begin [rows + 1]; int32."""
    order = token_N.argsort(stable=True).int()
    begin = torch.arange(rows + 1, dtype=torch.int32, device=token_N.device)
    first = torch.searchsorted(token_N.int().sort().values, begin).int()
    return order, first


def grid_of(rows: int, hidden: int) -> tuple[tuple[int, int], int]:
    block = min(1024, power_at_least(hidden, 16))
    return (rows, -(-hidden // block)), block


def _room(rows: int, hidden: int, limbs: int, whole: bool, device: torch.device) -> Tensor:
    if whole:
        return torch.empty(rows, hidden, device=device)
    return torch.empty(rows, limbs, hidden, dtype=torch.int32, device=device)
