"""Reading files of others within bounds: what a file may hold, and what reading it may take.

A file can say that it holds more than it does, and a few compressed bytes can stand for gigabytes.
So sizes are compared with these bounds before anything is allocated, and only regular files are
opened: a pipe or a device may never end. Whatever is wrong is a PlacementError that names the file.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from moeserve.errors import PlacementError
from moeserve.regular_file import open_regular

# Of a model: more than any has. Solvers keep tables of experts by experts.
MOST_EXPERTS = 4096
MOST_LAYERS = 1024
MOST_SLOTS = 1 << 16
# Devices of a cluster; a guide has a byte for each, of every expert of every layer.
MOST_DEVICES = 1 << 16
# Text, of which every byte may become some twenty in memory.
MOST_TEXT_BYTES = 128 << 20
# A plan is read while serving.
MOST_PLAN_BYTES = 32 << 20
# What the arrays of a file may take: this, or so many times the file. Expert ids compress to a
# tenth at most.
LEAST_BUDGET_BYTES = 64 << 20
BUDGET_PER_BYTE = 20

_LONGEST_REASON = 300

# What code that takes such documents apart may meet.
MALFORMED = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


class MemoryBudget:
    """What may still be allocated for the content of a file."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path = path
        self._most = self._left = max(LEAST_BUDGET_BYTES, BUDGET_PER_BYTE * file_bytes)

    def charge(self, nbytes: int, what: str) -> None:
        """Before the bytes are allocated; PlacementError where they are too many."""
        if nbytes > self._left:
            raise PlacementError(
                f"{self._path}: {what} would take {shown(nbytes)} bytes, {self._left} are left of "
                f"the {self._most} that a file of this size may take: split the recording, or "
                "store it without compression"
            )
        self._left -= nbytes


def require_regular(path: Path) -> int:
    """Bytes of the file; PlacementError where it is none that ends."""
    try:
        found = path.stat()
    except (OSError, ValueError) as cause:
        raise PlacementError(f"cannot read {path}: {reason(cause)}") from cause
    if not stat.S_ISREG(found.st_mode):
        raise PlacementError(f"cannot read {path}: it is no regular file")
    return found.st_size


def read_text(path: Path, most: int = MOST_TEXT_BYTES) -> str:
    """All of a file of UTF-8 text."""
    require_regular(path)
    try:
        # Looked at again: it may be a pipe since, which must not be waited for.
        file = open_regular(path)
        if file is None:
            raise PlacementError(f"cannot read {path}: it is no regular file")
        with file:
            content = file.read(most + 1)
    except OSError as cause:
        raise PlacementError(f"cannot read {path}: {reason(cause)}") from cause
    if len(content) > most:
        raise PlacementError(f"{path} has more than {most} bytes: split it")
    try:
        return content.decode()
    except UnicodeDecodeError as cause:
        raise PlacementError(f"{path} is not JSON, or not in UTF-8: {reason(cause)}") from cause


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> Any:
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise PlacementError(f"{path} is not JSON: {reason(cause)}") from cause


def require_size(what: str, layers: int, experts: int) -> None:
    """PlacementError where no model has so many."""
    if layers > MOST_LAYERS or experts > MOST_EXPERTS:
        raise PlacementError(
            f"{what}: {shown(layers)} layers of {shown(experts)} experts; at most {MOST_LAYERS} of "
            f"{MOST_EXPERTS} are planned for"
        )


def whole_number(value: Any, what: str, least: int, most: int) -> int:
    """An integer within bounds; PlacementError names what else came."""
    if type(value) is not int or not least <= value <= most:
        kind = "a positive whole number" if least == 1 else f"a whole number from {least}"
        raise PlacementError(f"{what}={shown(value)}: must be {kind}, at most {most}")
    return value


def shown(value: object) -> str:
    """Short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def reason(cause: Exception) -> str:
    """What an error says, cut short: it may repeat what the file holds."""
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
