"""The groups that libraries move bytes by, made from the notes of the start.

DeepEP wants a group of torch.distributed, over which it exchanges handles of memory when its buffer
is opened. The operators of NPUs want the name of a group of HCCL, which nothing else uses.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.media import LEFT_ALONE_S, leave_unwatched, process_groups
from moeserve.comm.group import Group
from moeserve.errors import ConfigError, first_line

T = TypeVar("T")


def nccl_group(group: Group) -> Any:
    """Collective over all of the run. ConfigError where torch cannot make one."""
    leave_unwatched("nccl")
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
    leave_unwatched("hccl")

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


def _in_one_line(name: str, made: Callable[[], T]) -> T:
    try:
        return made()
    except (RuntimeError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"no group of {name} can be made: {first_line(error)}; {name}_DEBUG=INFO says more, "
            "and without --dispatcher none is wanted"
        ) from error
