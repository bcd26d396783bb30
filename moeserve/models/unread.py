"""Tensors of a checkpoint that nobody read: each needs a reason, else results would be wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moeserve.errors import CheckpointError
from moeserve.models.spec import ModelSpec
from moeserve.models.weights import Weights


def explained(w: Weights, spec: ModelSpec) -> tuple[str, ...]:
    """The tensors nobody read, if each has a reason: else an error that names them."""
    unread = w.checkpoint.unread()
    strange = [
        name
        for name in unread
        if not (_needless(name, spec) or _of_others(name, w.own) or w.stored.needless(name))
    ]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise CheckpointError(
            f"{w.checkpoint.path}: {spec.architecture} does not explain the tensors "
            f"{', '.join(strange[:3])}{more}; results without them would be wrong"
        )
    return unread


def _of_others(name: str, own: Mapping[int, Sequence[int]]) -> bool:
    """Whoever has the expert looks at what else is stored with it."""
    found = re.match(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.", name)
    if found is None:
        return False
    layer, expert = int(found[1]), int(found[2])
    return layer in own and expert not in own[layer]


def _needless(name: str, spec: ModelSpec) -> bool:
    """Rotary buffers, the copy of a tied head, and modules beyond the last decoder layer."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return spec.tied_embeddings
    parts = name.split(".")
    beyond = parts[:2] == ["model", "layers"] and parts[2].isdigit()
    return beyond and int(parts[2]) >= len(spec.layers)
