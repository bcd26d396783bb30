"""Where a model's name leads: ``demo`` is the one we ship, everything else is a folder or a GGUF
file, or the name of a model on the hub, which the commands that run models fetch
(``with_model_here``)."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import moeserve
from moeserve.config.options import ModelOptions
from moeserve.errors import CheckpointError
from moeserve.models.gguf.places import gguf_of
from moeserve.models.hub import by_hand, fetch_model, is_hub_id

DEMO = "demo"
Chosen = TypeVar("Chosen", bound=ModelOptions)


def resolve_model(name_or_path: str) -> Path:
    """The model's folder, or the first file of one in GGUF; an error where there is none."""
    if name_or_path == DEMO:
        # importlib.resources shows an editable install as two folders; the data is beside this one.
        folder = Path(str(moeserve.__file__)).parent / "demo"
        if not folder.is_dir():
            raise CheckpointError(f"model {DEMO!r}: {folder} is missing; install moeserve again")
        return folder
    if is_hub_id(name_or_path):
        raise CheckpointError(f"model {name_or_path!r}: no such folder; {by_hand(name_or_path)}")
    folder = Path(name_or_path)
    named = bool(name_or_path) and "\0" not in name_or_path
    file = gguf_of(folder) if named else None
    if file is not None and (file.exists() or folder.exists()):
        return file
    if not named or not folder.is_dir():
        raise CheckpointError(
            f"model {name_or_path!r}: no such folder; give {DEMO!r} or the path of a model folder "
            f"or a GGUF file"
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
