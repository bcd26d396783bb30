"""Is it the same checkpoint? Judged by what is cheap to read: small files whole, weight files by
their size and header. Values of weights are not compared, but for the few that are ``sampled``.

A packed folder is the same checkpoint as the one it was made from, and says what that was.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import INDEX, weight_files
from moeserve.models.files import open_regular, read_bounded
from moeserve.models.packed.layout import Origin, is_packed, read_packed_header
from moeserve.safetensors_header import read_header

SAMPLED = 512
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
        if is_packed(folder):
            return digests | read_packed_header(folder).origin.fingerprint
        return digests | {
            file.name: _digest_of(file, _header(file)) for file in weight_files(folder)
        }
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def served_files(folder: Path) -> list[Path]:
    """The weight files of a folder of either kind."""
    if is_packed(folder):
        return [folder / name for name in read_packed_header(folder).files]
    return weight_files(folder)


def samples(folder: Path) -> dict[str, str]:
    """By weight file: a digest of its header and of bytes in the middle of each of its tensors.
    OSError where one cannot be opened."""
    if is_packed(folder):
        return read_packed_header(folder).origin.samples
    files = sorted(weight_files(folder), key=lambda file: file.name)
    return {file.name: _sampled(file).hex() for file in files}


def origin_of(folder: Path) -> Origin:
    """What a packed copy has to remember of a model folder's weight files."""
    kept = {INDEX, *(file.name for file in weight_files(folder))}
    found = {name: digest for name, digest in fingerprint(folder).items() if name in kept}
    try:
        return Origin(found, samples(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def _digest_of(file: Path, content: bytes) -> str:
    return f"{file.stat().st_size} bytes, digest {sha256(content).hexdigest()[:16]}"


def _header(file: Path) -> bytes:
    try:
        with open_regular(file) as opened:
            return read_header(opened)
    except ValueError as error:
        raise CheckpointError(f"{file}: not safetensors ({error}); download it again") from error


def _sampled(file: Path) -> bytes:
    """The header of a file, and bytes of each of its tensors."""
    with open_regular(file) as opened:
        try:
            header = read_header(opened)
            begin = opened.tell()
            places = [
                found["data_offsets"]
                for name, found in json.loads(header).items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: not safetensors ({error}): download it again"
            ) from error
        digest = sha256(header)
        for start, end in sorted(places):
            opened.seek(begin + max(start, (start + end - SAMPLED) // 2))
            digest.update(opened.read(min(SAMPLED, end - start)))
    return digest.digest()
