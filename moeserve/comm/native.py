"""The native half of this folder, or why there is none."""

from __future__ import annotations

from types import ModuleType


def native_half() -> tuple[ModuleType | None, str]:
    """Or the reason; a package that was built without a compiler has none."""
    try:
        from moeserve.comm import _comm
    except ImportError as missing:
        return None, (
            f"moeserve was built without its native half ({missing}): build it with "
            "`pip install .`, which needs a C++17 compiler"
        )
    return _comm, ""
