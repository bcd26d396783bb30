"""How long anything about KV on its way may take, and how much of it may be under way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Seconds, bytes and counts; every wait is bounded by one of these, and by the deadline of its
    request.

    ``first_s``: until a source says anything, connecting included: about what a silent member gets
    until gateways drop it, its lease and their grace. ``progress_s``: between two of its messages,
    on a slow link too; it sends one every ``beat_s`` also when nothing is new. ``queued_s``: from
    the first message until it computes or sends something. ``whole_s``: a fetch from one source.
    ``room_s``: for room in the own cache. ``stalled_s``: what a source waits for whoever fetches
    to take a message or free a slot. ``layers_s``: between two looks at how far a step is.

    ``frame_bytes`` are in one message; ``frames`` are made at a time, of all calls together. Shared
    memory has ``slots`` per call, 0 for none, of ``slot_bytes``, and memory for Mooncake's engine
    ``registered``; it is offered where as much as
    ``memory_from`` is to come, and by ``memories`` calls at a time. ``calls`` are served or made at
    a time, ``arriving`` requests wait or fetch. ``window`` runs of a layer come before the next
    layer's.
    """

    first_s: float = 4.5
    progress_s: float = 5.0
    beat_s: float = 0.5
    layers_s: float = 0.002
    queued_s: float = 60.0
    whole_s: float = 300.0
    room_s: float = 60.0
    stalled_s: float = 15.0
    frame_bytes: int = 2 << 20
    frames: int = 16
    slots: int = 4
    registered: int = 4
    slot_bytes: int = (4 << 20) + (64 << 10)  # 4 MiB, and digests
    memory_from: int = 1 << 20
    memories: int = 8
    calls: int = 64
    arriving: int = 1024
    window: int = 16
