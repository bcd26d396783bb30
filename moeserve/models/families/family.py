"""What a family file declares, and the keys that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moeserve.models.fields import Fields
from moeserve.models.names import TensorNames
from moeserve.models.spec import LayerSpec, ModelSpec, RopeSpec

_MOST_POSITIONS = 1 << 24
_MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Family:
    """``read`` turns a config into a spec; ``names`` are the tensors' where they differ."""

    architecture: str
    model_type: str
    read: Callable[[Fields], ModelSpec]
    names: TensorNames = field(default_factory=TensorNames)


def num_layers(c: Fields) -> int:
    return c.size("num_hidden_layers", most=_MOST_LAYERS)


def head_dim(c: Fields) -> int:
    """Given, or hidden_size / num_attention_heads."""
    given = c.optional_size("head_dim")
    if given is not None:
        return given
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % heads:
        raise c.wrong("num_attention_heads", heads, f"a divisor of hidden_size={hidden}")
    return hidden // heads


def model(
    c: Fields,
    architecture: str,
    layers: tuple[LayerSpec, ...],
    rope: RopeSpec,
    *,
    norm_eps: float = 1e-6,
    mtp: LayerSpec | None = None,
) -> ModelSpec:
    """The keys every config spells alike; ``norm_eps`` is the family's default."""
    c.only("hidden_act", "silu")
    bos = c.ids("bos_token_id")
    return ModelSpec(
        architecture=architecture,
        vocab=c.size("vocab_size"),
        hidden=c.size("hidden_size"),
        layers=layers,
        rope=rope,
        norm_eps=c.number("rms_norm_eps", default=norm_eps),
        max_positions=c.size("max_position_embeddings", most=_MOST_POSITIONS),
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
        eos_ids=c.ids("eos_token_id"),
        bos_id=bos[0] if bos else None,
        mtp=mtp,
    )
