"""A rank that is killed, stopped or cut off: all others name it within the deadline, requests end
with UNAVAILABLE, and nothing is left."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeserve.testbed.network import Bed, refusal
from moeserve.testbed.ranks import start_ranks

PATIENCE_S = 60.0
DEADLINE_S = 3.0
FLAGS = [
    *("--model", "demo", "--grpc-port", "none", "--http-port", "0", "--num-blocks", "256"),
    *("--threads", "1", "--ep-deadline", str(DEADLINE_S), "--drain-timeout-s", "60"),
]
BODY = {
    "model": "demo",
    "prompt": "Once upon a time",
    "temperature": 0,
    "stream": True,
    "n": 4,
    "ignore_eos": True,
}
KEY = "key of clients"
LOST = r"the run ends: (.*)"

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]


@dataclass
class Run:
    """A server over ranks; ``pid_of`` are its processes, ``said`` the file of what they log."""

    process: subprocess.Popen[Any]
    port: int
    said: Path

    def pid_of(self, rank: int) -> int:
        if rank == 0:
            return self.process.pid
        for child in children(self.process.pid):
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environ:
                return child
        raise AssertionError(f"no rank {rank}")

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


def children(pid: int) -> list[int]:
    stats = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [int(p.name) for p in stats if parent_of(p) == pid]


def parent_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # gone meanwhile
        return -1


def alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


def shared_files(pids: Sequence[int]) -> set[str]:
    """Named shared memory that these processes have mapped."""
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    return {name for text in maps for name in re.findall(r"/dev/shm/\S+", text)}


@contextmanager
def serving(ranks: int, said: Path) -> Iterator[Run]:
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--ep", str(ranks), *FLAGS]
    with said.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    pids: list[int] = []
    try:
        run = Run(process, ready_port(process), said)
        pids = [run.pid_of(rank) for rank in range(ranks)]
        shared = shared_files(pids)
        yield run
        assert eventually(lambda: not any(alive(pid) for pid in pids)), "a process is left"
        assert not any(Path(name).exists() for name in shared)
    finally:
        for pid in (process.pid, *pids):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def ready_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.search(r"http=http://\S+:(\d+)", ready)
    assert found is not None, ready
    return int(found[1])


def eventually(holds: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def streaming(
    host: str, port: int, *, tokens: int = 1000, key: str = ""
) -> Iterator[http.client.HTTPResponse]:
    """An answer that has begun and is far from its end."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        body = json.dumps(BODY | {"max_tokens": tokens})
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.readline().startswith(b"data: ")
        yield response
    finally:
        connection.close()


def last_event(response: http.client.HTTPResponse) -> dict[str, Any]:
    events = [line for line in response.read().split(b"\n\n") if line.strip()]
    found: dict[str, Any] = json.loads(events[-1].strip().removeprefix(b"data: "))
    return found


def require_in_time(told: str) -> None:
    """Where a rank fell silent, for how long is told: it may not be longer than the deadline."""
    for silent in re.findall(r"silent for ([\d.]+) s", told):
        assert float(silent) <= DEADLINE_S


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "has been silent for")],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_is_named_by_all_others_and_requests_end_unavailable(
    number: signal.Signals, how: str, tmp_path: Path
) -> None:
    with serving(3, tmp_path / "log") as run, streaming("127.0.0.1", run.port) as response:
        os.kill(run.pid_of(2), number)
        error = last_event(response)["error"]
        assert error["code"] == "unavailable"
        assert error["message"].startswith(f"rank 2 {how}")
        assert run.end() == 1
        lines = run.said.read_text().splitlines()
        told = {line.startswith("[rank 1]"): line for line in lines if re.search(LOST, line)}
        assert told.keys() == {False, True}, "rank 0 and rank 1 both say so"
        for line in told.values():
            assert f"rank 2 {how}" in line
            assert "rank 2 was last heard doing: " in line
            require_in_time(line)
        assert not any("Traceback" in line for line in lines)


def test_when_rank_0_is_killed_the_others_name_it_and_end(tmp_path: Path) -> None:
    """What they say is lost with rank 0, who would have printed it: their ends are not."""
    with serving(2, tmp_path / "log") as run, streaming("127.0.0.1", run.port):
        follower = run.pid_of(1)
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        assert eventually(lambda: not alive(follower))


def test_a_rank_that_is_told_to_stop_has_all_of_them_drain_and_end_well(tmp_path: Path) -> None:
    with (
        serving(2, tmp_path / "log") as run,
        streaming("127.0.0.1", run.port, tokens=200) as response,
    ):
        os.kill(run.pid_of(1), signal.SIGTERM)
        assert response.read().rstrip().endswith(b"data: [DONE]")
        assert run.end() == 0
        assert len(re.findall(r"the run ended after \d+ steps", run.said.read_text())) == 2


def test_a_rank_whose_link_is_cut_is_named_by_all_others(tmp_path: Path) -> None:
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        bed = stack.enter_context(Bed(3))
        logs = [stack.enter_context((tmp_path / f"rank{r}").open("wb")) for r in range(3)]
        command = [sys.executable, "-m", "moeserve.worker", *FLAGS]
        command += ["--host", bed.address(0)]
        secrets = {"MOESERVE_EP_SECRET": "sixteen or longer", "MOESERVE_API_KEY": KEY}
        processes = start_ranks(
            bed, command, env=secrets, errors_to=logs, stdout=subprocess.PIPE, text=True
        )
        for process in processes:
            stack.callback(process.stdout.close)  # type: ignore[union-attr]
        port = ready_port(processes[0])
        with bed.inside(0):
            response = stack.enter_context(streaming(bed.address(0), port, key=KEY))
        bed.cut(1)
        error = last_event(response)["error"]
        assert error["code"] == "unavailable"
        assert error["message"].startswith("rank 1 ")
        assert [process.wait(PATIENCE_S) for process in processes] == [1, 1, 1]
    for rank, named in ((0, 1), (1, 0), (2, 1)):
        told = re.search(LOST, (tmp_path / f"rank{rank}").read_text())
        assert told is not None
        assert told[1].startswith(f"rank {named} has been silent")
        require_in_time(told[1])
