"""What a model is, as pure data: everything the one decoder needs to know, nothing it must guess.

A family file turns ``config.json`` into a ``ModelSpec``; the decoder reads only this. Sizes are
checked here, so that a contradictory config is an error with names before any tensor is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Activation, RouterSpec

# Of factors that divide: less would overflow fp32.
LEAST = 1e-6


class QkNorm(StrEnum):
    """RMS norm of queries and keys: none, of each head (Qwen3), of the whole row (OLMoE)."""

    NONE = "none"
    HEAD = "head"
    ROW = "row"


class RopeScaling(StrEnum):
    """How frequencies are stretched beyond the trained length."""

    DEFAULT = "default"
    LINEAR = "linear"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first ``dim`` features of a head.

    ``magnitude`` multiplies cos and sin (YaRN's attention factor). ``betas`` are YaRN's fast and
    slow rotation counts, ``bands`` Llama 3's low and high frequency factors.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: RopeScaling = RopeScaling.DEFAULT
    factor: float = 1.0
    original_positions: int = 0
    magnitude: float = 1.0
    betas: tuple[float, float] = (32.0, 1.0)
    truncate: bool = True
    bands: tuple[float, float] = (1.0, 4.0)

    def __post_init__(self) -> None:
        _require(self.dim > 0 and self.dim % 2 == 0, f"rotary size {self.dim} is not even")
        _require(self.theta > 1, f"rope_theta={self.theta} must be above 1")
        if self.scaling is not RopeScaling.DEFAULT:
            _require(self.factor >= LEAST, f"rope factor={self.factor} is not at least {LEAST:g}")
        if self.scaling in (RopeScaling.YARN, RopeScaling.LLAMA3):
            _require(
                self.original_positions > 0,
                f"rope {self.scaling} needs original_max_position_embeddings, "
                f"got {self.original_positions}",
            )
        fast, slow = self.betas
        _require(
            min(fast, slow) >= LEAST,
            f"rope beta_fast={fast} and beta_slow={slow} are not at least {LEAST:g}",
        )
        low, high = self.bands
        _require(low < high, f"rope low_freq_factor={low} is not below high_freq_factor={high}")


@dataclass(frozen=True, slots=True)
class GqaSpec:
    """Grouped-query attention. ``clip`` bounds q, k and v after their norm (OLMoE)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qk_norm: QkNorm = QkNorm.NONE
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    window: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.heads % self.kv_heads == 0,
            f"num_attention_heads={self.heads} does not divide over "
            f"num_key_value_heads={self.kv_heads}",
        )


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention; queries are projected directly where ``q_lora`` is None.

    ``bias`` is on the projections from and to the hidden state, except a direct query projection.
    """

    heads: int
    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    value: int
    scale: float
    latent_eps: float
    bias: bool = False


AttentionSpec = GqaSpec | MlaSpec


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """SwiGLU of one size."""

    intermediate: int


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Routed experts, and a shared one of size ``shared`` (0: none) beside them.

    ``router_bias`` adds to the router's logits, ``selection_bias`` only steers the choice;
    ``shared_gate`` weighs the shared expert by a sigmoid of the token (Qwen2).
    """

    router: RouterSpec
    intermediate: int
    shared: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    expert_bias: bool = False
    activation: Activation = Activation.SWIGLU

    def __post_init__(self) -> None:
        r = self.router
        _require(
            r.num_experts % r.num_groups == 0,
            f"{r.num_experts} experts do not divide over n_group={r.num_groups}",
        )
        _require(
            1 <= r.topk_groups <= r.num_groups,
            f"topk_group={r.topk_groups} is not within 1..n_group={r.num_groups}",
        )
        reach = r.num_experts // r.num_groups * r.topk_groups
        _require(
            1 <= r.top_k <= reach,
            f"num_experts_per_tok={r.top_k} is not within 1..{reach}, the experts in reach",
        )


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder block."""

    attention: AttentionSpec
    mlp: DenseSpec | MoeSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model. ``mtp`` is the block of its multi-token-prediction module, if any."""

    architecture: str
    vocab: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    max_positions: int
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    mtp: LayerSpec | None = None

    def __post_init__(self) -> None:
        _require(self.norm_eps > 0, f"rms_norm_eps={self.norm_eps} must be positive")
        for layer in self.layers:
            a = layer.attention
            size = a.head_dim if isinstance(a, GqaSpec) else a.rope
            _require(
                self.rope.dim <= size,
                f"rotary size {self.rope.dim} is larger than the head's {size}",
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that route; what a routing observer will see."""
        return tuple(i for i, x in enumerate(self.layers) if isinstance(x.mlp, MoeSpec))


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"config.json: {problem}")
