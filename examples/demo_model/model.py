"""The demo model as it is trained: DeepSeek-V3 architecture, small.

Written for training on a CPU in bf16; the runtime in ``moeserve`` reads the exported weights
and must agree with this file (``export.py`` checks it). Letters: B batch, T time, N = B*T
tokens, H hidden, A heads, E experts, K experts per token, V vocabulary.

Sources: DeepSeek-V2 (2405.04434) section 2.1 for MLA, DeepSeek-V3 (2412.19437) sections 2.1.2
for the sigmoid router with bias balancing and 2.2 for multi-token prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Expert segments are padded to a multiple of this many tokens.
ROUND = 64


@dataclass(frozen=True)
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 8
    first_k_dense_replace: int = 1
    intermediate_size: int = 768
    moe_intermediate_size: int = 48
    n_routed_experts: int = 32
    n_shared_experts: int = 2
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, rope_dim / 2]."""
    half = config.qk_rope_head_dim // 2
    freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs; x is [B, T, A, rope_dim]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross entropy in the dtype of the logits: autocast would make it fp32, six times slower."""
    with torch.autocast("cpu", enabled=False):
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten())


class Attention(nn.Module):
    """Multi-head latent attention with low-rank queries."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        heads, qk = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, heads * qk, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = Norm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        c, (b, t, _) = self.c, x_BTH.shape
        nope, rot, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH))).view(b, t, heads, -1)
        latent, k_rot = self.kv_a_proj_with_mqa(x_BTH).split([c.kv_lora_rank, rot], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, t, heads, -1)
        k_nope, v = kv.split([nope, c.v_head_dim], -1)
        q_nope, q_rot = q.split([nope, rot], -1)
        q_rot = rotate(q_rot, *rope)
        k_rot = rotate(k_rot.view(b, t, 1, rot), *rope).expand(-1, -1, heads, -1)
        q = torch.cat((q_nope, q_rot.to(q.dtype)), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rot.to(q.dtype)), -1).transpose(1, 2)
        # The CPU flash kernel wants equal head sizes: zero columns of V change nothing.
        v = F.pad(v, (0, nope + rot - c.v_head_dim)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : c.v_head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Routed experts, chosen by sigmoid scores plus a balancing bias inside the best groups."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        e, i, h = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        self.router = nn.Parameter(torch.empty(e, h))
        self.gate_up = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down = nn.Parameter(torch.empty(e, h, i))
        self.shared = SwiGLU(h, i * c.n_shared_experts)
        self.register_buffer("bias_E", torch.zeros(e))
        self.register_buffer("load_E", torch.zeros(e), persistent=False)

    def route(self, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        """topk_ids [N, K] and weights [N, K], in fp32 whatever the autocast says."""
        c = self.c
        with torch.autocast("cpu", enabled=False):
            score_NE = (x_NH.float() @ self.router.T).sigmoid()
        with torch.no_grad():
            choice = score_NE + self.bias_E
            grouped = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            best = grouped.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            keep = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0).bool()
            masked = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(1)
            ids_NK = masked.topk(c.num_experts_per_tok, -1).indices
            self.load_E += torch.bincount(ids_NK.flatten(), minlength=c.n_routed_experts)
        weight_NK = score_NE.gather(1, ids_NK)
        return ids_NK, weight_NK / weight_NK.sum(-1, keepdim=True) * c.routed_scaling_factor

    def segments(self, ids_NK: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Rows sorted by expert, every expert's segment padded to a multiple of ``ROUND``.

        Returns the token of every row (N for padding), the row of every (token, k) and the
        segment sizes. Few distinct sizes matter: oneDNN builds a kernel for each new shape.
        """
        flat = ids_NK.flatten()
        counts = torch.bincount(flat, minlength=self.c.n_routed_experts)
        sizes = (counts + ROUND - 1) // ROUND * ROUND
        shift = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
        order = flat.argsort(stable=True)
        row = torch.arange(len(flat)) + shift[flat[order]]
        token = torch.full((int(sizes.sum()),), len(ids_NK))
        token[row] = order // ids_NK.shape[1]
        slot = torch.empty_like(order)
        slot[order] = row
        return token, slot, sizes.tolist()

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_NH = x_BTH.flatten(0, 1)
        ids_NK, weight_NK = self.route(x_NH)
        token, slot, sizes = self.segments(ids_NK)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_NH.dtype
        gate_up, down = self.gate_up.to(dtype).unbind(0), self.down.to(dtype).unbind(0)
        padded = F.pad(x_NH.to(dtype), (0, 0, 0, 1))  # the last row is what padding points at
        outs = []
        for e, x in enumerate(padded.index_select(0, token).split(sizes)):
            gate, up = F.linear(x, gate_up[e]).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, down[e]))
        y_NKH = torch.cat(outs).index_select(0, slot).view(*ids_NK.shape, -1)
        out = torch.einsum("nkh,nk->nh", y_NKH.float(), weight_NK)
        return (out + self.shared(x_NH)).view_as(x_BTH)


class Block(nn.Module):
    def __init__(self, c: Config, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp: nn.Module = SwiGLU(c.hidden_size, c.intermediate_size) if dense else MoE(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class DemoModel(nn.Module):
    """Trunk, head and one MTP module that shares the embedding and the head."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Block(c, dense=i < c.first_k_dense_replace) for i in range(c.num_hidden_layers)
        )
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.enorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.mtp = Block(c, dense=False)
        self.mtp_norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.reset()

    def reset(self) -> None:
        """Fan-in initialisation; what writes to the residual stream starts small."""
        depth = math.sqrt(2 * self.c.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            std = p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", ".down")):
                std /= depth
            if name in ("embed.weight", "head.weight"):
                std = 0.02
            nn.init.normal_(p, std=std)

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def trunk(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states after the last norm, [B, T, H]."""
        rope = rope_tables(self.c, ids_BT.shape[1])
        x = self.embed(ids_BT)
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x)

    def predict_next(self, hidden_BTH: Tensor, next_ids_BT: Tensor) -> Tensor:
        """MTP: from the trunk's state at i and the token i+1, the state that predicts i+2."""
        rope = rope_tables(self.c, next_ids_BT.shape[1])
        pair = torch.cat((self.enorm(self.embed(next_ids_BT)), self.hnorm(hidden_BTH)), -1)
        return self.mtp_norm(self.mtp(self.eh_proj(pair), rope))

    def losses(self, ids_BT: Tensor, mtp_rows: int) -> tuple[Tensor, Tensor]:
        """Next-token loss, and the MTP loss over the first ``mtp_rows`` rows. ids: [B, T + 2]."""
        hidden = self.trunk(ids_BT[:, :-2])
        main = next_token_loss(self.head(hidden), ids_BT[:, 1:-1])
        rows = ids_BT[:mtp_rows]
        ahead = self.predict_next(hidden[:mtp_rows], rows[:, 1:-1])
        mtp = next_token_loss(self.head(ahead), rows[:, 2:])
        return main, mtp
