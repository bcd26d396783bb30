"""The commands of clusters: ``moeserve peer``, ``gateway`` and ``up``.

What loads models is imported once the settings are read and found to be right.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeserve.config.cluster import EverySetting, GatewayConfig, PeerConfig
from moeserve.config.sources import add_options, also_said, settings_from_args, to_yaml
from moeserve.worker.cluster_command import (
    gateway_config,
    peer_config,
    registry_setting,
    start_cluster,
    start_gateway,
    start_peer,
)
from moeserve.worker.up import ClusterPlan

if TYPE_CHECKING:
    # argparse has no public name for what ``add_subparsers`` gives.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_peer(commands: Commands, text: str) -> None:
    command = commands.add_parser(
        "peer",
        help=text,
        description="Serve gateways and other members of a cluster until SIGTERM, which drains.",
        epilog="example: moeserve peer demo --role decode --join 127.0.0.1:7000",
        allow_abbrev=False,
    )
    command.add_argument("model_named", metavar="MODEL", nargs="?", help="the same as --model")
    add_options(command, PeerConfig)
    command.set_defaults(run=_peer)


def _peer(args: argparse.Namespace) -> int:
    also_said(args, "model", "model_named", "MODEL")
    config = peer_config(settings_from_args(args, os.environ))
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    return start_peer(config)


def add_gateway(commands: Commands, text: str) -> None:
    command = commands.add_parser(
        "gateway",
        help=text,
        description="Open the doors of a cluster until SIGTERM, which drains.",
        epilog="example: moeserve gateway --listen 127.0.0.1:7000 --port 8000",
        allow_abbrev=False,
    )
    command.add_argument("--port", metavar="PORT", help="the same as --http-port")
    add_options(command, GatewayConfig)
    command.set_defaults(run=_gateway)


def _gateway(args: argparse.Namespace) -> int:
    also_said(args, "http_port", "port", "--port")
    config = gateway_config(settings_from_args(args, os.environ))
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    return start_gateway(config)


def add_up(commands: Commands, text: str) -> None:
    command = commands.add_parser(
        "up",
        help=text,
        description="Start a whole cluster on this host, until SIGTERM, which drains and ends all.",
        epilog="example: moeserve up demo --prefill 2 --decode 2 --gateways 2",
        allow_abbrev=False,
    )
    command.add_argument("model_named", metavar="MODEL", nargs="?", help="the same as --model")
    command.add_argument("--port", metavar="PORT", help="the same as --http-port")
    parts = command.add_argument_group("parts of the cluster")
    for name, (count, what) in PARTS.items():
        parts.add_argument(f"--{name}", type=int, default=count, metavar="N", help=what)
    add_options(command, EverySetting)
    command.set_defaults(run=_up)


PARTS: Mapping[str, tuple[int, str]] = {
    "prefill": (1, "members that prefill [1]"),
    "decode": (1, "members that decode [1]"),
    "unified": (0, "members that do both [0]"),
    "cache": (0, "members that keep KV [0]"),
    "gateways": (1, "gateways, at ports that follow one another [1]"),
}


def _up(args: argparse.Namespace) -> int:
    also_said(args, "model", "model_named", "MODEL")
    also_said(args, "http_port", "port", "--port")
    args.registry, etcd = registry_setting(args.registry)
    settings = settings_from_args(args, os.environ)
    counts = {name: getattr(args, name) for name in PARTS}
    ep = int(str(settings["ep"].value)) if "ep" in settings else 1
    return start_cluster(ClusterPlan(**counts, ep=ep, etcd=etcd), settings)
