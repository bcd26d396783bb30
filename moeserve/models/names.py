"""What a family calls its tensors, where it differs from the common spelling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names inside a decoder layer.

    ``blocks`` are the spellings of its MoE block, tried in order. Experts come one by one
    (``experts.3.gate_proj.weight``) or fused (``experts.gate_up_proj``); ``transposed`` fused ones
    store [E, in, out] with gate and up columns alternating (GPT-OSS).
    """

    blocks: tuple[str, ...] = ("mlp",)
    router: str = "gate"
    selection_bias: str = "e_score_correction_bias"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    transposed: bool = False
