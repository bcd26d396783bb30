"""Tensors that llama.cpp's converter has split or turned, put together again as a folder has them.

Each takes raw tensors of the file, as ``Read`` gives them: floats, or the bytes of rows of blocks.
Letters: A heads, N rows, L latent size, E experts, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.models.gguf.blocks import to_values
from moeserve.models.gguf.header import GgufTensor

Read = Callable[[GgufTensor], Tensor]
Make = Callable[[Read], Tensor]


def neighbours_apart(tensor: GgufTensor, heads: int) -> Make:
    """Rows of queries or keys, or their bias. The file has the two features of a rotated pair side
    by side; a folder has all first ones of a head, then all second ones."""

    def make(read: Read) -> Tensor:
        raw = read(tensor)
        pairs = raw.reshape(heads, -1, 2, *raw.shape[1:])
        return pairs.transpose(1, 2).reshape(raw.shape)

    return make


def latent_projection(keys: GgufTensor, values: GgufTensor) -> Make:
    """``kv_b_proj`` in fp32: under every head its keys [nope, L], turned, then its values."""

    def make(read: Read) -> Tensor:
        keys_ALK, values_AVL = _floats(keys, read(keys)), _floats(values, read(values))
        return torch.cat((keys_ALK.transpose(1, 2), values_AVL), 1).flatten(0, 1)

    return make


def alternating(gate: GgufTensor, up: GgufTensor) -> Make:
    """[E, 2 I] in fp32 of two [E, I]: gate and up in turn, as GPT-OSS has its biases."""

    def make(read: Read) -> Tensor:
        return torch.stack((read(gate).float(), read(up).float()), -1).flatten(1)

    return make


def _floats(tensor: GgufTensor, raw: Tensor) -> Tensor:
    if tensor.type.plain:
        return raw.float()
    flat = to_values(tensor.type.name, raw.flatten(0, -2))
    if not bool(flat.isfinite().all()):
        raise CheckpointError(f"tensor {tensor.name} holds a scale that is not finite")
    return flat.view(tensor.shape)
