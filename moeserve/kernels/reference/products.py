"""A matrix product of every kind of weight, as ``ops`` states it, in plain torch.

Integer sums are taken in fp64, where they are exact and their order is free; rows of fp32 and bf16
are multiplied one by one, so that a row never depends on the rows beside it. Letters: see ``ops``,
and g groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix, quantize_rows, unpack_nibbles


def product(x_TK: Tensor, weight_NK: Matrix, bias_N: Tensor | None) -> Tensor:
    """[T, N] in fp32."""
    if isinstance(weight_NK, Int8Matrix | Int4Matrix):
        return product_of_codes(*quantize_rows(x_TK), weight_NK, bias_N)
    if weight_NK.dtype is torch.bfloat16:
        # In fp64, which differs from the chain that ``ops`` states in its last bits.
        out = each_row(x_TK.bfloat16().double(), weight_NK.double()).float()
    else:
        out = each_row(x_TK, weight_NK.float())
    return out if bias_N is None else out + bias_N


def product_of_codes(
    codes_TK: Tensor, scale_T: Tensor, weight_NK: Int8Matrix | Int4Matrix, bias_N: Tensor | None
) -> Tensor:
    """[T, N] in fp32 of activations that were quantised already."""
    if isinstance(weight_NK, Int8Matrix):
        out = int8_product(codes_TK, scale_T, weight_NK)
    else:
        out = int4_product(codes_TK, scale_T, weight_NK)
    return out if bias_N is None else out + bias_N


def each_row(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    out = x_TK.new_empty(len(x_TK), len(weight_NK))
    for t, row in enumerate(x_TK):
        out[t] = torch.mv(weight_NK, row.clone())
    return out


def int8_product(codes_TK: Tensor, scale_T: Tensor, weight: Int8Matrix) -> Tensor:
    total = codes_TK.double() @ weight.codes.double().T + 0.0  # an integer has no -0
    return total.float() * scale_T[:, None] * weight.scale


def int4_product(codes_TK: Tensor, scale_T: Tensor, weight: Int4Matrix) -> Tensor:
    nibbles = unpack_nibbles(weight.packed)
    if weight.levels is not None:
        value = torch.tensor(weight.levels, dtype=torch.float64)[nibbles.long()]
    else:
        value = nibbles.double()
    out = torch.zeros(len(codes_TK), len(nibbles))
    for g in range(weight.scale.shape[-1]):
        part = slice(g * weight.group, (g + 1) * weight.group)
        centred = value[:, part] - weight.zero[:, g, None].double()
        total = codes_TK[:, part].double() @ centred.T + 0.0
        out = fused(total.float(), weight.scale[:, g].expand_as(out), out)
    return out * scale_T[:, None]


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32, rounded once.

    The product is exact in fp64. The sum is rounded to odd there: where it is inexact its last bit
    is set, so that the second rounding falls as a single one would.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    inexact = total.isfinite() & (lost != 0) & (total.view(torch.int64) & 1 == 0)
    towards = torch.where(lost > 0, torch.inf, -torch.inf)
    return torch.where(inexact, total.nextafter(towards.to(total)), total).float()
