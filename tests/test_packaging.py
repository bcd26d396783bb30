"""What a clone, a wheel and a contributor rely on: pins, declared dependencies, targets."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moeserve

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"deepspeed", "ascend", "mpi", "highs", "hub", "dev"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared() -> list[Requirement]:
    return [Requirement(line) for line in pyproject()["project"]["dependencies"]]


def development() -> list[Requirement]:
    return [Requirement(r) for r in pyproject()["project"]["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@functools.cache
def installed() -> Mapping[str, str]:
    """Every distribution that the package and its development pull in, with its version."""
    found: dict[str, str] = {}
    todo = [(r.name, frozenset(r.extras)) for r in [*declared(), *development()]]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version.partition("+")[0]
        for requirement in map(Requirement, distribution.requires or ()):
            marks = requirement.marker
            wanted = ("", *extras)
            if marks is None or any(marks.evaluate({"extra": extra}) for extra in wanted):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found


def test_every_constraint_is_an_exact_version() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)


def test_everything_that_gets_installed_is_pinned() -> None:
    assert installed().keys() <= pins().keys()


def test_this_environment_is_the_pinned_one() -> None:
    assert installed() == {name: pins()[name] for name in installed()}


def test_pins_lie_within_the_ranges_of_the_library() -> None:
    pinned_versions = pins()
    for requirement in [*declared(), *development()]:
        pinned = pinned_versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), requirement


def test_torch_is_pinned_but_the_library_takes_a_range() -> None:
    assert pins()["torch"] == "2.13.0"
    torch = next(r for r in declared() if r.name == "torch")
    assert torch.specifier.contains("2.8.0")
    assert torch.specifier.contains("2.20.0")


def optional() -> set[str]:
    extras = pyproject()["project"]["optional-dependencies"].items()
    return {canonicalize_name(Requirement(r).name) for e, rs in extras if e != "dev" for r in rs}


def modules_imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names of third parties."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"moeserve"}


@functools.cache
def providers() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def not_provided(modules: set[str], by: set[str]) -> set[str]:
    """Names like ``google`` come from several distributions: one of them is enough."""
    found = {m: {canonicalize_name(d) for d in providers().get(m, [m])} for m in modules}
    return {m for m, distributions in found.items() if not distributions & by}


# Kernels are functions that a package decorates, so it is there when their module is imported; that
# is done where their device was asked for (``kernels/select.py``), and nowhere else.
KERNELS = {"moeserve/kernels/triton": "triton"}


def test_modules_import_what_is_declared_and_extras_only_when_asked() -> None:
    required = {canonicalize_name(r.name) for r in declared()}
    allowed = required | optional()
    offenders = []
    for path in sorted((ROOT / "moeserve").rglob("*.py")):
        nodes = set(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        inside = {n for f in nodes if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
        kernels = {by for at, by in KERNELS.items() if path.is_relative_to(ROOT / at)}
        for where, part, by in (
            ("at import", nodes - inside, required | kernels),
            ("inside a function", inside, allowed),
        ):
            undeclared = sorted(not_provided(modules_imported(part), by))
            offenders += [f"{path.relative_to(ROOT)} imports {name} {where}" for name in undeclared]
    assert not offenders, "\n".join(offenders)


def test_generated_messages_accept_the_oldest_declared_runtime() -> None:
    text = (ROOT / "moeserve/pb/inference_pb2.py").read_text(encoding="utf-8")
    generated = re.search(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE)
    assert generated
    protobuf = next(r for r in declared() if r.name == "protobuf")
    assert str(protobuf.specifier) == f">={generated[1]}"


def test_extras_hold_what_a_default_environment_must_not() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    assert extras.keys() >= EXTRAS
    assert not {"torch-npu", "deepspeed", "ortools"} & pins().keys()


def test_versions_agree() -> None:
    assert pyproject()["project"]["version"] == moeserve.__version__
    assert importlib.metadata.version("moeserve") == moeserve.__version__


def test_the_console_script_exists() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="moeserve")
    assert [script.load().__module__ for script in scripts] == ["moeserve.cli"]


def test_no_file_names_a_package_index() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links|trusted-host", text), name


def make(*words: str) -> str:
    done = subprocess.run(
        ["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_its_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE))
    listed = set(re.findall(r"^  make ([\w-]+)", make(), re.MULTILINE))
    assert listed == set(phony.split()) >= {"demo", "test", "check", "bench", "proto", "clean"}


def find_python(candidates: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ROOT / ".ci/find-python"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": candidates},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_good_interpreter_is_found() -> None:
    assert find_python(sys.executable).stdout.strip() == sys.executable


def test_an_old_interpreter_is_refused_with_its_version(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'is 3.9.2, older than 3.11' >&2\nexit 1\n")
    old.chmod(0o755)
    done = find_python(str(old))
    assert done.returncode == 1
    assert f"{old}: is 3.9.2, older than 3.11" in done.stderr
    assert "PYTHON=/path/to/python3" in done.stderr


def test_commit_hooks_run_what_is_installed() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {h["id"]: h for h in config["repos"][0]["hooks"]}
    for name in ("ruff", "ruff-format", "mypy", "layout"):
        assert hooks[name]["language"] == "system", name
        assert hooks[name]["entry"].startswith(".venv/bin/"), name


def test_the_licence_is_apache_2_in_full() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert pyproject()["project"]["license"] == "Apache-2.0"
