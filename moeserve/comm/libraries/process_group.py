"""The groups that libraries move bytes by, made from the notes of the start.

DeepEP wants a group of torch.distributed, over which it exchanges handles of memory when its buffer
is opened. The operators of NPUs want the name of a group of HCCL, which nothing else uses. Threads
of torch that watch such groups would end the process when a rank is late: they are switched off,
for our heartbeats find that out sooner and say who it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.media import process_groups
from moeserve.comm.group import Group
from moeserve.errors import ConfigError

T = TypeVar("T")
# What nobody waits for any more ends after it.
LEFT_ALONE_S = 600.0


def nccl_group(group: Group) -> Any:
    """Collective over all of the run. ConfigError where torch cannot make one."""
    _unwatched("NCCL")
    bound = timedelta(seconds=LEFT_ALONE_S)

    def made() -> Any:
        if dist.is_initialized():
            return dist.new_group(backend="nccl", timeout=bound)
        store = PrefixStore("deep_ep", group.store)
        dist.init_process_group(
            "nccl", store=store, rank=group.rank, world_size=group.world, timeout=bound
        )
        return dist.group.WORLD

    return _in_one_line("NCCL", made)


def hccl_group(group: Group) -> tuple[str, Any]:
    """HCCL's name of a new group of all of the run, and what it lasts as long as; collective.
    ConfigError where torch_npu cannot make one."""
    _unwatched("HCCL")

    def made() -> tuple[str, Any]:
        of = process_groups("npu")
        if of is None:
            raise RuntimeError("torch_npu has no process groups of it")
        options = of.Options()
        options._timeout = timedelta(seconds=LEFT_ALONE_S)
        store = PrefixStore("moe_distribute", group.store)
        opened = of(store, group.rank, group.world, options)
        return str(opened.get_hccl_comm_name(group.rank)), opened

    return _in_one_line("HCCL", made)


def _unwatched(name: str) -> None:
    for variable in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING"):
        os.environ.setdefault(f"TORCH_{name}_{variable}", "0")


def _in_one_line(name: str, made: Callable[[], T]) -> T:
    try:
        return made()
    except (RuntimeError, ValueError, ImportError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"no group of {name} can be made: {first}; {name}_DEBUG=INFO says more, and without "
            "--dispatcher none is wanted"
        ) from error
