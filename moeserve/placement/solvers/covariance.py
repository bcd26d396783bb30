"""How experts' loads rise and fall together: what makes a device's load uneven when traffic shifts.

A device is as uneven as the variance of its load, of which pairs of its experts are the part that
grouping decides. Experts of one token go together too, and that is the gain of grouping; so pairs
are counted between different tokens of a window, which share a topic but not a choice::

    cov[e, f] = mean over pairs of different tokens of a window of use[t, e] * use[u, f]
                - use[e] * use[f]

of which the rest, the covariance within one token, is left to grouping. Differences between the
windows of a sequence, between sequences and between workloads are all in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 16  # tokens

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def load_covariance(topk_TK: I32, num_experts: int) -> F64:
    """[E, E] of shares of a layer's load; tokens are in their order, zero with fewer than two."""
    tokens, width = topk_TK.shape
    use_TE = np.zeros((tokens, num_experts + 1), np.float32)
    use_TE[np.arange(tokens)[:, None], topk_TK] = 1.0  # -1, no choice, is the last column
    use_TE = use_TE[:, :num_experts]
    starts = np.arange(0, tokens, WINDOW)
    size_W = np.diff(np.append(starts, tokens)).astype(np.float32)
    if size_W[-1] < 2 and len(size_W) > 1:  # a window of one token has no pair
        starts, size_W = starts[:-1], size_W[:-1]
        size_W[-1] += 1
    if size_W[-1] < 2:
        return np.zeros((num_experts, num_experts))
    window_WE = np.add.reduceat(use_TE, starts, axis=0)
    per_pair_W = 1 / (size_W - 1) / tokens
    together_EE = (window_WE.T * per_pair_W) @ window_WE
    together_EE -= _within_tokens(topk_TK, np.repeat(per_pair_W, size_W.astype(int)), num_experts)
    mean_E = use_TE.mean(axis=0)
    found_EE: F64 = (together_EE - np.outer(mean_E, mean_E)).astype(np.float64) / width**2
    return (found_EE + found_EE.T) / 2


def _within_tokens(topk_TK: I32, weight_T: NDArray[np.float32], num_experts: int) -> F64:
    """[E, E]: the weight of tokens that use both; few of all pairs, so they are counted."""
    columns = num_experts + 1  # -1, no choice, is the last one
    pair_TKK = topk_TK[:, :, None] % columns * columns + topk_TK[:, None, :] % columns
    weight_TKK = np.broadcast_to(weight_T[:, None, None], pair_TKK.shape)
    flat = np.bincount(pair_TKK.ravel(), weights=weight_TKK.ravel(), minlength=columns**2)
    both_EE: F64 = flat.reshape(columns, columns)[:num_experts, :num_experts].astype(np.float64)
    return both_EE
