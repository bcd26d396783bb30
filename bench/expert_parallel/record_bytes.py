"""What a copy of a token weighs on its way, and how long bytes take on a link of the test bed."""

from __future__ import annotations

from moeserve.testbed.links import MTU

# A full frame of the links, and the payload in it: headers of TCP, with a time stamp, and below.
FRAME, PAYLOAD = MTU + 14, MTU - 52


def copy_bytes(hidden: int, top_k: int, wire: str = "own") -> tuple[int, int]:
    """There: features, scale, unit, weights, slots; and back: sums and a byte."""
    size, back = {"own": (1, 2), "bf16": (2, 2), "fp32": (4, 4)}[wire]
    factor = 2 if wire == "fp32" else 1
    there = size * hidden + 8 + 4 * top_k + -(-2 * top_k // 4) * 4
    return there, back * hidden + factor


def link_seconds(payload: float, rate: int | None) -> float:
    """At ``rate`` bits per second; none where it is unlimited."""
    return 0.0 if rate is None else payload * FRAME / PAYLOAD * 8 / rate
