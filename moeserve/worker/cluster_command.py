"""The commands ``peer``, ``gateway`` and ``up``, once their settings are read; and the first two as
``up`` starts them: ``python -m moeserve.worker.cluster_command peer``, with all settings in the
environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from moeserve.config.cluster import EMBEDDED, EverySetting, GatewayConfig, PeerConfig
from moeserve.config.effect import require_effect
from moeserve.config.group import Options
from moeserve.config.sources import Setting, options_of, read_settings
from moeserve.errors import ConfigError, MoeserveError
from moeserve.observe.logs import configure_log
from moeserve.worker.failure import leave
from moeserve.worker.up import ClusterPlan, LocalCluster, counted_signals

ChosenPart = TypeVar("ChosenPart", bound=Options)


def peer_config(settings: Mapping[str, Setting]) -> PeerConfig:
    """Without a role it is unified; ranks of one member have one name."""
    config = options_of(settings, PeerConfig)
    require_effect(config, settings, config.ep or 1)
    role = config.role or "unified"
    name = config.name
    if name is None and (config.ep or 1) > 1:
        name = f"{role}-{os.getpid()}"
    return config.model_copy(update={"role": role, "name": name})


def gateway_config(settings: Mapping[str, Setting]) -> GatewayConfig:
    config = options_of(settings, GatewayConfig)
    require_effect(config, settings)
    return config


def start_peer(config: PeerConfig) -> int:
    """Serves until a signal; the exit status."""
    configure_log(config.log_level, config.log_format)
    if config.role == "cache":
        from moeserve.worker.cache_member import run_cache_member

        return run_cache_member(config)
    from moeserve.models.library import with_model_here
    from moeserve.worker.local import serve_local

    return serve_local(with_model_here(config) if config.weights == "disk" else config, os.environ)


def start_gateway(config: GatewayConfig) -> int:
    """Serves until a signal; the exit status."""
    configure_log(config.log_level, config.log_format)
    from moeserve.worker.gateway import run_gateway

    return run_gateway(config)


def start_cluster(plan: ClusterPlan, settings: Mapping[str, Setting]) -> int:
    """All of it, until a signal; the exit status."""
    config = options_of(settings, EverySetting)
    peer, gateway = _part(config, PeerConfig, settings), _part(config, GatewayConfig, settings)
    with counted_signals() as stopped:
        return LocalCluster(plan, peer, gateway, os.environ).run(stopped)


def _part(
    config: EverySetting, kind: type[ChosenPart], settings: Mapping[str, Setting]
) -> ChosenPart:
    """The settings that ``kind`` takes."""
    given = [name for name in settings if name in kind.model_fields]
    return kind.model_validate({name: getattr(config, name) for name in given})


def registry_setting(value: str | None) -> tuple[str, bool]:
    """What ``up --registry`` says: the setting, and whether an etcd of its own is to be started."""
    return (EMBEDDED, True) if value == "etcd" else (value or EMBEDDED, False)


def reported(run: Callable[[], int]) -> int:
    """The exit status, and on standard error what went wrong."""
    try:
        return run()
    except ConfigError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 2
    except MoeserveError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """``peer`` or ``gateway``; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    settings = read_settings({}, os.environ)
    if words == ["peer"]:
        return reported(lambda: start_peer(peer_config(settings)))
    if words == ["gateway"]:
        return reported(lambda: start_gateway(gateway_config(settings)))
    print(f"moeserve: {words}: expected peer or gateway", file=sys.stderr)
    return 2


if __name__ == "__main__":
    leave(main())
