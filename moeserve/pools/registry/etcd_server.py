"""The command that starts an etcd on this machine, for a cluster that has no other.

It keeps little: heartbeats are written over each other, so that old revisions are dropped soon.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from moeserve.errors import ConfigError

# Revisions that are kept: minutes of a small cluster. Bytes that the store may have.
_KEPT_REVISIONS = 1000
_MOST_BYTES = 256 << 20


def etcd_command(folder: Path, port: int, peer_port: int, host: str = "127.0.0.1") -> list[str]:
    """Serves clients at ``port`` of ``host``; ``folder`` keeps its state. ConfigError where etcd
    is not installed."""
    binary = shutil.which("etcd")
    if binary is None:
        raise ConfigError("etcd is not installed: install etcd-server, or use another registry")
    client, peer = f"http://{host}:{port}", f"http://{host}:{peer_port}"
    settings = {
        "name": "moeserve",
        "data-dir": str(folder),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"moeserve={peer}",
        "auto-compaction-mode": "revision",
        "auto-compaction-retention": str(_KEPT_REVISIONS),
        "quota-backend-bytes": str(_MOST_BYTES),
        "log-level": "warn",
        "logger": "zap",
    }
    return [binary, *(f"--{name}={value}" for name, value in settings.items())]
