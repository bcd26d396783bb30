"""Where measurements of this host are kept: one JSON file for each host, and for each shape of
models that it was measured for.

``$XDG_CACHE_HOME/moeserve/calibration``, or ``~/.cache/moeserve/calibration``. A file is written
beside its place and moved there when it is whole. What is found there is read as a stranger's:
bounded, and refused with ConfigError where it is not one of ours. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.host import read_cpu
from moeserve.offload.model.machine import MachineModel
from moeserve.regular_file import open_regular

MOST_BYTES = 1 << 20


def host_name() -> str:
    """Of this machine, with what kind of processor it has: a calibration of another is no good."""
    cpu = read_cpu()
    name = "".join(c if c.isprintable() else "?" for c in f"{socket.gethostname()}, {cpu.model}")
    return name[:120]


def calibration_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """It need not exist."""
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "moeserve" / "calibration"


def file_of(folder: Path, host: str, threads: int, shapes: str) -> Path:
    digest = sha256(f"{host}\n{threads}\n{shapes}".encode()).hexdigest()[:16]
    return folder / f"{digest}.json"


def keep(machine: MachineModel, folder: Path) -> Path:
    """Where it is kept then, instead of an older one; ConfigError where it cannot be written."""
    file = file_of(folder, machine.host, machine.threads, machine.shapes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False) as new:
            new.write(json.dumps(machine.to_json(), indent=1) + "\n")
        Path(new.name).replace(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: the calibration cannot be written: {error.strerror}; set XDG_CACHE_HOME to a "
            f"folder that can be"
        ) from error
    return file


def find(folder: Path, host: str, threads: int, *shapes: str) -> MachineModel | None:
    """The calibration of this host for the first of ``shapes`` that there is one for."""
    for each in shapes:
        file = file_of(folder, host, threads, each)
        if file.exists():
            return read_calibration(file)
    return None


def read_calibration(file: Path) -> MachineModel:
    """ConfigError for a file that is no calibration, or none of ours."""
    try:
        opened = open_regular(file)
        if opened is None:
            raise ConfigError(f"{file}: not a regular file; remove it and calibrate again")
        with opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{file}: longer than any calibration; remove it")
        return MachineModel.from_json(json.loads(content))
    except ConfigError as wrong:
        raise ConfigError(f"{file}: {wrong.message}") from wrong
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: not a calibration ({error}); remove it, and run moeserve doctor --calibrate"
        ) from error
