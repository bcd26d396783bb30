"""What of a model the operators of Ascend NPUs do not take, told from its spec.

By the names under which ``AscendOps.fallbacks`` has them once the model runs; int4 products, which
depend on how weights are stored, are not foreseen.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moeserve.config.options import RankModelOptions
from moeserve.kernels.ascend.limits import (
    ATTENTION,
    GATED_LOGITS,
    KV_COPIES,
    ROUTING,
    WINDOWS,
    attention_lacks,
    heads_lack,
    routing_lacks,
)
from moeserve.kernels.fused import GATE
from moeserve.models.attention import kv_shape
from moeserve.models.spec import GqaSpec, LayerSpec, ModelSpec, MoeSpec
from moeserve.models.survey import survey
from moeserve.models.weights import torch_dtype


def npu_fallbacks(spec: ModelSpec, kv_dtype: torch.dtype, block_size: int) -> dict[str, str]:
    """What falls back to the host, and why; the first reason of several."""
    found: dict[str, str] = {}
    for layer in spec.layers:
        for what, why in (*of_attention(layer, kv_dtype, block_size), *of_routing(layer)):
            if why:
                found.setdefault(what, why)
    return found


def would_fall_back(path: str | Path, options: RankModelOptions) -> list[str]:
    """Sentences, of the model in a folder; KV of no given dtype is thought to be bfloat16."""
    floats = options.dtype if options.dtype != "auto" else "bfloat16"
    kind = torch_dtype(options.kv_dtype) or torch_dtype(floats) or torch.bfloat16
    found = npu_fallbacks(survey(path).spec, kind, options.block_size)
    return [f"{what} falls back to the host's CPU: {why}" for what, why in found.items()]


def of_attention(layer: LayerSpec, kv_dtype: torch.dtype, block_size: int) -> list[tuple[str, str]]:
    a = layer.attention
    shape = kv_shape(a, 1, block_size, kv_dtype)
    if why := attention_lacks(shape):
        return [(ATTENTION, why)]
    plain = not isinstance(a, GqaSpec) or (a.window is None and not a.sinks)
    return [(KV_COPIES, heads_lack(shape, a.heads) if plain else WINDOWS)]


def of_routing(layer: LayerSpec) -> list[tuple[str, str]]:
    mlp = layer.mlp
    if not isinstance(mlp, MoeSpec):
        return []
    found = [(ROUTING, routing_lacks(mlp.router))]
    if mlp.router.scoring == "topk_softmax" and mlp.selection_bias:
        found.insert(0, (ROUTING, GATED_LOGITS))
    if mlp.shared and mlp.shared_gate:
        found.append((ROUTING, routing_lacks(GATE)))
    return found
