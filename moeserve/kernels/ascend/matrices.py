"""Weights as the operators take them, in device memory, and products over rows.

int8: codes [E, K, N] (one matrix after the other, features first), products to int32 and then, in
fp32 and in this order, float(sum) * activation scale * weight scale + bias: the bits of
``reference.products``. fp32 and bf16: the operator accumulates as it does and gives the dtype of
its inputs, which is widened. int4 has no operator that keeps sums of groups exact.

int8 weights may lie in FRACTAL_NZ, the order in which the cube units read them: the same numbers,
and sums of integers are exact in any order, so no bit changes. Only those are cast whose sizes are
whole blocks of that order, which then take no more memory.

Letters: see ``ops``; R rows in order of their matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.kernels.ascend import calls
from moeserve.kernels.ascend.limits import MOST_INNER
from moeserve.kernels.matrix import Int4Matrix, Int8Matrix, Matrix, Source, joined

# Of FRACTAL_NZ for int8: 16 rows of 32 bytes, taken as whole both ways.
NZ_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Matrices:
    """A stack, or where E is 1 one matrix [K, N], which a format is of as a whole; ``scale_EN``
    where codes are int8."""

    data_EKN: Tensor
    scale_EN: Tensor | None
    bias_EN: Tensor | None

    @property
    def count(self) -> int:
        return 1 if self.data_EKN.dim() == 2 else len(self.data_EKN)

    @property
    def whole(self) -> bool:
        return self.scale_EN is not None


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """Gate and up [E, H, 2I], down [E, I, H]."""

    ups: Matrices
    downs: Matrices

    @property
    def limbs(self) -> int:
        """Of an exact sum (``wire.Combine``)."""
        return 2 if self.downs.data_EKN.dtype is torch.float32 else 1


def to_device(
    source: Source, bias: Tensor | None, device: torch.device, *, stacked: bool, nz: bool
) -> Matrices | None:
    """None where the weights are int4. ``nz``: in FRACTAL_NZ where that is whole."""
    matrix: Matrix = joined(source)
    if isinstance(matrix, Int4Matrix):
        return None
    scale: Tensor | None = None
    if isinstance(matrix, Int8Matrix):
        data, scale = matrix.codes, matrix.scale.float().to(device)
    else:
        data = matrix if matrix.dtype is torch.bfloat16 else matrix.float()
    biases = None if bias is None else bias.float().to(device)
    if not stacked:
        data = data[None]
        scale = None if scale is None else scale[None]
        biases = None if biases is None else biases[None]
    data = data.to(device).transpose(1, 2).contiguous()
    data = data[0] if len(data) == 1 else data
    return Matrices(calls.in_nz(data) if nz and is_whole_in_nz(data) else data, scale, biases)


def is_whole_in_nz(data_EKN: Tensor) -> bool:
    """Whether it is int8 in whole blocks, and no product has to cut it into pieces."""
    *_, into, out = data_EKN.shape
    whole = not (into % NZ_BLOCK or out % NZ_BLOCK)
    return data_EKN.dtype is torch.int8 and whole and max(into, out) <= MOST_INNER


def rounded(x_RK: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
    """Rows as a product takes them: codes and scales, or floats."""
    if matrices.whole:
        return quantize(x_RK)
    return x_RK.to(matrices.data_EKN.dtype), None


def quantize(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix.quantize_rows``, to the bit, for any device: a maximum and elementwise steps.
    npu_dynamic_quant takes no fp32."""
    most_R1 = x_RK.abs().amax(-1, keepdim=True)
    sound = most_R1.isfinite()
    some = sound & (most_R1 >= 2.0**-100)
    zero, code = torch.zeros_like(most_R1), torch.full_like(most_R1, 127.0)
    factor = torch.where(some, code / most_R1, zero)
    finite = torch.where(sound, x_RK, torch.zeros_like(x_RK))
    codes = (finite * factor).round().clamp(-127, 127).to(torch.int8)
    scale = torch.where(some, most_R1 / code, zero)
    return codes, torch.where(sound, scale, torch.full_like(zero, torch.nan))[:, 0]


def product(x_RK: Tensor, scale_R: Tensor | None, one: Matrices, ones_1: Tensor) -> Tensor:
    """[R, N] in fp32 over a single matrix, in pieces that the operators take."""
    weight_KN, width = one.data_EKN, one.data_EKN.shape[-1]
    pieces: list[Tensor] = []
    for start in range(0, width, MOST_INNER):
        part_KN = weight_KN
        if width > MOST_INNER:
            part_KN = weight_KN[:, start : start + MOST_INNER].contiguous()
        if one.whole:
            pieces.append(calls.quant_matmul(x_RK, part_KN, ones_1))
        else:
            pieces.append(calls.matmul(x_RK, part_KN))
    out_RN = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return finished(out_RN, scale_R, one, torch.zeros(1, dtype=torch.int64, device=x_RK.device))


def grouped_product(
    x_RK: Tensor, scale_R: Tensor | None, several: Matrices, counts_E: Tensor, ones_1: Tensor
) -> Tensor:
    """[R, N] in fp32; rows past the sum of the counts are garbage."""
    if several.count == 1:
        return product(x_RK, scale_R, several, ones_1)
    out_RN = calls.grouped_matmul(x_RK, several.data_EKN, counts_E)
    return finished(out_RN, scale_R, several, owners(counts_E, len(x_RK)))


def owners(counts_E: Tensor, rows: int) -> Tensor:
    """Of each row its matrix; the last one's past the sum. Nothing is asked of the device."""
    ends_E = counts_E.cumsum(0)
    at_R = torch.arange(rows, device=counts_E.device)
    return torch.searchsorted(ends_E, at_R, right=True).clamp(max=len(counts_E) - 1)


def finished(out_RN: Tensor, scale_R: Tensor | None, several: Matrices, owner_R: Tensor) -> Tensor:
    out_RN = out_RN.float()
    if several.scale_EN is not None:
        assert scale_R is not None
        out_RN = out_RN * scale_R[:, None] * several.scale_EN[owner_R]
    return out_RN if several.bias_EN is None else out_RN + several.bias_EN[owner_R]
