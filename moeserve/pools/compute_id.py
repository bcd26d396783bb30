"""Which members compute the same bits: a digest of the checkpoint and of what changes numbers.

KV goes between members of equal ids only, so the id must differ wherever the KV of equal tokens
might: by the configuration, the weights, how they and the KV are held in memory, how experts'
results are added, and the kernels. Not by ranks, placement, threads or block size, which change no
number (law 1). Weights are not read whole: every file's header is, which has the name, type and
place of each tensor, and some bytes in the middle of every tensor (``models.fingerprint``). A
checkpoint that was trained further differs in all of them. A packed folder has the id of what it
was made from, loaded as it was packed.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError
from moeserve.models.files import read_bounded
from moeserve.models.fingerprint import samples
from moeserve.models.gguf.places import gguf_of
from moeserve.models.packed.checkpoint import packed_options

# Small files on which numbers depend.
_READ_WHOLE = ("config.json",)


def compute_id(folder: Path, options: LoadOptions, kernels: str) -> str:
    """``kernels`` names the op table and what it was made for. CheckpointError where the folder
    cannot be read."""
    digest = sha256(b"moeserve compute v1")
    options = packed_options(folder, options)
    settings = {name: getattr(options, name) for name in LoadOptions.model_fields}
    parts = [json.dumps(settings, sort_keys=True).encode(), kernels.encode()]
    try:
        if gguf_of(folder) is None:  # which has no others: what they say stands in its header
            parts += [read_bounded(folder / name) for name in _READ_WHOLE]
        for name, sampled in samples(folder).items():
            parts += [name.encode(), bytes.fromhex(sampled)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]
