"""Where a model's name leads: ``demo`` is the one we ship, everything else is a folder, or the name
of a model on the hub, which the commands that run models fetch (``with_model_here``)."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import moeserve
from moeserve.config.options import ModelOptions
from moeserve.errors import CheckpointError
from moeserve.models.hub import by_hand, fetch_model, is_hub_id

DEMO = "demo"
Chosen = TypeVar("Chosen", bound=ModelOptions)


def resolve_model(name_or_path: str) -> Path:
    """The model's folder; an error where there is none."""
    if name_or_path == DEMO:
        # importlib.resources shows an editable install as two folders; the data is beside this one.
        folder = Path(str(moeserve.__file__)).parent / "demo"
        if not folder.is_dir():
            raise CheckpointError(f"model {DEMO!r}: {folder} is missing; install moeserve again")
        return folder
    if is_hub_id(name_or_path):
        raise CheckpointError(f"model {name_or_path!r}: no such folder; {by_hand(name_or_path)}")
    folder = Path(name_or_path)
    if not name_or_path or "\0" in name_or_path or not folder.is_dir():
        raise CheckpointError(
            f"model {name_or_path!r}: no such folder; give {DEMO!r} or the path of a model folder"
        )
    return folder


def with_model_here(options: Chosen) -> Chosen:
    """The options with a folder for a model that was named as on the hub: it is fetched, and keeps
    its name for clients."""
    if not is_hub_id(options.model):
        return options
    name = options.served_model_name or options.model
    folder = str(fetch_model(options.model))
    return options.model_copy(update={"model": folder, "served_model_name": name})
