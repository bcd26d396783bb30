"""The products of experts, from features of tokens to contributions.

Nothing here waits for the device: who goes where is found there, and grids have room for the most
tiles that there could be. Letters: see ``device.experts``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.ops import Activation, Experts
from moeserve.kernels.triton.device import experts as kernels
from moeserve.kernels.triton.device import rows as row_kernels
from moeserve.kernels.triton.launch import launch, power_at_least
from moeserve.kernels.triton.packing import KINDS, Arrays, MatrixGroup
from moeserve.kernels.triton.tiles import Tile, tile_of

COUNTED = 1024  # pairs that a program looks at together


@dataclass(frozen=True, slots=True)
class Features:
    """Of T tokens, as products want them: fp32 [T, K], or int8 codes with a scale [T]."""

    x_TK: Tensor
    scale_T: Tensor | None

    def __len__(self) -> int:
        return len(self.x_TK)


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """``order`` int32 [tiles, BM]: pairs; ``expert`` int32 [tiles]; -1 where there is none."""

    order: Tensor
    expert: Tensor


def rows_together(ups: MatrixGroup, downs: MatrixGroup, pairs: int) -> int:
    """Of a tile of both products, as if pairs were spread evenly; of floats always the same."""
    floats = [group.first.kind for group in (ups, downs) if not group.first.of_codes]
    if floats:
        return tile_of(floats[0], pairs).rows
    each = -(-pairs // max(1, len(ups)))
    return min(tile_of(group.first.kind, each).rows for group in (ups, downs))


def assign(ids_TC: Tensor, experts: int, rows: int) -> ExpertTiles:
    """Pairs of each expert, in tiles of so many."""
    pairs, device = ids_TC.numel(), ids_TC.device
    tiles = pairs // rows + min(experts, pairs)
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    order = torch.full((tiles, rows), -1, dtype=torch.int32, device=device)
    expert = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    launch(kernels.count_kernel, (experts,), device, ids_TC, counts, pairs, BLOCK=COUNTED)
    launch(
        kernels.order_kernel,
        (experts,),
        device,
        *(ids_TC, counts, order, expert, pairs, experts),
        BM=rows,
        EXPERTS=power_at_least(experts),
        BLOCK=COUNTED,
    )
    return ExpertTiles(order, expert)


def contributions(features: Features, experts: Experts, ids_TC: Tensor) -> Tensor:
    """fp32 [P, H]: what each expert makes of its tokens, not yet weighed; anything where the id is
    -1. Other ids are experts."""
    ups, downs = experts.data
    pairs, chosen = ids_TC.numel(), ids_TC.shape[1]
    device, inner = ids_TC.device, experts.intermediate
    rows = rows_together(ups, downs, pairs)
    assigned = assign(ids_TC, len(ups), rows)
    tile = tile_of(ups.first.kind, rows, ups.first.group)._replace(rows=rows)
    made = torch.empty(pairs, inner, device=device)
    launch(
        kernels.up_kernel,
        (len(assigned.expert), -(-inner // tile.out)),
        device,
        *(features.x_TK, features.scale_T, *ups.first.given, ups.offsets),
        *(assigned.order, assigned.expert, made),
        *(len(ups), chosen, inner, experts.hidden),
        GROUP=ups.first.group,
        KIND=KINDS[ups.first.kind],
        CLAMPED=experts.activation is Activation.CLAMPED,
        **sizes(tile),
    )
    return down(features_of(made, downs.first), experts, downs, assigned)


def down(features: Features, experts: Experts, downs: MatrixGroup, assigned: ExpertTiles) -> Tensor:
    first, rows = downs.first, assigned.order.shape[1]
    out = torch.empty(len(features), experts.hidden, device=features.x_TK.device)
    tile = tile_of(first.kind, rows, first.group)._replace(rows=rows)
    launch(
        kernels.down_kernel,
        (len(assigned.expert), -(-experts.hidden // tile.out)),
        out.device,
        *(features.x_TK, features.scale_T, *first.given, downs.offsets),
        *(assigned.order, assigned.expert, out),
        *(len(downs), experts.hidden, experts.intermediate),
        GROUP=first.group,
        KIND=KINDS[first.kind],
        **sizes(tile),
    )
    return out


def sizes(tile: Tile) -> dict[str, int]:
    return {
        "BM": tile.rows,
        "BN": tile.out,
        "BK": tile.into,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def features_of(x_TK: Tensor, weights: Arrays) -> Features:
    """Quantised where the weights are codes."""
    return Features(*quantized(x_TK)) if weights.of_codes else Features(x_TK, None)


def quantized(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = x_TK.shape
    codes = torch.empty(rows, size, dtype=torch.int8, device=x_TK.device)
    scale = torch.empty(rows, device=x_TK.device)
    many, block = row_block(size)
    launch(
        row_kernels.quantize_kernel,
        (-(-rows // many),),
        x_TK.device,
        *(x_TK, codes, scale, rows, size),
        ROWS=many,
        BLOCK=block,
    )
    return codes, scale


def row_block(size: int) -> tuple[int, int]:
    """Rows of a program, and how many features of each it takes at once; of the size alone."""
    block = min(power_at_least(size, 16), 4096)
    return max(1, min(16, 2048 // block)), block
