"""Time one call again and again. Imports the standard library only, as ``answer`` does."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST, MOST = 3, 400


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call after one to warm up: at least three, then as many as fit."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < LEAST or (time.perf_counter() < end and len(took) < MOST):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return took
