"""A model named as on the Hugging Face hub, ``org/name``: fetched into the hub's cache on disk.

Needs ``huggingface_hub`` (the extra ``hub``), which reads where the hub is and who asks from its
own variables (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Only weights in safetensors, JSON,
templates and tokenizers are fetched: no code, and no pickles. What lies in the cache whole is not
fetched again. Whatever fails is a CheckpointError that says how to get the model by hand.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

from moeserve.errors import CheckpointError

log = logging.getLogger("moeserve.hub")

FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*")
NOT_FETCHED = ("*.py", "*.bin", "*.pt", "*.pth", "*.gguf", "original/*", "onnx/*")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_id(name: str) -> bool:
    """Whether it looks like ``org/name`` and is neither a folder here nor the name of a file."""
    named = _ID.fullmatch(name) is not None and not name.endswith(".gguf")
    return named and not Path(name).exists()


def by_hand(name: str) -> str:
    """How to get it without us."""
    folder = name.rpartition("/")[2]
    return f"fetch it with `hf download {name} --local-dir {folder}` and give --model {folder}"


def fetch_model(name: str) -> Path:
    """The folder in the cache of a hub id; waits for the network."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"model {name!r}: no such folder; to fetch it from the model hub, install "
            f"'moeserve[hub]', or {by_hand(name)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("fetching %s from the model hub, where it is not in the cache", name)
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=list(FETCHED),
                ignore_patterns=list(NOT_FETCHED),
                library_name="moeserve",
            )
        )
    except Exception as error:  # the library raises what its transport does, and more
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model {name!r}: cannot be fetched from the model hub ({reason}); {by_hand(name)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model {name!r}: the hub has no config.json for it: it is no model in safetensors"
        )
    return folder
