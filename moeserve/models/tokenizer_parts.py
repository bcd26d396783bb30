"""What a tokenizer is made of, wherever it is from: a model folder, or a GGUF file.

Standard library only: processes read it that have neither torch nor numpy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeserve.errors import CheckpointError, TokenizerError
from moeserve.models.fields import Fields
from moeserve.models.files import read_json, read_text
from moeserve.models.gguf.places import gguf_of
from moeserve.models.gguf.tokenizer import gguf_tokenizer

REMEDY = "prompts as token ids still work"


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """``source`` as a ``tokenizer.json`` has it, ``settings`` as a ``tokenizer_config.json``;
    ``file`` is what errors name, ``eos_ids`` the end tokens that the model names."""

    file: Path
    source: str
    settings: Mapping[str, Any]
    eos_ids: tuple[int, ...]


def tokenizer_file(path: Path) -> Path | None:
    """In which a model folder, or a GGUF file, has a tokenizer; None where there is none."""
    file = gguf_of(path) or path / "tokenizer.json"
    return file if file.is_file() else None


def tokenizer_source(file: Path) -> str:
    """What such a file has, as a ``tokenizer.json``. TokenizerError, CheckpointError."""
    return read_text(file) if gguf_of(file) is None else read_tokenizer_parts(file).source


def read_tokenizer_parts(path: Path) -> TokenizerParts:
    """Of a model folder, or of a GGUF file: the ``tokenizer.json`` beside it where what it has is
    not known to us. TokenizerError says what is wrong, and what to do."""
    try:
        file = gguf_of(path)
    except CheckpointError as error:
        raise TokenizerError(f"{error.message}; {REMEDY}") from error
    if file is None:
        return _of_folder(path)
    try:
        return TokenizerParts(file, *gguf_tokenizer(file))
    except TokenizerError:
        if not (file.parent / "tokenizer.json").is_file():
            raise
        return _of_folder(file.parent)


def write_tokenizer(path: Path, folder: Path) -> None:
    """As files of a folder; one that cannot be read is left out, and said. OSError."""
    try:
        parts = read_tokenizer_parts(path)
    except TokenizerError as error:
        logging.getLogger("moeserve.models").warning("%s", error.message)
        return
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **parts.settings}
    (folder / "tokenizer.json").write_text(parts.source, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _of_folder(folder: Path) -> TokenizerParts:
    file = folder / "tokenizer.json"
    try:
        source = read_text(file)
        settings = read_json(folder / "tokenizer_config.json", required=False)
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            config = read_json(folder / name, required=False)
            ids.extend(Fields(config, str(folder / name)).ids("eos_token_id"))
    except CheckpointError as error:
        raise TokenizerError(f"{error.message}; {REMEDY}") from error
    return TokenizerParts(file, source, settings, tuple(dict.fromkeys(ids)))
