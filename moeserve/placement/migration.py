"""Where a migrating token is after each layer.

It ends a layer on one of the devices that hold its experts: the one that its experts' guide values
(``fit_guide``, part of the plan) favour for the layer after, or, without a guide, the one that
holds most of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.layer_use import LayerUse, layer_uses
from moeserve.placement.plan import Plan

I32 = NDArray[np.int32]


def landing(plan: Plan, l: int, topk_TK: I32, use: LayerUse) -> I32:
    """Where the tokens are after layer ``l``: of their own devices, the best guess for the next."""
    if plan.guide_LED is None:
        score_TD = np.zeros(use.used_TD.shape, np.int64)
        for k in range(use.device_TK.shape[1]):
            valid = use.device_TK[:, k] >= 0
            np.add.at(score_TD, (np.flatnonzero(valid), use.device_TK[valid, k]), 1)
    else:
        padded_ED = np.vstack((plan.guide_LED[l], np.zeros_like(plan.guide_LED[l][:1])))
        score_TD = np.zeros(use.used_TD.shape, np.int64)
        for k in range(topk_TK.shape[1]):
            score_TD += padded_ED[topk_TK[:, k]]
    best_T: I32 = np.argmax(np.where(use.used_TD, score_TD + 1, 0), axis=1).astype(np.int32)
    return best_T


def fit_guide(plan: Plan, topk_TLK: I32) -> NDArray[np.uint8]:
    """[L, E, D]: how often tokens of an expert use a device in the layer after, of 255."""
    shape = (plan.num_layers, plan.num_experts, plan.num_devices)
    guide_LED = np.zeros(shape, np.uint8)
    uses = layer_uses(plan, topk_TLK)
    next(uses)
    for l, use in enumerate(uses):
        hits_ED = np.zeros(shape[1:])
        seen_E = np.zeros(shape[1])
        for k in range(topk_TLK.shape[2]):
            expert_T = topk_TLK[:, l, k]
            valid = expert_T >= 0
            np.add.at(seen_E, expert_T[valid], 1)
            np.add.at(hits_ED, expert_T[valid], use.used_TD[valid])
        guide_LED[l] = np.round(255 * hits_ED / np.maximum(1, seen_E)[:, None])
    return guide_LED
