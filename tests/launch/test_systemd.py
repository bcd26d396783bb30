"""The units in ``launch/systemd`` are what systemd takes, and start what the document says."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "systemd"
UNITS = {
    "moeserve-gateway.service": "/opt/moeserve/bin/moeserve gateway",
    "moeserve-peer@.service": "/opt/moeserve/bin/moeserve peer",
}

pytestmark = pytest.mark.long


class Several(dict[str, object]):
    """Keys that come more than once are joined, as systemd's lists are."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            value = [*self[key], *value]  # type: ignore[misc]
        super().__setitem__(key, value)


def read(name: str) -> configparser.RawConfigParser:
    unit = configparser.RawConfigParser(strict=False, dict_type=Several, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((FOLDER / name).read_text())
    return unit


def test_there_is_one_for_gateways_and_one_for_members() -> None:
    assert {file.name for file in FOLDER.iterdir()} == UNITS.keys()


@pytest.mark.parametrize("name", UNITS)
def test_units_start_and_drain(name: str) -> None:
    service = read(name)["Service"]
    assert service["ExecStart"] == UNITS[name]
    assert service["Restart"] == "on-failure"
    assert service["User"] == "moeserve"
    assert int(service["TimeoutStopSec"]) >= 45, "a drain takes 30 s"
    files = service["EnvironmentFile"].split()
    assert files[0] == "-/etc/moeserve/cluster.env"
    assert files[1].lstrip("-").startswith("/etc/moeserve/")


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    text = (FOLDER / name).read_text()
    # It looks whether what is started is there.
    (tmp_path / name).write_text(text.replace("/opt/moeserve/bin/moeserve", sys.executable))
    done = subprocess.run(
        [verify, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / name).write_text(text.replace("KillMode=", "KilMode="))
    done = subprocess.run(
        [verify, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "KilMode" in done.stderr
