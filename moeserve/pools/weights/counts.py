"""Where a member's weights came from, and what was wrong on the way; since the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class WeightCounts:
    """Bytes by where they came from: a folder on this host, another member's memory or disk, or the
    cache pool. ``bad`` chunks had changed on their way, ``lost`` members failed or were late,
    ``absent`` chunks were not where they were asked for. ``sent_bytes`` went to others, ``changed``
    were read here with other bytes than before. ``put_bytes`` went into the cache pool."""

    disk_bytes: int = 0
    neighbour_bytes: int = 0
    pool_bytes: int = 0
    bad: int = 0
    lost: int = 0
    absent: int = 0
    sent_bytes: int = 0
    changed: int = 0
    put_bytes: int = 0
