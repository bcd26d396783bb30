"""``moeserve serve --ep N`` and ``moeserve peer --ep N``: rank 0 in this process, the others as its
children.

A child gets what it uses of the settings and no more: the key of clients stays with the doors.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from dataclasses import replace

from pydantic import SecretStr

from moeserve.comm.launch.environment import ALONE, LOOPBACK
from moeserve.comm.launch.note_store import host_store
from moeserve.comm.launch.spawn import Children, child_environ
from moeserve.config.cluster import MemberRankOptions, PeerConfig
from moeserve.config.group import Options
from moeserve.config.options import RankOptions, ServeConfig
from moeserve.config.sources import to_environ
from moeserve.gateway.server import serve
from moeserve.worker.peer import run_peer
from moeserve.worker.rank import run_rank
from moeserve.worker.start import RankStart, trust_of

# What children get to end by themselves once the run is over, and once it has broken.
GRACE_S = 5.0
HURRY_S = 1.0


def serve_local(config: ServeConfig, environ: Mapping[str, str]) -> int:
    """Serves until a signal; the exit status."""
    world = config.ep or 1
    if world == 1:
        return run_peer(config) if isinstance(config, PeerConfig) else serve(config)
    if config.ep_secret is None:
        config = config.model_copy(update={"ep_secret": SecretStr(secrets.token_hex(32))})
    store, port = host_store(LOOPBACK, trust=trust_of(config))
    settings = to_environ(config, environ, wanted_by_rank(config))
    children = Children(
        [sys.executable, "-m", "moeserve.worker"],
        {rank: settings | child_environ(rank, world, port) for rank in range(1, world)},
        sys.stderr,
    )
    grace_s = HURRY_S
    try:
        launch = replace(ALONE, world=world, local_world=world, port=port, launcher="moeserve")
        status = run_rank(config, RankStart(launch, environ, store, children.alarm))
        grace_s = GRACE_S if status == 0 else HURRY_S
        return status
    finally:
        children.end(grace_s)


def wanted_by_rank(config: ServeConfig) -> type[Options]:
    """The settings that a child gets."""
    if config.doors == "all":
        return type(config)
    return MemberRankOptions if isinstance(config, PeerConfig) else RankOptions
