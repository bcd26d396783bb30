"""Whether tokens can stay on accelerators between these ranks, and by what.

Every rank says what it computes on (``RankDevice``); all decide the same from what all say. Pure
but for ``device_of_rank`` and ``meet``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moeserve.comm.exchange.media import LIBRARIES, lacking
from moeserve.comm.group import Group, named, spoiled
from moeserve.errors import ConfigError

# Those whose bytes stay on devices.
DEVICE_BACKENDS = ("nccl", "hccl", "mapped")


@dataclass(frozen=True, slots=True)
class RankDevice:
    """``kind`` of device, and which ``card`` among those of all hosts; ``lacks`` is why torch has
    no collectives for it, ``on_host`` why records of a layer cannot stay there; "" otherwise."""

    kind: str
    card: str = ""
    lacks: str = ""
    on_host: str = ""

    @classmethod
    def read(cls, note: bytes, rank: int) -> RankDevice:
        """ConfigError where the note of ``rank`` is none."""
        try:
            found = cls(**json.loads(note))
        except (ValueError, TypeError, RecursionError) as error:
            raise spoiled("device", f"no device of rank {rank}") from error
        if not all(isinstance(part, str) for part in asdict(found).values()):
            raise spoiled("device", f"no device of rank {rank}")
        return found


def device_of_rank(device: torch.device, host_layers: Sequence[int]) -> RankDevice:
    """Of this rank; ``host_layers`` are those whose experts its table leaves to the host."""
    if device.type not in LIBRARIES:
        return RankDevice(device.type)
    on_host = ""
    if host_layers:
        on_host = f"the experts of layer {host_layers[0]} run on the host"
    return RankDevice(device.type, card_of(device), lacking(device.type), on_host)


def card_of(device: torch.device) -> str:
    """Which card it is, whatever this process numbers it."""
    of: Any = torch.get_device_module(device)
    known = of.get_device_properties(device)
    shown = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    return str(getattr(known, "uuid", f"{device} of {shown}" if shown else device))


def meet(asked: str, group: Group, device: RankDevice, node_R: Sequence[int]) -> str:
    """One of ``DEVICE_BACKENDS``, or "" where bytes go through the host; the same on all ranks.
    Collective over the group where the answer depends on the others. ConfigError as ``choose``."""
    if group.world == 1 or asked not in ("auto", *DEVICE_BACKENDS):
        return ""
    notes = group.all_gather("device", json.dumps(asdict(device)).encode())
    return choose(asked, [RankDevice.read(note, r) for r, note in enumerate(notes)], node_R)


def choose(asked: str, device_R: Sequence[RankDevice], node_R: Sequence[int]) -> str:
    """As ``meet``. What was asked for and cannot be is a ConfigError; "auto" then takes the next:
    collectives, memory of the host's other cards, the host."""
    if asked != "auto":
        if reason := hindrance(asked, device_R, node_R):
            raise ConfigError(f"comm backend {asked!r}: {reason}")
        return asked
    return next((b for b in DEVICE_BACKENDS if not hindrance(b, device_R, node_R)), "")


def hindrance(backend: str, device_R: Sequence[RankDevice], node_R: Sequence[int]) -> str:
    """Why it cannot carry tokens between these ranks, and what to do; "" where it can."""
    kind = "npu" if backend == "hccl" else "cuda"
    if strangers := [r for r, device in enumerate(device_R) if device.kind != kind]:
        return (
            f"it joins {kind} devices alone, not the {device_R[strangers[0]].kind} of "
            f"{named(strangers)}: choose 'auto'"
        )
    for r, device in enumerate(device_R):
        if device.on_host:
            return f"rank {r}: {device.on_host}: choose 'auto'"
        if device.lacks and backend != "mapped":
            return f"rank {r}: {device.lacks}"
    if backend == "mapped":
        if len(set(node_R)) > 1:
            return f"ranks are spread over {len(set(node_R))} nodes: choose 'auto'"
        return ""
    seen: dict[tuple[int, str], int] = {}
    for r, (device, node) in enumerate(zip(device_R, node_R, strict=True)):
        if (other := seen.setdefault((node, device.card), r)) != r:
            return (
                f"ranks {other} and {r} share the card {device.card}, and it takes one rank a "
                "card: give each a card of its own, or choose 'mapped' on one host"
            )
    return ""
