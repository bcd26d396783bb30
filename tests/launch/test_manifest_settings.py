"""The variables in ``launch/k8s`` are settings that the commands started there take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moeserve.config.sources import read_settings
from moeserve.worker.cluster_command import gateway_config, peer_config

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "k8s"
CONFIGS = {"gateway": gateway_config, "peer": peer_config}


def started() -> list[tuple[str, dict[str, str]]]:
    """The command of every container of ours, and its variables."""
    objects: list[Any] = [
        found
        for file in sorted(FOLDER.glob("*.yaml"))
        for found in yaml.safe_load_all(file.read_text())
    ]
    (shared,) = [o["data"] for o in objects if o["kind"] == "ConfigMap"]
    containers = [
        container
        for o in objects
        if o["kind"] in ("Deployment", "StatefulSet")
        for container in o["spec"]["template"]["spec"]["containers"]
        if container["command"][0] == "moeserve"
    ]
    return [
        (c["command"][1], shared | {e["name"]: e["value"] for e in c["env"] if "value" in e})
        for c in containers
    ]


@pytest.mark.parametrize(("command", "env"), started())
def test_every_variable_is_a_setting_that_the_command_uses(
    command: str, env: dict[str, str]
) -> None:
    config: Any = CONFIGS[command](read_settings({}, env))
    assert config.listen == "0.0.0.0:7100"
    assert config.registry == "etcd://moeserve-etcd:2379"
    if command == "peer":
        assert config.role == env["MOESERVE_ROLE"]
