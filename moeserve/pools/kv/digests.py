"""What a run of KV is known by: a digest over where it belongs and its bytes.

XXH3-128 over a head (geometry of the layer, 32 bytes; model, scope and all tokens from the first to
the last of the run, 32 bytes; layer, first position and count: ``<IQQ``) and the bytes. So what was
meant for another model, tenant, prompt, layer or place does not pass, nor do changed bytes. It is
made when the bytes leave a cache, stays with them, and is checked before they enter another:
against faults, not against a member that lies, for members trust one another
(``comm.control.rpc``).

The number of positions of a block is no part of it, nor are the runs before: members of different
block sizes make equal digests of equal runs.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from moeserve.core import CacheScope
from moeserve.engine.blocks import root_key
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import DIGEST_BYTES as DIGEST_BYTES

Data: TypeAlias = bytes | bytearray | memoryview

_PLACE = struct.Struct("<IQQ")
HEAD_BYTES = 32 + 32 + _PLACE.size


def geometry_of(layouts: Sequence[KvBlockLayout]) -> bytes:
    """The same for caches between which runs can go."""
    return sha256("\n".join(map(_describe, layouts)).encode()).digest()


def _describe(layout: KvBlockLayout) -> str:
    sizes = f"{layout.kv_heads} {layout.head_size} {layout.value_size}"
    return f"{layout.dtype} {sizes} {'latent' if layout.latent else 'pairs'}"


class RunDigests:
    """Digests of the runs of one sequence, whose tokens may grow. For one thread at a time.

    ``compute_id`` is as in ``members.ServedTerms``.
    """

    def __init__(
        self,
        compute_id: str,
        layouts: Sequence[KvBlockLayout],
        scope: CacheScope,
        token_ids: Sequence[int],
    ) -> None:
        name = compute_id.encode()
        root = sha256(b"moeserve.kv.run.v1" + root_key(scope))
        root.update(len(name).to_bytes(8, "little") + name)
        self._root = root
        geometry = b"".join(sha256(_describe(layout).encode()).digest() for layout in layouts)
        self._geometry = np.frombuffer(geometry, np.uint8).reshape(-1, 32)
        self._tokens = array("q", token_ids)
        self._chain, self._hashed = root.copy(), 0
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Of the tokens."""
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tokens.extend(token_ids)

    def of(self, layer: int, start: int, count: int, data: Data) -> bytes:
        """16 bytes. The positions have tokens, and ``layer`` a layout."""
        place = self._key(start + count) + _PLACE.pack(layer, start, count)
        found = xxhash.xxh3_128(self._geometry[layer].tobytes() + place)
        found.update(data)
        return found.digest()

    def heads(
        self, layers: Sequence[int], starts: Sequence[int], counts: Sequence[int]
    ) -> NDArray[np.uint8]:
        """uint8 [L, R, ``HEAD_BYTES``]: what comes before the bytes of a run of each layer, start
        and count."""
        keys = b"".join(self._key(s + n) for s, n in zip(starts, counts, strict=True))
        place = np.array([starts, counts], "<u8").T.copy().view(np.uint8)
        found = np.empty((len(layers), len(starts), HEAD_BYTES), np.uint8)
        found[:, :, :32] = self._geometry[layers, None]
        found[:, :, 32:64] = np.frombuffer(keys, np.uint8).reshape(-1, 32)
        found[:, :, 64:68] = np.array(layers, "<u4")[:, None].view(np.uint8)[:, None]
        found[:, :, 68:] = place
        return found

    def _key(self, end: int) -> bytes:
        """Of model, scope and the first ``end`` tokens."""
        key = self._keys.get(end)
        if key is None:
            assert end <= len(self._tokens), f"position {end - 1} of {len(self._tokens)} tokens"
            if end < self._hashed:
                self._chain, self._hashed = self._root.copy(), 0
            self._chain.update(self._tokens[self._hashed : end].tobytes())
            self._hashed = end
            key = self._keys[end] = self._chain.digest()
        return key
