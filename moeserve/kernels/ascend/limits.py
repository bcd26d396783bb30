"""What torch_npu's operators take, by their documentation (op-plugin, as shipped with 2.13.0).

Pure: shapes in, a reason out, empty where the operator serves. A reason names the limit; whoever
falls back says it once in the log, and ``doctor`` shows it. Letters: see ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeserve.kernels.ascend.buffers import AtlasGeneration, ExpertTraffic
from moeserve.kernels.ops import KvShape, RouterSpec

# What falls back, and why where that is one reason.
INT4 = ("int4 products", "no operator keeps the sums of a group exact")
ATTENTION, KV_COPIES, ROUTING = "attention", "attention over a copy of KV", "routing"
WINDOWS = "windows and sinks are not among what fused attention is used for"
GATED_LOGITS = "gating has no bias on logits of which the chosen make a softmax"

# npu_quant_matmul and npu_grouped_matmul: the last dimension of either side.
MOST_INNER = 65535
# npu_moe_gating_top_k: experts, and experts of all groups once each is padded to a multiple of 32.
MOST_EXPERTS = 2048
GROUP_PAD = 32
# npu_fused_infer_attention_score_v2 in layout TND.
GQA_HEAD = 128
GQA_MOST_GROUP = 64
GQA_BLOCKS = (128, 256, 384, 512)
MLA_LATENT, MLA_ROTATED = 512, 64
MLA_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MLA_BLOCKS = (16, 128)
MLA_MOST_ROWS = 16
MOST_SEQUENCES = 4096
MASK = 2048
# npu_moe_distribute_dispatch_v2 and ..._combine_v2.
MOST_CHOICES = 16


@dataclass(frozen=True, slots=True)
class DistributeLimits:
    """Of one generation; ``worlds`` are the numbers of ranks that it takes."""

    worlds: range | tuple[int, ...]
    most_tokens: int
    features: range
    most_experts: int
    most_local: int

    @classmethod
    def of(cls, generation: AtlasGeneration) -> DistributeLimits:
        if generation is AtlasGeneration.A2:  # by ``fullmesh``
            return cls((16, 32, 64, 128, 256), 256, range(32, 7168 + 1, 32), 512, 24)
        return cls(range(2, 768 + 1), 512, range(1024, 8192 + 1), 1024, 1024)


def attention_lacks(shape: KvShape) -> str:
    """Why a cache of this shape cannot be attended to by the fused operator."""
    if shape.dtype is not torch.bfloat16:
        return f"KV of {shape.dtype}: fused attention takes bfloat16 (--kv-dtype bfloat16)"
    blocks: tuple[int, ...] = GQA_BLOCKS
    if shape.latent:
        blocks = MLA_BLOCKS
        rest = shape.head_size - shape.value_size
        if (shape.value_size, rest) != (MLA_LATENT, MLA_ROTATED):
            return (
                f"a latent of {shape.value_size} + {rest}: fused attention takes {MLA_LATENT} + "
                f"{MLA_ROTATED}"
            )
    elif (shape.head_size, shape.value_size) != (GQA_HEAD, GQA_HEAD):
        return f"heads of {shape.head_size}: fused attention takes {GQA_HEAD}"
    if shape.block_size not in blocks:
        listed = ", ".join(map(str, blocks))
        return f"--block-size {shape.block_size}: fused attention takes {listed}"
    return ""


def heads_lack(shape: KvShape, heads: int) -> str:
    """Of queries over a cache that fused attention serves."""
    if shape.latent and heads not in MLA_HEADS:
        return f"{heads} heads over a latent: fused attention takes a power of two, at most 128"
    if not shape.latent and heads > GQA_MOST_GROUP * shape.kv_heads:
        return f"{heads} heads share {shape.kv_heads}: fused attention takes {GQA_MOST_GROUP} each"
    return ""


def routing_lacks(spec: RouterSpec) -> str:
    """Why ``npu_moe_gating_top_k`` cannot route by this."""
    of_group = spec.num_experts // spec.num_groups
    padded = -(-of_group // GROUP_PAD) * GROUP_PAD * spec.num_groups
    if of_group <= 2:
        return f"{of_group} experts in a group: gating takes more than 2"
    if max(padded, spec.num_experts) > MOST_EXPERTS:
        return f"{spec.num_experts} experts in {spec.num_groups} groups: gating takes 2048 at most"
    if spec.top_k > of_group * spec.topk_groups:
        return f"{spec.top_k} of {of_group * spec.topk_groups} experts: gating takes no more"
    return ""


def distribute_lacks(t: ExpertTraffic, generation: AtlasGeneration) -> str:
    """Why dispatch and combine between NPUs do not take this traffic; ``t.local`` are slots."""
    limits, name = DistributeLimits.of(generation), f"Atlas {generation}"
    if t.world not in limits.worlds:
        known = limits.worlds
        listed = f"{known[0]} to {known[-1]}" if isinstance(known, range) else str(known)[1:-1]
        return f"{t.world} ranks: {name} takes {listed}"
    if t.top_k > MOST_CHOICES:
        return f"{t.top_k} experts for a token: {name} takes {MOST_CHOICES}"
    if t.hidden not in limits.features:
        spoken = f"{limits.features[0]} to {limits.features[-1]}"
        step = f", in steps of {limits.features.step}" if limits.features.step > 1 else ""
        return f"{t.hidden} features: {name} takes {spoken}{step}"
    if t.local > limits.most_local or t.local * t.world > limits.most_experts:
        return (
            f"{t.local} slots on each of {t.world} ranks: {name} takes {limits.most_local} on a "
            f"rank and {limits.most_experts} in all"
        )
    if t.tokens > limits.most_tokens:
        return (
            f"{t.tokens} tokens of a rank in a step: {name} takes {limits.most_tokens} "
            f"(--max-num-batched-tokens {limits.most_tokens})"
        )
    return ""
