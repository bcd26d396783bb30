"""The sizes of a model that decide how fast kernels are: what they are measured at."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.models.spec import GqaSpec, ModelSpec, MoeSpec
from moeserve.offload.checkpoint_demand import attention_weights


@dataclass(frozen=True, slots=True)
class KernelShapes:
    """``linear`` output features stand for all matrices of attention. There are ``experts`` of size
    ``inner``, of which a token takes ``top_k``; 0 of them where nothing is routed. A latent has one
    KV head, whose value is the first part of its key."""

    hidden: int
    linear: int
    experts: int
    top_k: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    latent: bool

    @property
    def name(self) -> str:
        """A short text; equal shapes have equal ones."""
        kind = "latent" if self.latent else f"{self.kv_heads} KV heads"
        return (
            f"hidden {self.hidden}, {self.experts} experts of {self.inner} by {self.top_k}, "
            f"{self.heads} heads of {self.head_size}, {kind}"
        )

    @property
    def attention_operations(self) -> int:
        """Of a query token, for each position that it sees."""
        return 2 * self.heads * (self.head_size + self.value_size)


USUAL = KernelShapes(1024, 2560, 32, 4, 512, 16, 4, 64, 64, latent=False)
# What calibrations for no model in particular are kept as.
ANY_MODEL = "any model"


def shapes_of(spec: ModelSpec) -> KernelShapes:
    """Of the first layer that routes, or of the first."""
    layer = spec.layers[(*spec.moe_layers, 0)[0]]
    a, mlp, hidden = layer.attention, layer.mlp, spec.hidden
    experts, top_k, inner = 0, 0, 0
    if isinstance(mlp, MoeSpec):
        experts, top_k, inner = mlp.router.num_experts, mlp.router.top_k, mlp.intermediate
    linear = max(1, attention_weights(a, hidden) // hidden)
    if isinstance(a, GqaSpec):
        size = a.head_dim
        heads = (a.heads, a.kv_heads, size, size)
    else:
        heads = (a.heads, 1, a.kv_lora + a.rope, a.kv_lora)
    return KernelShapes(
        hidden, linear, experts, top_k, inner, *heads, latent=not isinstance(a, GqaSpec)
    )
