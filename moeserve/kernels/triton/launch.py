"""The one way from a wrapper to a kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from moeserve.kernels.triton.device.lang import INTERPRETED
from moeserve.kernels.triton.tiles import MOST_WARPS

Kernel = Any  # of ``triton.jit``, which has no types
BACKEND = "cuda" if torch.version.hip is None else "hip"


def launch(
    kernel: Kernel, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> None:
    """Runs ``kernel`` once for each place of ``grid``; in order of the device's queue, so that
    nothing is waited for. A grid without places is nothing to do.

    Multiplications and additions stay apart: fusing them would depend on the compiler.
    """
    if 0 in grid:
        return
    if "num_warps" in options:
        options["num_warps"] = min(options["num_warps"], MOST_WARPS[BACKEND])
    with around(device):
        kernel[grid](*args, **options, enable_fp_fusion=False)


def around(device: torch.device) -> AbstractContextManager[Any]:
    """On the device; in the interpreter, numpy's opinion on infinities is not asked for."""
    if INTERPRETED:
        return np.errstate(all="ignore")
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_at_least(size: int, least: int = 1) -> int:
    """The least power of two that is below neither."""
    return 1 << (max(size, least) - 1).bit_length()
