"""A model named as on the hub is fetched from it; the hub here is a server of this test."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moeserve.config.options import ServeConfig
from moeserve.errors import CheckpointError
from moeserve.models import hub
from moeserve.models.library import resolve_model, with_model_here

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as fetching asks for: one repository at one commit."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.name = name
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir())


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None: ...

    def _answer(self, *, body: bool) -> None:
        path, name = self.path.partition("?")[0], self.server.name
        if path.startswith(f"/api/models/{name}/revision/"):
            files = [{"rfilename": file} for file in self.server.files()]
            self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode(), body)
        elif path.startswith(f"/api/models/{name}/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": f,
                    "size": (self.server.folder / f).stat().st_size,
                    "oid": f,
                }
                for f in self.server.files()
            ]
            self._send(json.dumps(tree).encode(), body)
        elif path.startswith(f"/{name}/resolve/"):
            file = path.rpartition("/")[2]
            if body:
                self.server.fetched.append(file)
            self._send((self.server.folder / file).read_bytes(), body)
        else:
            self._send(b'{"error": "Repository not found"}', body, 404)

    def _send(self, content: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def acme(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    (folder / "modeling_acme.py").write_text("raise SystemExit('code of a model folder has run')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with Hub("acme/tiny-moe", folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(60)


GENERATE = """
-m moeserve.cli generate --json --prompt-ids 72,105 --max-tokens 4 --temperature 0 --threads 1
""".split()
FETCH = ["-c", "import sys; from moeserve.models.hub import *; print(fetch_model(sys.argv[1]))"]


def run(
    command: list[str], home: Path, *words: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the library reads its variables as it is imported."""
    ours = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, *command, *words],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, **ours, **environ},
    )


@pytest.mark.long
def test_a_hub_id_is_fetched_once_without_code_and_pickles(acme: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run(GENERATE, home, "--model", acme.name, HF_ENDPOINT=acme.url)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(acme.fetched)
    assert not {"modeling_acme.py", "pytorch_model.bin"} & set(acme.fetched)
    count = len(acme.fetched)
    again = run(FETCH, home, acme.name, HF_ENDPOINT=acme.url, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(acme.fetched) == count
    kept = {file.name for file in Path(again.stdout.strip()).iterdir()}
    assert kept == set(acme.files()) - {"modeling_acme.py", "pytorch_model.bin"}


@pytest.mark.long
def test_what_the_hub_does_not_have_is_one_line_that_says_what_to_do(
    acme: Hub, tmp_path: Path
) -> None:
    done = run(GENERATE, tmp_path, "--model", "acme/other", HF_ENDPOINT=acme.url)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "model 'acme/other': cannot be fetched" in done.stderr
    assert "hf download acme/other --local-dir other" in done.stderr


@pytest.mark.parametrize("name", ["demo", "/acme/tiny", "./tiny", "acme/tiny/more", "../tiny", ""])
def test_other_names_are_no_hub_ids(name: str) -> None:
    assert not hub.is_hub_id(name)


def test_a_folder_that_is_there_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme/tiny").mkdir(parents=True)
    assert hub.is_hub_id("acme/tiny")
    monkeypatch.chdir(tmp_path)
    assert not hub.is_hub_id("acme/tiny")
    assert resolve_model("acme/tiny") == Path("acme/tiny")


def test_nothing_but_running_a_model_fetches_it() -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; fetch it with `hf download"):
        resolve_model("acme/tiny")


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = lambda name: None  # noqa: E731
    monkeypatch.setattr(hub.importlib.util, "find_spec", absent)
    with pytest.raises(CheckpointError, match=r"install 'moeserve\[hub\]', or fetch it with"):
        with_model_here(ServeConfig(model="acme/tiny"))


def test_a_fetched_model_keeps_its_name_for_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeserve.models.library.fetch_model", lambda name: tmp_path)
    here = with_model_here(ServeConfig(model="acme/tiny"))
    assert (here.model, here.served_model_name) == (str(tmp_path), "acme/tiny")
    named = with_model_here(ServeConfig(model="acme/tiny", served_model_name="mine"))
    assert named.served_model_name == "mine"
    assert with_model_here(ServeConfig(model="demo")) == ServeConfig(model="demo")
