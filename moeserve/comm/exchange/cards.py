"""Whether tokens can stay on accelerators between these ranks, and by what.

Every rank says what it computes on (``Seat``); all decide the same from what all say. Pure but for
``seat_of`` and ``meet``.
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
class Seat:
    """``kind`` of device, and which ``card`` among those of all hosts; ``lacks`` is why torch has
    no collectives for it, ``stays`` why records of a layer cannot stay there; "" otherwise."""

    kind: str
    card: str = ""
    lacks: str = ""
    stays: str = ""

    @classmethod
    def read(cls, note: bytes, rank: int) -> Seat:
        """ConfigError where the note of ``rank`` is none."""
        try:
            found = cls(**json.loads(note))
        except (ValueError, TypeError, RecursionError) as error:
            raise spoiled("device", f"no device of rank {rank}") from error
        if not all(isinstance(part, str) for part in asdict(found).values()):
            raise spoiled("device", f"no device of rank {rank}")
        return found


def seat_of(device: torch.device, host_layers: Sequence[int]) -> Seat:
    """Of this rank; ``host_layers`` are those whose experts its table leaves to the host."""
    if device.type not in LIBRARIES:
        return Seat(device.type)
    stays = ""
    if host_layers:
        stays = f"the experts of layer {host_layers[0]} run on the host"
    return Seat(device.type, card_of(device), lacking(device.type), stays)


def card_of(device: torch.device) -> str:
    """Which card it is, whatever this process numbers it."""
    of: Any = torch.get_device_module(device)
    known = of.get_device_properties(device)
    shown = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    return str(getattr(known, "uuid", f"{device} of {shown}" if shown else device))


def meet(asked: str, group: Group, seat: Seat, node_R: Sequence[int]) -> str:
    """One of ``DEVICE_BACKENDS``, or "" where bytes go through the host; the same on all ranks.
    Collective over the group where the answer depends on the others. ConfigError as ``choose``."""
    if group.world == 1 or asked not in ("auto", *DEVICE_BACKENDS):
        return ""
    notes = group.all_gather("device", json.dumps(asdict(seat)).encode())
    return choose(asked, [Seat.read(note, r) for r, note in enumerate(notes)], node_R)


def choose(asked: str, seat_R: Sequence[Seat], node_R: Sequence[int]) -> str:
    """As ``meet``. What was asked for and cannot be is a ConfigError; "auto" then takes the next:
    collectives, memory of the host's other cards, the host."""
    if asked != "auto":
        if reason := hindrance(asked, seat_R, node_R):
            raise ConfigError(f"comm backend {asked!r}: {reason}")
        return asked
    return next((b for b in DEVICE_BACKENDS if not hindrance(b, seat_R, node_R)), "")


def hindrance(backend: str, seat_R: Sequence[Seat], node_R: Sequence[int]) -> str:
    """Why it cannot carry tokens between these ranks, and what to do; "" where it can."""
    kind = "npu" if backend == "hccl" else "cuda"
    if strangers := [r for r, seat in enumerate(seat_R) if seat.kind != kind]:
        return (
            f"it joins {kind} devices alone, not the {seat_R[strangers[0]].kind} of "
            f"{named(strangers)}: choose 'auto'"
        )
    for r, seat in enumerate(seat_R):
        if seat.stays:
            return f"rank {r}: {seat.stays}: choose 'auto'"
        if seat.lacks and backend != "mapped":
            return f"rank {r}: {seat.lacks}"
    if backend == "mapped":
        if len(set(node_R)) > 1:
            return f"ranks are spread over {len(set(node_R))} nodes: choose 'auto'"
        return ""
    seen: dict[tuple[int, str], int] = {}
    for r, (seat, node) in enumerate(zip(seat_R, node_R, strict=True)):
        if (other := seen.setdefault((node, seat.card), r)) != r:
            return (
                f"ranks {other} and {r} share the card {seat.card}, and it takes one rank a card: "
                "give each a card of its own, or choose 'mapped' on one host"
            )
    return ""
