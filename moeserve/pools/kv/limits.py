"""How long anything about KV on its way may take, and how much of it may be under way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Seconds, bytes and counts; every wait is bounded by one of these, and by the deadline of its
    request.

    ``first_s``: until a source says anything, connecting included. ``progress_s``: between two of
    its messages; it sends one every ``beat_s`` also when nothing is new. ``queued_s``: from the
    first message until it computes or sends something. ``whole_s``: a fetch from one source.
    ``room_s``: for room in the own cache. ``stalled_s``: what a source waits for whoever fetches
    to take a message or free a slot.

    ``frame_bytes`` are in one message, or slot of shared memory, of which there are ``slots`` per
    call, 0 for none; ``frames`` are under way at a time, of all calls together. ``calls`` are
    served or made at a time, ``arriving`` requests wait or fetch.
    """

    first_s: float = 10.0
    progress_s: float = 5.0
    beat_s: float = 0.5
    queued_s: float = 60.0
    whole_s: float = 300.0
    room_s: float = 60.0
    stalled_s: float = 15.0
    frame_bytes: int = 2 << 20
    slots: int = 4
    frames: int = 16
    calls: int = 64
    arriving: int = 1024
    window: int = 16
