"""What torch_npu's operators take, by their documentation (op-plugin, as shipped with 2.13.0).

Pure: shapes in, a reason out, empty where the operator serves. A reason names the limit; whoever
falls back says it once in the log, and ``doctor`` shows it. Letters: see ``ops``.
"""

from __future__ import annotations

import torch

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
