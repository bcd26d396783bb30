"""Where nothing can be compiled the package is built all the same, serves, and says so once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("moeserve", "kernels", "placement")
FILES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
BUILD = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"


def built(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel from a copy of the sources, with a compiler that fails."""
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in FILES:
        shutil.copy(ROOT / name, source)
    clean = {k: v for k, v in os.environ.items() if k != "MOESERVE_REQUIRE_NATIVE"}
    scripts = sysconfig.get_path("scripts")
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=source,
        env=clean
        | {"PATH": f"{scripts}:{os.environ['PATH']}", "CXX": shutil.which("false") or "false"}
        | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def twins_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as installed from that wheel."""
    folder = tmp_path_factory.mktemp("no-compiler")
    done = built(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without its native half" in done.stdout + done.stderr
    [wheel] = folder.glob("moeserve-*-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_it_answers_through_the_twins_and_says_so_once(twins_only: Path) -> None:
    path = os.pathsep.join([str(twins_only), sysconfig.get_path("purelib")])
    words = ["generate", "--model", "demo", "--prompt", "Once", "--max-tokens", "2", "--json"]
    done = subprocess.run(
        # -S: the checkout that this environment was made from must not be found.
        [sys.executable, "-S", "-P", "-m", "moeserve.cli", *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=twins_only,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    assert done.stderr.count("no native kernels") == 1
    assert not list(twins_only.rglob("*.so"))


def test_where_the_native_half_is_required_the_build_fails(tmp_path: Path) -> None:
    done = built(tmp_path, MOESERVE_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
