"""Choose the op table of a device, once, when an engine starts.

The native half may be missing where the package was not built: plain torch then does its work,
much slower, and the log says so. With ``MOESERVE_REQUIRE_NATIVE=1`` that is an error instead.
"""

from __future__ import annotations

import logging

import torch

from moeserve.errors import ConfigError
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.native import native_module


def choose_ops(device: str | torch.device = "cpu", threads: int | None = None) -> Ops:
    """The backend of a device, which is then its ``device``.

    ``threads`` None leaves the number as it is: all cores this process may use. ConfigError where
    no backend serves the device.
    """
    if str(device) != "cpu":
        raise ConfigError(f"device={str(device)!r}: expected 'cpu'")
    native, reason = native_module("moeserve.kernels.cpu.ops")
    if native is None:
        logging.getLogger(__name__).warning(
            "no native kernels: plain torch takes their place, much slower; %s", reason
        )
        return ReferenceOps()
    from moeserve.kernels.cpu import _cpu
    from moeserve.kernels.cpu.ops import CpuOps

    if threads is not None:
        _cpu.set_threads(threads)
    return CpuOps()
