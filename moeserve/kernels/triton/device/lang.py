"""Arithmetic that kernels share, written out so that its bits are the same wherever they run.

Additions and multiplications of fp32 round once each (kernels are compiled without fusion), and so
do ``div_rn`` and ``sqrt_rn``; what is built of these here gives the same bits on every device and
in Triton's interpreter. The approximate instructions that Triton would take for ``/``, ``exp`` and
``sqrt`` are not used.

``INTERPRETED`` is whether kernels run in the interpreter (``TRITON_INTERPRET=1`` when this module
is imported). It multiplies bf16 by their bit patterns and truncates what becomes bf16, so there a
product of bf16 is taken in fp32, where each is exact; the sums are then added in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def rint(x):
    """fp32 to the nearest whole number, ties to even."""
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(x < 0.0, -whole, whole)
    return tl.where(size < 8388608.0, whole, x)


@triton.jit
def power_of_two(e):
    """fp32 2^e of int32 -126..127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(x):
    """Of fp32 2^e, -126 <= e <= 126, exactly; NaN of NaN."""
    inverse = (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(x == x, inverse, x)


@triton.jit
def exp(x):
    """fp32, within two units in the last place; 0 below -104, infinity above 89, NaN of NaN."""
    x = tl.where(x < -104.0, -104.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    n = rint(x * 1.4426950408889634)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9841270e-4 + 1.3888889e-3
    p = p * r + 8.3333333e-3
    p = p * r + 4.1666667e-2
    p = p * r + 1.6666667e-1
    p = p * r + 0.5
    p = (p * r) * r + r + 1.0
    whole = tl.where(n == n, n, 0.0).to(tl.int32)
    half = whole >> 1
    return (p * power_of_two(half)) * power_of_two(whole - half)


@triton.jit
def exp_below(x):
    """fp32 of x <= 0, within two units in the last place; 0 below -87, NaN of NaN. Fewer than half
    of the instructions of ``exp``: fused additions, and the power of two as bits."""
    t = tl.fma(x, tl.full(x.shape, 1.4426950408889634, tl.float32), 12582912.0)
    n = t - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), x)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = tl.fma(r, tl.full(x.shape, 1.9841270e-4, tl.float32), 1.3888889e-3)
    p = tl.fma(p, r, 8.3333333e-3)
    p = tl.fma(p, r, 4.1666667e-2)
    p = tl.fma(p, r, 1.6666667e-1)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p * r, r, r) + 1.0
    # The low bits of t are those of n: as exponent they are added to that of p.
    bits = p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)
    return tl.where(x < -87.0, 0.0, tl.where(x == x, bits.to(tl.float32, bitcast=True), x))


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exp(-x))


@triton.jit
def exp64(x):
    """fp64 of x <= 0, within a few units in the last place; 0 below -700, NaN of NaN."""
    low = x < -700.0
    x = tl.where(low, 0.0, x)
    n = x * 1.4426950408889634
    n = (n + 6755399441055744.0) - 6755399441055744.0
    r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    p = r * 1.6059043836821613e-10 + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 1.984126984126984e-04
    p = p * r + 1.3888888888888889e-03
    p = p * r + 8.333333333333333e-03
    p = p * r + 4.1666666666666664e-02
    p = p * r + 1.6666666666666666e-01
    p = p * r + 0.5
    p = (p * r) * r + r + 1.0
    whole = tl.where(n == n, n, 0.0).to(tl.int64)
    return tl.where(low, 0.0, p * ((whole + 1023) << 52).to(tl.float64, bitcast=True))


@triton.jit
def bf16_value(x):
    """fp32 rounded to the nearest bf16, ties to even, as fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def as_bf16(x):
    """What ``bf16_value`` made, as an operand: bf16, which it holds exactly."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x.to(tl.bfloat16)


@triton.jit
def dot(a, b, total):
    """total + a @ b of fp32, or of operands of ``as_bf16``, in one order whatever the rows."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def quantize(x, most):
    """int8 codes and the scale (as ``matrix.quantize_rows``) of rows [M, K] whose greatest
    magnitudes are ``most`` [M]: NaN or infinity where a row holds one."""
    sound = most < float("inf")
    some = sound & (most >= 7.888609052210118e-31)
    factor = tl.where(some, tl.div_rn(127.0, tl.where(some, most, 1.0)), 0.0)
    scale = tl.where(some, tl.div_rn(most, 127.0), 0.0)
    scale = tl.where(sound, scale, float("nan"))
    codes = rint(tl.where(sound[:, None], x, 0.0) * factor[:, None])
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return codes.to(tl.int8), scale


@triton.jit
def magnitude(x):
    """|x|, infinity where it is NaN: a maximum of these sees both."""
    return tl.where(x == x, tl.abs(x), float("inf"))
