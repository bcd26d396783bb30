"""Where a model's name leads: ``demo`` is the one we ship, everything else is a folder."""

from __future__ import annotations

from pathlib import Path

import moeserve
from moeserve.errors import CheckpointError

DEMO = "demo"


def resolve_model(name_or_path: str) -> Path:
    """The model's folder; an error where there is none."""
    if name_or_path == DEMO:
        # importlib.resources shows an editable install as two folders; the data is beside this one.
        folder = Path(str(moeserve.__file__)).parent / "demo"
        if not folder.is_dir():
            raise CheckpointError(f"model {DEMO!r}: {folder} is missing; install moeserve again")
        return folder
    folder = Path(name_or_path)
    if not name_or_path or "\0" in name_or_path or not folder.is_dir():
        raise CheckpointError(
            f"model {name_or_path!r}: no such folder; give {DEMO!r} or the path of a model folder"
        )
    return folder
