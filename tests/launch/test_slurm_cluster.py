"""``launch/slurm-cluster.sbatch`` with stand-ins for Slurm and for what it starts: who is started
where, told what, and that all end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm-cluster.sbatch"
PATIENCE_S = 30.0

pytestmark = pytest.mark.long

SCONTROL = "#!/bin/sh\nprintf '%s\\n' one two three\n"
# Options end where the command begins; the node becomes the name of what is written.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case $1 in --nodelist=*) NODE=${1#*=}; export NODE ;; esac
    shift
done
exec "$@"
"""
# What is started: says who it is, and ends well at SIGTERM, after a while. A name may fail at once.
PART = """#!/bin/sh
shift 2
echo "$NODE $MOESERVE_MODEL $MOESERVE_CLUSTER_SECRET $*" >>"$TOLD"
case "$*" in *"$FAILS"*) exit 3 ;; esac
trap 'sleep 0.2; echo "ended" >>"$TOLD"; exit 0' TERM
while :; do sleep 0.05; done
"""


def start(folder: Path, **env: str) -> subprocess.Popen[bytes]:
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("part", PART)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "part"),
        "TOLD": str(folder / "told"),
        "SLURM_JOB_NODELIST": "some[1-3]",
        "FAILS": "nobody",
    }
    return subprocess.Popen(
        [str(SCRIPT), "--num-blocks", "64"],
        env=known | env,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def told(folder: Path, lines: int) -> list[str]:
    """As many lines as are awaited, once they are there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = (folder / "told").read_text().splitlines() if (folder / "told").exists() else []
        if len(found) >= lines:
            return found
        time.sleep(0.02)
    raise AssertionError(f"only {found} after {PATIENCE_S} s")


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=PATIENCE_S)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, said.decode()


def test_parts_are_dealt_to_the_nodes_and_all_end_with_the_job(tmp_path: Path) -> None:
    process = start(tmp_path, PREFILL="2", DECODE="2", CACHE="1", GATEWAYS="2", MODEL="/shared/m",
                    GATEWAY_FLAGS="--http-port 80")  # fmt: skip
    found = told(tmp_path, 7)
    secrets = {line.split()[2] for line in found}
    assert len(secrets) == 1
    assert re.fullmatch(r"[0-9a-f]{32}", secrets.pop())
    peer = "peer --role {0} --name {0}-{1} --join one:7100,two:7100 --listen 0.0.0.0:{2}"
    rest = "--advertise {} --num-blocks 64"
    assert sorted(re.sub(r" [0-9a-f]{32}", "", line) for line in found) == sorted(
        [
            "one /shared/m gateway --listen 0.0.0.0:7100 --advertise one --http-port 80",
            "two /shared/m gateway --listen 0.0.0.0:7100 --advertise two --http-port 80",
            f"one /shared/m {peer.format('prefill', 0, 7200)} {rest.format('one')}",
            f"two /shared/m {peer.format('prefill', 1, 7264)} {rest.format('two')}",
            f"three /shared/m {peer.format('decode', 0, 7328)} {rest.format('three')}",
            f"one /shared/m {peer.format('decode', 1, 7392)} {rest.format('one')}",
            f"two /shared/m {peer.format('cache', 0, 7456)} {rest.format('two')}",
        ]
    )
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")
    assert told(tmp_path, 14)[7:] == ["ended"] * 7


def test_a_part_that_fails_leaves_the_others_and_its_status(tmp_path: Path) -> None:
    process = start(tmp_path, FAILS="--role prefill", MOESERVE_CLUSTER_SECRET="s" * 16)
    found = told(tmp_path, 3)
    assert all(f" demo {'s' * 16} " in line for line in found)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 3
    assert told(tmp_path, 5)[3:] == ["ended"] * 2


def test_more_gateways_than_nodes_are_refused(tmp_path: Path) -> None:
    assert ended(start(tmp_path, GATEWAYS="4")) == (
        2,
        "GATEWAYS=4: there are 3 nodes, and each has at most one\n",
    )
