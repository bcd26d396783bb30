"""The native half of this folder (``offload/*.cc``), or why there is none."""

from __future__ import annotations

from types import ModuleType

from moeserve.native import native_module


def native_half() -> tuple[ModuleType | None, str]:
    """The module and "", or None and the reason. ConfigError where it is missing and required."""
    return native_module("moeserve.offload._mover")
