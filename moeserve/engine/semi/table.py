"""The op table of either process: native kernels, over KV that both have."""

from __future__ import annotations

import torch

from moeserve.errors import ConfigError
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import cpu_ops
from moeserve.kernels.shared_memory import SharedMemory


def shared_table(threads: int | None, memory: SharedMemory) -> Ops:
    """KV is taken from ``memory``. ConfigError where there are no native kernels."""
    table = cpu_ops(threads, memory.take)
    if table.name == ReferenceOps.name:
        raise ConfigError(
            "split=semi: two processes share KV by native kernels, and there are none: build "
            "them, or leave --split out"
        )
    torch.set_num_threads(1)  # the native pool has the cores
    return table
