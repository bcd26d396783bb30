"""Files of a model folder, which is a stranger's: only regular ones are opened, and no more of one
is read than its bound.

A FIFO, a device or a folder in a file's place is refused without waiting for it; links are
followed, as the hub's cache is made of them. Every failure is a CheckpointError that names the
file and what to do. Standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from moeserve import regular_file
from moeserve.errors import CheckpointError

_MIB = 1 << 20
# By the end of a file's name: several times what the largest published models have.
_MOST_BYTES = {
    "config.json": 8 * _MIB,
    "tokenizer.json": 128 * _MIB,
    ".index.json": 48 * _MIB,
    ".jinja": 1 * _MIB,
}
_MOST_OTHERS = 8 * _MIB
# A value may take a hundred times the bytes that spell it. The largest index has 200 thousand.
MOST_VALUES = 1 << 20
_MARKS = (b",", b"[", b"{")


def open_regular(file: Path) -> BinaryIO:
    """The file, to be read. OSError, or CheckpointError where it is no regular file."""
    opened = regular_file.open_regular(file)
    if opened is None:
        raise CheckpointError(f"{file}: not a regular file; put the model's own file there")
    return opened


def most_bytes(file: Path) -> int:
    """What a small file of a model folder may have."""
    return next((n for end, n in _MOST_BYTES.items() if file.name.endswith(end)), _MOST_OTHERS)


def read_bounded(file: Path) -> bytes:
    """A small file whole. OSError where it cannot be opened, CheckpointError where it may not."""
    most = most_bytes(file)
    with open_regular(file) as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise CheckpointError(
            f"{file}: longer than {most >> 20} MiB, which no model needs; download it again"
        )
    return content


def read_text(file: Path) -> str:
    """A small file as UTF-8; every failure is a CheckpointError."""
    try:
        return read_bounded(file).decode("utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def read_json(file: Path, *, required: bool) -> dict[str, Any]:
    """The JSON object in a file; empty where an optional one is absent."""
    try:
        content = read_bounded(file)
        if sum(map(content.count, _MARKS)) > MOST_VALUES:
            raise CheckpointError(
                f"{file}: more than {MOST_VALUES} values, which no model needs; download it again"
            )
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(f"{file}: missing; every model folder has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value
