"""The group of torch.distributed that a library moves bytes by, from the notes of the start."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from moeserve.comm.group import Group
from moeserve.errors import ConfigError


def process_group(backend: str, group: Group, key: str, timeout_s: float) -> Any:
    """Collective. ``backend`` is nccl or hccl; the group is all of the run. ConfigError where this
    torch has none of it."""
    bound = timedelta(seconds=timeout_s)
    try:
        if dist.is_initialized():
            return dist.new_group(backend=backend, timeout=bound)
        dist.init_process_group(
            backend,
            store=PrefixStore(key, group.store),
            rank=group.rank,
            world_size=group.world,
            timeout=bound,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"torch.distributed has no {backend} group here: {first}") from error
    return dist.group.WORLD


def hccl_name(group: Any, rank: int) -> str:
    """What HCCL calls a group of backend hccl: the operators between NPUs ask for it."""
    return str(group._get_backend(torch.device("npu")).get_hccl_comm_name(rank))
