"""Choose the op table of a device, once, when an engine starts.

The native half may be missing where the package was not built: plain torch then does its work,
much slower, and the log says so. With ``MOESERVE_REQUIRE_NATIVE=1`` that is an error instead.
"""

from __future__ import annotations

import logging
import os

import torch

from moeserve.errors import ConfigError
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps

REMEDY = "build it with `pip install .`, which needs a C++17 compiler"


def choose_ops(device: str | torch.device = "cpu", threads: int | None = None) -> Ops:
    """The backend of a device, which is then its ``device``.

    ``threads`` None leaves the number as it is: all cores this process may use. ConfigError where
    no backend serves the device.
    """
    if str(device) != "cpu":
        raise ConfigError(f"device={str(device)!r}: expected 'cpu'")
    try:
        from moeserve.kernels.cpu import _cpu
        from moeserve.kernels.cpu.ops import CpuOps
    except ImportError as missing:
        if os.environ.get("MOESERVE_REQUIRE_NATIVE", "") not in ("", "0"):
            raise ConfigError(
                f"MOESERVE_REQUIRE_NATIVE is set, but there is no native half ({missing}): {REMEDY}"
            ) from missing
        logging.getLogger(__name__).warning(
            "no native kernels (%s): plain torch takes their place, much slower; %s",
            missing,
            REMEDY,
        )
        return ReferenceOps()
    if threads is not None:
        _cpu.set_threads(threads)
    return CpuOps()
