"""Every command and snippet in README.md works as it is printed there.

A comment before each block says how it is tested: ``make`` (targets exist), ``serve`` (started,
and asked by the ``client`` blocks), ``ranks`` and ``cluster`` (each line started, and asked),
``run`` (each line ends with status 0), ``install`` (read, since it would change the environment).
Only paths of the environment and port numbers are replaced.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from moeserve.models.families import FAMILIES

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^<!-- test: (\w+) -->\n+)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Snippet:
    """``how`` it is tested; empty where its author forgot to say."""

    how: str
    language: str
    text: str


SNIPPETS = [Snippet(*groups) for groups in BLOCK.findall(README)]


def snippets(how: str) -> list[Snippet]:
    return [snippet for snippet in SNIPPETS if snippet.how == how]


def lines(how: str) -> list[str]:
    return [line for snippet in snippets(how) for line in snippet.text.splitlines()]


@dataclass(frozen=True, slots=True)
class Ports:
    grpc: int
    http: int

    def here(self, text: str) -> str:
        """The snippet on this machine: these ports, and the environment that runs the tests."""
        text = text.replace(":8000", f":{self.http}").replace(":50051", f":{self.grpc}")
        return text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")

    def environment(self) -> dict[str, str]:
        doors = {"MOESERVE_GRPC_PORT": str(self.grpc), "MOESERVE_HTTP_PORT": str(self.http)}
        # mpirun does not like to be run by root unless it is told twice.
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**os.environ, **doors, **root, "MOESERVE_THREADS": "1"}


def run(snippet: Snippet, ports: Ports) -> str:
    shell = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}[snippet.language]
    with tempfile.TemporaryDirectory() as folder:  # what a command writes goes there
        done = subprocess.run(
            [*shell, ports.here(snippet.text)],
            cwd=folder,
            env=ports.environment(),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_ports() -> Ports:
    with socket.socket() as one, socket.socket() as two:
        for taken in (one, two):
            taken.bind(("127.0.0.1", 0))
        return Ports(one.getsockname()[1], two.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    (serve,) = snippets("serve")
    with started(serve.text, tmp_path_factory.mktemp("readme") / "server.log") as ports:
        yield ports


@contextmanager
def started(command: str, log: Path) -> Iterator[Ports]:
    """Ready, and ended by SIGTERM; ours with status 0, launchers with one of their own."""
    ports, ours = free_ports(), "/moeserve " in command
    with (
        log.open("w") as said,
        subprocess.Popen(
            ["bash", "-euc", "exec " + ports.here(command).strip()],
            env=ports.environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            if not is_ready(process, ports):
                pytest.fail(f"the server is not ready:\n{log.read_text()}")
            yield ports
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0 or not ours
        finally:
            process.kill()


def is_ready(process: subprocess.Popen[bytes], ports: Ports, seconds: float = 150) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{ports.http}/ready", timeout=5).is_success:
                return True
        except httpx.TransportError:
            time.sleep(0.1)
    return False


def test_every_snippet_says_how_it_is_tested() -> None:
    assert len(SNIPPETS) == README.count("\n```") / 2
    assert {snippet.how for snippet in SNIPPETS} == {
        "make", "serve", "client", "ranks", "cluster", "run", "install",
    }  # fmt: skip


@pytest.mark.parametrize("line", lines("make"))
def test_a_make_target_exists(line: str) -> None:
    command = line.partition("#")[0].split()
    subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, timeout=60, check=True)


@pytest.mark.parametrize("snippet", snippets("client"), ids=["curl", "openai", "grpc"])
def test_a_client_streams_a_story(server: Ports, snippet: Snippet) -> None:
    assert run(snippet, server).strip()


@pytest.mark.parametrize(
    "line", [*lines("ranks"), *lines("cluster")], ids=["serve", "torchrun", "mpirun", "up"]
)
def test_ranks_and_clusters_tell_the_story_of_one_process(
    server: Ports, line: str, tmp_path: Path
) -> None:
    curl = next(s for s in snippets("client") if s.language == "bash")
    with started(line, tmp_path / "ranks.log") as ranks:
        assert story(run(curl, ranks)) == story(run(curl, server)) != ""


def story(stream: str) -> str:
    told = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    return "".join(json.loads(t)["choices"][0]["text"] for t in told if t != "[DONE]")


def test_the_clients_get_the_same_tokens_through_either_door(server: Ports) -> None:
    _, openai, grpc = (run(snippet, server) for snippet in snippets("client"))
    assert openai == grpc


@pytest.mark.parametrize("line", lines("run"))
def test_a_command_ends_well(line: str) -> None:
    away = Ports(0, 0)  # the server of this module may hold the others
    assert run(Snippet("run", "bash", line), away).strip()


@pytest.mark.parametrize("line", lines("install"))
def test_what_is_installed_is_torch_of_its_own_index_or_this_project(line: str) -> None:
    words = line.split()
    assert words[:2] == ["pip", "install"]
    assert set(words[2:]) in (
        {"."},
        {"torch", "--index-url", "https://download.pytorch.org/whl/cpu"},
    )
    assert (ROOT / "pyproject.toml").exists()


def test_every_family_is_listed() -> None:
    listed = re.findall(r"^\|[^|]+\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(family.architecture for family in FAMILIES)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
