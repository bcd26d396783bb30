"""All groups of settings, in the order in which they are shown, and which command takes which."""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.config.cluster import (
    CacheMemberOptions,
    ClusterOptions,
    GatewayConfig,
    GatewayOptions,
    MemberOptions,
    PeerConfig,
)
from moeserve.config.group import Options
from moeserve.config.options import (
    AnswerOptions,
    BatchConfig,
    CacheOptions,
    DoorOptions,
    EpOptions,
    LoadOptions,
    LogOptions,
    ModelOptions,
    OffloadOptions,
    ProcessOptions,
    RankModelOptions,
    RequestOptions,
    ServeConfig,
)
from moeserve.config.steps import StepOptions

GROUPS: tuple[type[Options], ...] = (
    ModelOptions,
    LoadOptions,
    CacheOptions,
    OffloadOptions,
    StepOptions,
    ProcessOptions,
    RequestOptions,
    EpOptions,
    LogOptions,
    AnswerOptions,
    DoorOptions,
    ClusterOptions,
    MemberOptions,
    CacheMemberOptions,
    GatewayOptions,
)
# The commands that read settings, and those they take. A rank that any launcher started takes a
# peer's if it has a role, else those of ``moeserve serve``.
COMMANDS: Mapping[str, type[Options]] = {
    "moeserve serve": ServeConfig,
    "moeserve peer": PeerConfig,
    "moeserve gateway": GatewayConfig,
    "python -m moeserve.worker": PeerConfig,
    "moeserve generate": RankModelOptions,
    "moeserve batch": BatchConfig,
}
