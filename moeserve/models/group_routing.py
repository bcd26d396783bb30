"""The routing of rows that run in one group of layers a step: shown whole, when the last has run.

So an observer sees every token once, with the experts of all layers, whichever steps ran them.
Letters: T rows, P of them those of the group, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.models.batch import GroupPass
from moeserve.models.spec import ModelSpec


def take_routed(group: GroupPass, routed: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
    """By MoE layer, the choices of the rows that have none to come; nothing where there are none.

    The group's own are added to ``group.routed``, and with the last layer all of them to the
    result. ``routed`` lacks the layers that had no rows, if there are any.
    """
    moe_layers, run = spec.moe_layers, range(group.start, group.stop)
    if len(routed) < len(moe_layers):
        moe_layers = tuple(layer for layer in moe_layers if layer in run)
    found = dict(zip(moe_layers, routed, strict=True))
    for layer in found.keys() & set(run):
        ids_TC = found[layer]
        group.routed[layer] = ids_TC[len(ids_TC) - group.rows :].clone()
        found[layer] = ids_TC[: len(ids_TC) - group.rows]
    if group.last:
        for layer, more_PC in group.routed.items():
            before = found.get(layer)
            found[layer] = more_PC if before is None else torch.cat((before, more_PC))
    if len(found) < len(spec.moe_layers):
        return []  # no other rows
    return [found[layer] for layer in spec.moe_layers]
