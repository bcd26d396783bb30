"""The settings of clusters: what members and gateways have beside those of ``options``.

    group           used by                                          taken by
    ClusterOptions  members and gateways: how they find each other   peer, gateway, worker
    MemberOptions   members: what each does for others               peer, worker
    CacheMemberOptions   members that keep KV                        peer, worker
    GatewayOptions  gateways: where requests go                      gateway

``PeerConfig`` and ``GatewayConfig`` are all that these commands take. ``EverySetting`` is all that
any command does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moeserve.config.group import Options
from moeserve.config.kinds import Bytes, Port, Secret
from moeserve.config.options import (
    AnswerOptions,
    DoorOptions,
    LogOptions,
    ModelOptions,
    RankOptions,
    RequestOptions,
    ServeConfig,
)

EMBEDDED = "embedded"
ETCD = "etcd://"


def host_and_port(text: str) -> str:
    """Checks that it is both."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected host:port, such as 127.0.0.1:7100")
    return text


class ClusterOptions(Options):
    """How the members and gateways of a cluster find one another."""

    listen: Annotated[str, AfterValidator(host_and_port)] = Field(
        default="127.0.0.1:0",
        description="host:port at which members and gateways reach this one; port 0 is any",
    )
    advertise: str | None = Field(
        default=None,
        min_length=1,
        description="host that others are told to reach this one by; default: that of --listen",
    )
    join: str | None = Field(
        default=None,
        min_length=1,
        description="gateways that a member joins, as host:port by commas; for a gateway: others "
        "whose members it serves too",
    )
    registry: str = Field(
        default=EMBEDDED,
        pattern=rf"^({EMBEDDED}|{ETCD}.+)$",
        description="where members are registered: embedded is in the gateways, or "
        "etcd://host:port by commas",
    )
    cluster_secret: Secret = Field(
        default=None,
        min_length=16,
        description="what members and gateways on several hosts prove to know as they connect",
    )
    cluster_tls: Path | None = Field(
        default=None,
        description="folder of cert.pem, key.pem, ca.pem: members and gateways by mutual TLS",
    )

    @property
    def gateways(self) -> tuple[str, ...]:
        """The addresses of ``join``."""
        return tuple(filter(None, map(str.strip, (self.join or "").split(","))))


class MemberOptions(Options):
    """A member of a cluster."""

    role: Literal["prefill", "decode", "unified", "cache"] | None = Field(
        default=None,
        description="what it does for others: prefill, decode, both (unified), or keep KV (cache)",
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="what it is called where members are shown; default: role and process",
    )
    kv_transport: Literal["grpc", "mooncake"] = Field(
        default="grpc",
        description="how KV goes between hosts: gRPC, or Mooncake's transfer engine over TCP where "
        "both members have it, whose port has neither TLS nor a secret; on one host by memory",
    )
    weights: Literal["disk", "auto", "pool"] = Field(
        default="disk",
        description="where they come from: this host's disk, other members and the cache pool, or "
        "what is faster (auto)",
    )
    weights_folder: Path | None = Field(
        default=None,
        description="where those that come from others are kept; default: in memory, while used",
    )


class CacheMemberOptions(Options):
    """A member that keeps KV of others."""

    cache_memory: Bytes = Field(
        default=1 << 30, ge=1, description="memory for KV of others, such as 8GiB"
    )
    cache_disk: Bytes | None = Field(
        default=None, ge=1, description="disk for it, such as 100GiB; memory for hours becomes days"
    )
    cache_folder: Path | None = Field(
        default=None, description="where on a disk: a folder of its own, which is found again"
    )
    cache_share: float = Field(
        default=1.0, gt=0, le=1, description="of each of them, what one tenant may have"
    )


class PeerConfig(MemberOptions, CacheMemberOptions, ClusterOptions, ServeConfig):
    """What a member is started with. It may have doors of its own; the default is none."""

    grpc_port: Port | None = Field(default=None, description=DoorOptions.described("grpc_port"))
    http_port: Port | None = Field(default=None, description=DoorOptions.described("http_port"))

    @model_validator(mode="after")
    def _open_to_whom_it_should_be(self) -> Self:
        if self.grpc_port is None and self.http_port is None:
            return self
        return self._guarded()


class MemberRankOptions(MemberOptions, CacheMemberOptions, ClusterOptions, RankOptions):
    """What a rank of a member uses, where it has no doors."""


class GatewayOptions(Options):
    """Where a gateway sends requests."""

    routing: Literal["locality_free", "kv_local", "freeness"] = Field(
        default="locality_free",
        description="which members get a request: those that are predicted to finish it first, the "
        "same with what was sent there before taken off its prompt, or those with most memory free",
    )
    moves_per_s: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="running requests that are moved from crowded members to free ones, at most; 0 "
        "is none",
    )


class GatewayConfig(
    GatewayOptions,
    ClusterOptions,
    DoorOptions,
    AnswerOptions,
    LogOptions,
    RequestOptions,
    ModelOptions,
):
    """What a gateway is started with: doors, and no weights. A model that is named is where the
    tokenizer is read from; else members say where they have it."""

    @property
    def doors_config(self) -> ServeConfig:
        """The same doors, of a process by itself."""
        shared = ServeConfig.model_fields.keys() & type(self).model_fields.keys()
        return ServeConfig.model_validate({name: getattr(self, name) for name in shared})


class EverySetting(GatewayConfig, PeerConfig):
    """For who reads settings before it is known which command takes them."""
