"""The container files build from what is here, and start what the settings allow."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from moeserve.config.options import ServeConfig
from moeserve.config.sources import ENV_PREFIX, load_config
from moeserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "launch/container").glob("Containerfile.*"))
KNOWN = {
    "ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL",
    "USER", "WORKDIR",
}  # fmt: skip
A_HOST = re.compile(r"https?://([^/\s'\"]+)")
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    rest: str


def instructions(file: Path) -> list[Instruction]:
    """Comments left out, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(file: Path, word: str) -> list[str]:
    return [i.rest for i in instructions(file) if i.word == word]


def environment(file: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of(file, "ENV") for pair in line.split())


def test_there_is_one_for_cpus_and_one_for_cuda() -> None:
    assert [file.suffix for file in FILES] == [".cpu", ".cuda"]


@each_file
def test_every_instruction_is_known_and_stages_are_there(file: Path) -> None:
    assert {i.word for i in instructions(file)} == KNOWN
    stages = {stage.split(" AS ")[1] for stage in of(file, "FROM") if " AS " in stage}
    copied_from = set(re.findall(r"--from=(\S+)", " ".join(of(file, "COPY"))))
    assert copied_from == stages
    (entry,) = of(file, "ENTRYPOINT")
    assert json.loads(entry) == ["moeserve", "serve"]
    assert of(file, "USER")[-1] not in ("root", "0")


@each_file
def test_what_is_copied_is_in_the_checkout_and_python_is_new_enough(file: Path) -> None:
    for line in of(file, "COPY"):
        if "--from=" not in line:
            assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    (python,) = (rest.removeprefix("PYTHON=") for rest in of(file, "ARG"))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python in SpecifierSet(declared)


@each_file
def test_it_serves_with_a_key_and_refuses_to_without(file: Path) -> None:
    settings = {n: v for n, v in environment(file).items() if n.startswith(ENV_PREFIX)}
    config = load_config({}, settings | {"MOESERVE_API_KEY": "a-long-secret"})
    assert config.host == "0.0.0.0"
    with pytest.raises(ConfigError, match="set api_key"):
        load_config({}, settings)
    ports = {int(port) for port in of(file, "EXPOSE")[0].split()}
    assert (
        ports
        == {config.http_port, config.grpc_port}
        == {ServeConfig.model_fields[name].default for name in ("http_port", "grpc_port")}
    )
    assert f"127.0.0.1:{config.http_port}/health" in of(file, "HEALTHCHECK")[0]


def test_only_the_cpu_file_names_an_index_and_it_is_pytorch_s() -> None:
    hosts = {file.suffix: set(A_HOST.findall(" ".join(of(file, "RUN")))) for file in FILES}
    assert hosts == {".cpu": {"download.pytorch.org"}, ".cuda": set()}
    assert hosts[".cpu"] < set(A_HOST.findall((ROOT / "README.md").read_text()))


def test_what_is_built_here_stays_out_of_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in (ROOT / ".gitignore").read_text().split():
        if line in (".venv/", "build/", "dist/", "*.so", "__pycache__/"):
            assert any(line.rstrip("/") in entry for entry in ignored), line
