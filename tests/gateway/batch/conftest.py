"""Batches: their lines, and a disk that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Lines = Callable[..., Path]


@pytest.fixture
def batch_of(tmp_path: Path) -> Lines:
    """A file of lines."""

    def write(*lines: str | bytes, name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        raw = [one if isinstance(one, bytes) else one.encode() for one in lines]
        path.write_bytes(b"".join(one + b"\n" for one in raw))
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "batch-test", str(place)]
    if os.getuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
