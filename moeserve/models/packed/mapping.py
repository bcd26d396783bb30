"""A file as memory: shared with all who map it, and nobody can write to it.

Tensors of it keep the map. A file that is truncated while it is mapped ends the process that then
reads beyond its end (SIGBUS), as with any map: whoever cannot have that reads (``pread``).
"""

from __future__ import annotations

import ctypes
import mmap
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


def map_shared(opened: BinaryIO) -> Tensor:
    """uint8, all of the file. OSError or ValueError where it cannot be mapped."""
    mapping = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    # torch takes only what it may write to, and warns of anything else; nobody does.
    held = (ctypes.c_uint8 * len(mapping)).from_address(address)
    held.owner = mapping  # type: ignore[attr-defined]
    return torch.frombuffer(held, dtype=torch.uint8)
