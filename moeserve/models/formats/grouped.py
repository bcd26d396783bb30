"""Codes with one scale and zero point per group of features, into the matrices of the op table.

Letters: N output features, K input features, G groups in a row.
"""

from __future__ import annotations

from torch import Tensor

from moeserve.kernels.matrix import GROUP, Int4Matrix


def group_size(width: int, count: int, known: tuple[int, ...]) -> int | None:
    """Of ``count`` groups in ``width`` features: one the config mentions, or what divides evenly.

    None where that is ambiguous or impossible. A single one is as long as it likes.
    """
    if count == 1:
        return -(-width // GROUP) * GROUP
    fitting = {size for size in known if -(-width // size) == count}
    if len(fitting) == 1:
        return fitting.pop()
    if fitting or not count or width % count:
        return None
    return width // count


def int4(packed_NB: Tensor, scale_NG: Tensor, zero_NG: Tensor, group: int) -> Int4Matrix:
    """Groups longer than the usual become several with one scale."""
    if group > GROUP and group % GROUP == 0:
        count = -(-2 * packed_NB.shape[-1] // GROUP)
        scale_NG = scale_NG.repeat_interleave(group // GROUP, -1)[..., :count]
        zero_NG = zero_NG.repeat_interleave(group // GROUP, -1)[..., :count]
        group = GROUP
    return Int4Matrix(packed_NB, scale_NG.contiguous(), zero_NG.contiguous(), group)


def spread(x_NG: Tensor, group: int, width: int) -> Tensor:
    """[..., K]: every group's value under each of its features."""
    return x_NG.repeat_interleave(group, -1)[..., :width]
