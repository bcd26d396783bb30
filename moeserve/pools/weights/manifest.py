"""What a checkpoint consists of: its files, and chunks of them that have names of their own.

A chunk is ``CHUNK_BYTES`` of one file, the last of a file less. It travels and is kept as a page of
the cache pool is (``pools.cache.pages``): under a key, a digest of the checkpoint's id, the file
and the place in it, and behind a digest of key and bytes. The id is a digest of all small files, of
each weight file's size and header, and of bytes in the middle of every tensor (``compute_id``):
checkpoints of equal ids are the same.

Only regular files right in the folder count, which a model needs: weights in safetensors or packed,
JSON, templates and tokenizers; no code, and no pickles. A manifest that comes from elsewhere is not
believed: names cannot leave a folder, numbers and sizes have bounds (InvalidRequestError).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, InvalidRequestError
from moeserve.models.files import most_bytes
from moeserve.models.fingerprint import fingerprint, served_files
from moeserve.models.packed.layout import PACKED_FILE
from moeserve.pools.cache.keys import NAMESPACE_BYTES, Namespace, PageKey
from moeserve.pools.cache.pages import StoredPage, digest_of
from moeserve.pools.compute_id import compute_id

CHUNK_BYTES = 4 << 20
MOST_FILES = 4096
MOST_BYTES = 1 << 43
MOST_MANIFEST_BYTES = 1 << 20
_WEIGHTS = ".safetensors"
_SMALL = (".json", ".jinja", ".model", ".txt")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_ID = re.compile(r"[0-9a-f]{64}")
_MOST_TEXT = 1024
NAMESPACE = Namespace(sha256(b"moeserve.weights.v1").digest()[:NAMESPACE_BYTES])


@dataclass(frozen=True, slots=True)
class WeightFile:
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightChunk:
    """``nbytes`` of ``file`` from ``start`` on."""

    key: PageKey
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """``name`` is what clients call the model, ``folder`` where whoever made this has it."""

    id: str
    name: str
    folder: str
    files: tuple[WeightFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def chunks(self) -> Iterator[WeightChunk]:
        """Of all files, each from its beginning on."""
        for file in self.files:
            for start in range(0, file.nbytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, file.nbytes - start)
                yield WeightChunk(_chunk_key(self.id, file.name, start), file.name, start, nbytes)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def offer_key(name: str) -> PageKey:
    """Under which a manifest is asked for; an empty name means whatever model one has."""
    return PageKey(sha256(b"moeserve.weights.offer.v1" + name.encode()).digest())


def manifest_of(folder: Path, name: str) -> Manifest:
    """Reads headers and some bytes of all tensors. CheckpointError where it is no model folder."""
    weights = {file.name for file in served_files(folder)}
    try:
        found = sorted(file for file in folder.iterdir() if _belongs(file, weights))
        files = tuple(WeightFile(file.name, file.stat().st_size) for file in found)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    if not 0 < len(files) <= MOST_FILES:
        raise CheckpointError(f"{folder}: {len(files)} files: expected 1 to {MOST_FILES}")
    named = {file.name: file.nbytes for file in files}
    parts = (compute_id(folder, LoadOptions(), "files"), fingerprint(folder), named)
    digest = sha256(json.dumps(parts, sort_keys=True).encode())
    for file in files:
        if file.name not in weights:
            digest.update((folder / file.name).read_bytes())
    return Manifest(digest.hexdigest(), name, str(folder.resolve()), files)


def read_manifest(content: bytes) -> Manifest:
    """What ``Manifest.to_json`` wrote, perhaps somewhere else."""
    if len(content) > MOST_MANIFEST_BYTES:
        raise InvalidRequestError(f"a manifest of {len(content)} bytes is too long")
    try:
        found: Any = json.loads(content)
        files = tuple(WeightFile(file["name"], file["nbytes"]) for file in found["files"])
        manifest = Manifest(found["id"], found["name"], found["folder"], files)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequestError(f"this is no manifest of a model: {error!r}") from error
    _check(manifest)
    return manifest


def sealed(key: PageKey, body: bytes) -> StoredPage:
    """Bytes that travel under this key."""
    return StoredPage(key, NAMESPACE, digest_of(key, NAMESPACE, body), body)


def _check(manifest: Manifest) -> None:
    texts = (manifest.id, manifest.name, manifest.folder)
    if not all(isinstance(text, str) and len(text) <= _MOST_TEXT for text in texts):
        raise InvalidRequestError("a manifest whose id, name or folder is no text, or too long")
    if not _ID.fullmatch(manifest.id):
        raise InvalidRequestError(f"a manifest's id is {manifest.id[:80]!r}: expected 64 digits")
    names = [file.name for file in manifest.files]
    if not 0 < len(names) <= MOST_FILES or len(set(map(str, names))) < len(names):
        raise InvalidRequestError(f"{len(names)} files, or one twice: expected 1 to {MOST_FILES}")
    for file in manifest.files:
        _check_file(file)
    if manifest.nbytes > MOST_BYTES:
        raise InvalidRequestError(f"a model of {manifest.nbytes} bytes: at most {MOST_BYTES}")


def _check_file(file: WeightFile) -> None:
    name, nbytes = file.name, file.nbytes
    good = isinstance(name, str) and _NAME.fullmatch(name)
    weights = good and (name.endswith(_WEIGHTS) or PACKED_FILE.fullmatch(name))
    if not weights and not (good and name.endswith(_SMALL)):
        raise InvalidRequestError(f"a file named {str(name)[:80]!r}: no name of a model's file")
    most = MOST_BYTES if weights else most_bytes(Path(name))
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or not 0 <= nbytes <= most:
        raise InvalidRequestError(f"{name} of {str(nbytes)[:80]} bytes: expected 0 to {most}")


def _belongs(file: Path, weights: set[str]) -> bool:
    if not _NAME.fullmatch(file.name) or not file.is_file():
        return False
    small = file.name.endswith(_SMALL) and file.stat().st_size <= most_bytes(file)
    return file.name in weights or small


def _chunk_key(model: str, file: str, start: int) -> PageKey:
    text = f"{model} {start} {file}".encode()
    return PageKey(sha256(b"moeserve.weights.chunk.v1" + text).digest())
