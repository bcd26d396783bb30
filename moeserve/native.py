"""The native halves of the package, found in one way, with one rule for a missing one.

A package that was built without a C++ compiler has none, and torch or numpy twins do the work.
``MOESERVE_REQUIRE_NATIVE``, set to anything but the empty string or 0, makes a missing native half
an error wherever it would be used.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from moeserve.errors import ConfigError, MoeserveError

REQUIRE_NATIVE = "MOESERVE_REQUIRE_NATIVE"
REMEDY = "build it with `pip install .`, which needs a C++17 compiler"


def required() -> bool:
    """Whether the environment makes a missing native half an error."""
    return os.environ.get(REQUIRE_NATIVE, "") not in ("", "0")


def find_native(name: str) -> tuple[ModuleType | None, str]:
    """The module of that full name, and ""; or None, and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except ImportError as missing:
        return None, f"{name} is not built ({missing}): {REMEDY}"


def native_module(
    name: str, error: type[MoeserveError] = ConfigError
) -> tuple[ModuleType | None, str]:
    """As ``find_native``; raises ``error`` where the module is missing and required."""
    module, reason = find_native(name)
    if module is None and required():
        raise error(f"{REQUIRE_NATIVE} is set, but {reason}")
    return module, reason
