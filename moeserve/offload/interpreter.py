"""Whether the interpreter itself fits, asked before its libraries are imported. Standard library.

A process under a limit of the kernel that is too small for that would be killed while it imports
them, before anything could say so.
"""

from __future__ import annotations

from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.host import read_memory

# What interpreter, torch and ours take before any weights, without the pages of files.
LEAST = 208 << 20


def require_interpreter(memory: int | None, root: Path = Path("/")) -> None:
    """ConfigError where a budget is given and a limit on this process leaves less than ``LEAST``.
    What a model needs beyond it is said when its sizes are known."""
    if memory is None:
        return
    found = read_memory(root)
    if found.limit is not None and min(found.limit, found.available) < LEAST:
        least, room = (f"{size / (1 << 20):.1f}MiB" for size in (LEAST, found.available))
        raise ConfigError(
            f"memory={memory}: {room} are left under this process's limit of {found.limit} bytes, "
            f"and the interpreter with its libraries takes {least} before any weights: give more; "
            f"`moeserve doctor --model MODEL` says what a model needs"
        )
