"""Real, unmodified clients against a running server: an optional group of tests.

::

    make clients                      # every client
    make clients ARGS="-k lm_eval"    # one of them

Each client has an environment of its own, since what they depend on does not go together. They lie
in the folder that ``CLIENT_ENVIRONMENTS`` names (``make clients`` says ``build/clients``), are made
on first use, and made anew when their requirements change. That needs a package index, so without
the variable nothing in here is collected. At the end a table says which client did what, with its
version; it is also in ``results.md`` of that folder.

A client is three files:

``requirements/NAME.txt``
    What ``pip`` installs; the first line is the client itself, with its version.
``scripts/NAME.py``
    Runs in the client's environment, knows nothing of moeserve, and gets what it needs as
    arguments. It prints one JSON object, as the last line of its output.
``test_NAME.py``
    ``CLIENT = "NAME"``, and tests that call ``client.run`` and look at that object. The name of a
    test is what the table says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
KEPT = os.environ.get("CLIENT_ENVIRONMENTS", "")
collect_ignore_glob = [] if KEPT else ["*"]

INSTALL_S = 1800
RUN_S = 300
READY_S = 90


@dataclass(frozen=True)
class Address:
    """Where the server under test listens: ``http`` is a URL, ``grpc`` a host with a port."""

    http: str
    grpc: str
    model: str


@dataclass(frozen=True)
class Client:
    """An environment in which one client is installed."""

    name: str
    version: str
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, script: str, *args: str, timeout: float = RUN_S, cwd: Path | None = None) -> Any:
        """The object that a script of ``scripts/`` prints last; it must end well, and in time."""
        command = [str(self.python), str(HERE / "scripts" / script), *args]
        return json.loads(self.call(*command, timeout=timeout, cwd=cwd).splitlines()[-1])

    def call(self, *command: str, timeout: float = RUN_S, cwd: Path | None = None) -> str:
        """What a command prints; it must end well, and in time."""
        home = {"HOME": str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=home | quiet,
            cwd=cwd or self.folder,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def server() -> Iterator[Address]:
    """The demo model, served by a process of its own."""
    command = [sys.executable, "-m", "moeserve.cli", "serve", "--model", "demo"]
    process = subprocess.Popen(
        [*command, "--grpc-port", "0", "--http-port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        found = re.match(r"ready: model=(\S+) grpc=(\S+) http=(\S+)", ready)
        assert found is not None, f"the server said {ready!r}"
        yield Address(http=found[3], grpc=found[2], model=found[1])
    finally:
        process.terminate()
        try:
            process.wait(READY_S)
        finally:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Client:
    """The client that the module names, installed."""
    name = request.module.CLIENT
    requirements = (HERE / "requirements" / f"{name}.txt").read_text()
    folder = Path(KEPT).resolve() / name
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != requirements:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_S)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        listed = str(HERE / "requirements" / f"{name}.txt")
        subprocess.run([*pip, "-r", listed], check=True, timeout=INSTALL_S)
        stamp.write_text(requirements)
    package = re.match(r"[\w.-]+", requirements)
    assert package is not None, f"requirements/{name}.txt names no package"
    script = f"from importlib.metadata import version; print(version({package[0]!r}))"
    found = Client(name, "", folder).call(str(folder / "bin" / "python"), "-c", script).strip()
    request.config.stash.setdefault(VERSIONS, {})[name] = found
    return Client(name, found, folder)


VERSIONS = pytest.StashKey[dict[str, str]]()
OUTCOMES = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Keeps how each test of a client ended."""
    report = yield
    name = getattr(getattr(item, "module", None), "CLIENT", None)
    if name is not None and (report.when == "call" or report.failed):
        said = item.name.removeprefix("test_").replace("_", " ")
        item.config.stash.setdefault(OUTCOMES, []).append((name, said, report.outcome))
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table of results."""
    if not (rows := config.stash.get(OUTCOMES, [])):
        return
    versions = config.stash.get(VERSIONS, {})
    lines = ["| client | version | what was tried | result |", "| --- | --- | --- | --- |"]
    lines += [f"| {c} | {versions.get(c, '?')} | {said} | {end} |" for c, said, end in sorted(rows)]
    (Path(KEPT) / "results.md").write_text("\n".join(lines) + "\n")
    terminalreporter.section("clients")
    for line in lines:
        terminalreporter.line(line)
