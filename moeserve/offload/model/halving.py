"""Where something changes, by halving. Pure."""

from __future__ import annotations

from collections.abc import Callable


def last_that(
    holds: Callable[[float], bool], least: float, most: float, *, halvings: int = 24
) -> float:
    """The greatest number within ``least``..``most`` for which ``holds`` does, which holds for all
    below it and for none above; to 2^-``halvings`` of their distance."""
    for _ in range(halvings):
        middle = (least + most) / 2
        if holds(middle):
            least = middle
        else:
            most = middle
    return (least + most) / 2
