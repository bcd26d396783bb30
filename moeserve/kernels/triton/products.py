"""Products by packed matrices, and other operations on rows by themselves. Letters: see ``ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.kernels.ops import Activation
from moeserve.kernels.triton.device import products as kernels
from moeserve.kernels.triton.device import rows as row_kernels
from moeserve.kernels.triton.experts import Features, features_of, row_block, sizes
from moeserve.kernels.triton.launch import launch, power_at_least
from moeserve.kernels.triton.packing import KINDS, Arrays
from moeserve.kernels.triton.tiles import tile_of


def multiply(x_TAK: Tensor, first: Arrays, offsets: Tensor | None, out_features: int) -> Tensor:
    """[T, A, N] of fp32 [T, A, K]: head a of every row times matrix a, of which ``first`` is the
    first, and where there are several ``offsets`` says where the others are."""
    rows, heads, into = x_TAK.shape
    features = features_of(x_TAK.reshape(-1, into), first)
    return multiplied(features, (rows, heads), first, offsets, out_features)


def multiplied(
    features: Features,
    shape: tuple[int, int],
    first: Arrays,
    offsets: Tensor | None,
    out_features: int,
) -> Tensor:
    """Of rows and heads in ``shape``, one after the other."""
    (rows, heads), into = shape, features.x_TK.shape[1]
    out = torch.empty(rows, heads, out_features, device=features.x_TK.device)
    tile = tile_of(first.kind, rows, first.group)
    launch(
        kernels.linear_kernel,
        (-(-rows // tile.rows), -(-out_features // tile.out), heads),
        out.device,
        *(features.x_TK, features.scale_T, *first.given),
        *(offsets, out),
        *(rows, heads, out_features, into),
        GROUP=first.group,
        KIND=KINDS[first.kind],
        **sizes(tile),
    )
    return out


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    out = torch.empty_like(x)
    rows = x.numel() // size
    many, block = row_block(size)
    launch(
        row_kernels.norm_kernel,
        (-(-rows // many),),
        x.device,
        *(x, weight_H, out, None, None, rows, eps, size),
        QUANTIZED=False,
        ROWS=many,
        BLOCK=block,
    )
    return out


def norm_linear(x_TK: Tensor, norm_K: Tensor, eps: float, first: Arrays, out: int) -> Tensor:
    """[T, N] of the norm of rows times a matrix of codes; the norm's floats are written nowhere."""
    rows, size = x_TK.shape
    codes = torch.empty(rows, size, dtype=torch.int8, device=x_TK.device)
    scale = torch.empty(rows, device=x_TK.device)
    many, block = row_block(size)
    launch(
        row_kernels.norm_kernel,
        (-(-rows // many),),
        x_TK.device,
        *(x_TK, norm_K, None, codes, scale, rows, eps, size),
        QUANTIZED=True,
        ROWS=many,
        BLOCK=block,
    )
    return multiplied(Features(codes, scale), (rows, 1), first, None, out)[:, 0]


def glu(gate_up_T2I: Tensor, activation: Activation) -> Tensor:
    rows, inner = len(gate_up_T2I), gate_up_T2I.shape[1] // 2
    out = torch.empty(rows, inner, device=gate_up_T2I.device)
    block = min(1024, power_at_least(inner, 16))
    launch(
        row_kernels.glu_kernel,
        (rows, -(-inner // block)),
        out.device,
        *(gate_up_T2I, out, inner),
        CLAMPED=activation is Activation.CLAMPED,
        BLOCK=block,
    )
    return out


def rope(
    x_TAD: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    position_T: Tensor | None = None,
) -> Tensor:
    """cos and sin are [T, R], or [W, R] of every position where ``position_T`` (int64) is given.
    The last dimension of ``x_TAD`` has no gaps."""
    rows, heads, size = x_TAD.shape
    pairs = cos.shape[1]
    assert 2 * pairs <= size, (pairs, size)
    assert x_TAD.stride(2) == 1 or size == 1, x_TAD.stride()
    out = torch.empty(rows, heads, size, device=x_TAD.device)
    launch(
        row_kernels.rope_kernel,
        (rows, heads),
        out.device,
        *(x_TAD, cos, sin, position_T, out, heads, size, pairs, x_TAD.stride(0), x_TAD.stride(1)),
        INTERLEAVED=interleaved,
        GATHERED=position_T is not None,
        BLOCK=power_at_least(size, 16),
    )
    return out


def units(x_TH: Tensor, grid_bits: int) -> Tensor:
    """[T]; see ``wire.Combine``."""
    rows, size = x_TH.shape
    out = torch.empty(rows, device=x_TH.device)
    block = min(power_at_least(size, 16), 4096)
    launch(
        row_kernels.units_kernel,
        (rows,),
        out.device,
        *(x_TH, out, size),
        GRID_BITS=grid_bits,
        BLOCK=block,
    )
    return out


def best_of_rows(logits_RV: Tensor) -> list[int]:
    """As ``reference.sampling.best_of_rows``; so many numbers are what leaves the device."""
    found: list[int] = best_of(logits_RV).tolist()
    return found


def best_of(logits_RV: Tensor) -> Tensor:
    """int32 [R]: the same on the device."""
    rows, size = logits_RV.shape
    best = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    block = min(power_at_least(size, 16), 4096)
    launch(row_kernels.best_kernel, (rows,), best.device, logits_RV, best, size, BLOCK=block)
    return best
