"""The op table: every tensor operation a decoder may use, once per backend.

Activations are fp32 in and out; weights are fp32 or bf16 and converted exactly as they are read;
every reduction has a fixed order per output element, so a row's result never depends on the rows
beside it (law 1). Backends may repack weights: whoever holds a ``Linear`` or ``Experts`` only
passes it back to the table that made it.

Letters: T tokens, K input features, N output features, H hidden, A query heads, G KV heads,
D head size, V value size, E experts, I expert intermediate size, C experts per token,
S sequences, B cache blocks, P tokens per block, M blocks in the longest table, R rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from torch import Tensor


class Activation(StrEnum):
    """``SWIGLU``: silu(gate) * up. ``CLAMPED``: GPT-OSS, (up + 1) * gate * sigmoid(1.702 gate)
    with gate clamped above at 7 and up to [-7, 7]."""

    SWIGLU = "swiglu"
    CLAMPED = "clamped"


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed matrix [N, K] with an optional bias [N]; ``data`` belongs to the backend."""

    out_features: int
    in_features: int
    data: Any


@dataclass(frozen=True, slots=True)
class Experts:
    """Packed gate/up [E, 2I, H] (gate rows first) and down [E, H, I] with optional biases."""

    num_experts: int
    hidden: int
    intermediate: int
    activation: Activation
    data: Any


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How logits become experts.

    ``scoring``: "softmax" over all experts, "sigmoid" of each, or "topk_softmax" (softmax over
    the chosen logits: GPT-OSS). With ``num_groups`` > 1 only experts of the ``topk_groups`` best
    groups may be chosen; a group's score is the sum of its two best ("top2", DeepSeek-V3) or its
    best ("max", DeepSeek-V2). A selection bias [E] changes the choice, never the weights.
    Weights are divided by their sum if ``normalise``, then multiplied by ``scale``.
    Equal scores: the lower expert id wins.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2"


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which query rows belong to which sequence, and where its past lies.

    Sequence s owns query rows ``query_start_S1[s] : query_start_S1[s + 1]``, which are its last
    tokens; ``context_S[s]`` counts its tokens including them, so row j sits at position
    ``context_S[s] - (query_start_S1[s + 1] - j)`` and sees positions 0 up to its own.
    Position p lies in block ``blocks_SM[s, p // P]`` at offset ``p % P``. All int32, on the CPU.
    """

    query_start_S1: Tensor
    context_S: Tensor
    blocks_SM: Tensor


class Ops(Protocol):
    """One backend. Tensors are contiguous unless said otherwise."""

    name: str

    def pack_linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear: ...

    def pack_experts(
        self,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
        gate_up_bias_E2I: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        activation: Activation = Activation.SWIGLU,
    ) -> Experts: ...

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; any leading ones."""
        ...

    def linear(self, x_TK: Tensor, weight: Linear) -> Tensor:
        """[T, N]."""
        ...

    def pack_heads(self, weight_ANK: Tensor) -> Linear:
        """One matrix per head, for ``linear_heads``; ``out_features`` is N, ``in_features`` K."""
        ...

    def linear_heads(self, x_TAK: Tensor, weight: Linear) -> Tensor:
        """[T, A, N]: head a of every row times matrix a (MLA's absorbed projections)."""
        ...

    def glu(self, gate_up_T2I: Tensor, activation: Activation) -> Tensor:
        """[T, I] from gate (first half) and up (second half)."""
        ...

    def rope(self, x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        """Rotates the first 2R features of each head and copies the rest.

        ``interleaved`` pairs features (0, 1), (2, 3), ...; otherwise (i, i + R). The result keeps
        the place of each feature.
        """
        ...

    def route_topk(
        self, logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids_TC int32, best first by selection score, and weights_TC fp32."""
        ...

    def moe_ffn(self, x_TH: Tensor, experts: Experts, ids_TC: Tensor, weights_TC: Tensor) -> Tensor:
        """[T, H]: sum over c of weights[t, c] * expert[ids[t, c]](x[t]), added in order of c."""
        ...

    def write_kv(self, kv_BPGD: Tensor, x_TGD: Tensor, slot_T: Tensor) -> None:
        """Row t goes to block slot // P, offset slot % P, rounded to the cache's dtype."""
        ...

    def paged_attention(
        self,
        q_TAD: Tensor,
        k_BPGD: Tensor,
        v_BPGV: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """[T, A, V]: causal softmax attention over the paged cache.

        Query head a reads KV head a // (A / G). ``v`` may be a view into ``k`` (MLA, absorbed:
        the latent is both). With ``window`` w a query at p sees positions p - w + 1 .. p. A sink
        is one more logit in the softmax with no value (GPT-OSS).
        """
        ...
