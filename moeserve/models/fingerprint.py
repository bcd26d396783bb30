"""Is it the same checkpoint? Judged by what is cheap to read: small files whole, weight files by
their size and header. Values of weights are not compared.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import INDEX, weight_files
from moeserve.models.files import open_regular, read_bounded
from moeserve.models.gguf.places import gguf_of, header_bytes
from moeserve.safetensors_header import read_header

_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    INDEX,
)


def fingerprint(folder: Path) -> dict[str, str]:
    """By file name: size and digest."""
    try:
        small = [folder / name for name in _SMALL if (folder / name).is_file()]
        digests = {file.name: _digest_of(file, read_bounded(file)) for file in small}
        return digests | {
            file.name: _digest_of(file, _header(file)) for file in weight_files(folder)
        }
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def _digest_of(file: Path, content: bytes) -> str:
    return f"{file.stat().st_size} bytes, digest {sha256(content).hexdigest()[:16]}"


def _header(file: Path) -> bytes:
    if gguf_of(file) is not None:
        return header_bytes(file)
    try:
        with open_regular(file) as opened:
            return read_header(opened)
    except ValueError as error:
        raise CheckpointError(f"{file}: not safetensors ({error}); download it again") from error
