"""Which members compute the same bits: a digest of the checkpoint and of what changes numbers.

KV goes between members of equal ids only, so the id must differ wherever the KV of equal tokens
might: by the configuration, the weights, how they and the KV are held in memory, how experts'
results are added, and the kernels. Not by ranks, placement, threads or block size, which change no
number (law 1). Weights are not read whole: every file's header is, which has the name, type and
place of each tensor, and ``SAMPLED`` bytes in the middle of every tensor. A checkpoint that was
trained further differs in all of them.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import weight_files
from moeserve.models.files import open_regular, read_bounded
from moeserve.models.gguf.header import read_gguf_header
from moeserve.models.gguf.places import gguf_of, header_bytes
from moeserve.safetensors_header import read_header

SAMPLED = 512
# Small files on which numbers depend.
_READ_WHOLE = ("config.json",)


def compute_id(folder: Path, options: LoadOptions, kernels: str) -> str:
    """``kernels`` names the op table and what it was made for. CheckpointError where the folder
    cannot be read."""
    digest = sha256(b"moeserve compute v1")
    settings = {name: getattr(options, name) for name in LoadOptions.model_fields}
    parts = [json.dumps(settings, sort_keys=True).encode(), kernels.encode()]
    try:
        if gguf_of(folder) is None:  # which has no others: what they say stands in its header
            parts += [read_bounded(folder / name) for name in _READ_WHOLE]
        for file in sorted(weight_files(folder), key=lambda file: file.name):
            parts += [file.name.encode(), _sampled(file)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _sampled(file: Path) -> bytes:
    """The header of a file, and bytes of each of its tensors."""
    header, places = _tensors_of(file)
    digest = sha256(header)
    with open_regular(file) as opened:
        for start, end in sorted(places):
            opened.seek(max(start, (start + end - SAMPLED) // 2))
            digest.update(opened.read(min(SAMPLED, end - start)))
    return digest.digest()


def _tensors_of(file: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a file, and from where to where each of its tensors lies."""
    if gguf_of(file) is not None:
        tensors = read_gguf_header(file).tensors.values()
        return header_bytes(file), [(tensor.start, tensor.end) for tensor in tensors]
    with open_regular(file) as opened:
        try:
            header = read_header(opened)
            begin = opened.tell()
            places = [
                found["data_offsets"]
                for name, found in json.loads(header).items()
                if name != "__metadata__"
            ]
            return header, [(begin + start, begin + end) for start, end in places]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: not safetensors ({error}): download it again"
            ) from error
