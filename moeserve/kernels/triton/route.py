"""From logits to experts and weights. Letters: see ``ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.errors import InternalError
from moeserve.kernels.ops import RouterSpec
from moeserve.kernels.triton.device import route as kernels
from moeserve.kernels.triton.launch import launch, power_at_least

SCORING = {"softmax": 0, "sigmoid": 1, "topk_softmax": 2}


def route_topk(logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """ids_TC int32 and weights_TC; InternalError for a spec that no router can have."""
    rows, device = len(logits_TE), logits_TE.device
    width = spec.num_experts // spec.num_groups
    check_spec(spec, width)
    ids = torch.empty(rows, spec.top_k, dtype=torch.int32, device=device)
    weights = torch.empty(rows, spec.top_k, device=device)
    launch(
        kernels.route_kernel,
        (rows,),
        device,
        *(logits_TE, bias_E, ids, weights, spec.num_groups, width, spec.scale),
        SCORING=SCORING[spec.scoring],
        NORMALISE=spec.normalise,
        TOP_K=spec.top_k,
        KEPT=spec.topk_groups if spec.num_groups > 1 else 0,
        TOP2=spec.group_score == "top2" and width > 1,
        GROUPS=power_at_least(spec.num_groups),
        WIDTH=power_at_least(width),
        CHOSEN=power_at_least(spec.top_k),
    )
    return ids, weights


def check_spec(spec: RouterSpec, width: int) -> None:
    kept = spec.topk_groups if spec.num_groups > 1 else 1
    sound = (
        spec.scoring in SCORING
        and spec.group_score in ("top2", "max")
        and width * spec.num_groups == spec.num_experts
        and 1 <= kept <= spec.num_groups
        and 1 <= spec.top_k <= kept * width
    )
    if not sound:
        raise InternalError(f"no router is like {spec}")
