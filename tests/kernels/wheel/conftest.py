"""The wheel of torch_npu itself, imported without CANN: an optional group of tests.

::

    make ascend-schemas

fetches the wheel into a folder and names it in ``ASCEND_WHEEL``; without the variable nothing in
here is collected. CANN's libraries are replaced by stubs: every function that the wheel wants and
that neither torch nor the system has, returning 0. That is enough for ``import torch_npu``, its
schemas and its Meta kernels; nothing can be computed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

WHEEL = os.environ.get("ASCEND_WHEEL", "")
collect_ignore_glob = [] if WHEEL else ["*"]

STUBS = (
    "hccl ascendcl acl_op_compiler ge_runner graph acl_tdt_channel fmk_parser ascend_protobuf atb"
).split()
RUN_S = 300


def symbols(library: Path, *, defined: bool) -> set[str]:
    which = "--defined-only" if defined else "--undefined-only"
    listed = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=False, timeout=60
    )
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.split()}


def system_libraries() -> Iterator[Path]:
    """What this process has mapped: torch's, the interpreter's, and the system's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps if ".so" in line}
    yield from (Path(path) for path in paths if Path(path).is_file())
    yield from Path(torch.__file__).parent.glob("lib/*.so*")
    yield Path(sys.executable)


@pytest.fixture(scope="session")
def wheel() -> Path:
    return Path(WHEEL)


@pytest.fixture(scope="session")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs a script in an interpreter that can import torch_npu, and gives what it printed."""
    site, stubs = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("stubs")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    libraries = list((site / "torch_npu").rglob("*.so"))
    wanted = set[str]().union(*(symbols(library, defined=False) for library in libraries))
    there = set[str]().union(*(symbols(x, defined=True) for x in [*libraries, *system_libraries()]))
    missing = sorted(name for name in wanted - there if name.isidentifier())
    source = stubs / "stubs.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
    for at, name in enumerate(STUBS):
        file, soname = stubs / f"lib{name}.so", f"-Wl,-soname,lib{name}.so"
        content = [str(source)] if at == 0 else ["-x", "c", "/dev/null"]
        command = ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", soname, "-o", str(file)]
        subprocess.run([*command, *content], check=True, timeout=120)

    def script(text: str) -> str:
        environ = os.environ | {
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "LD_LIBRARY_PATH": str(stubs),
            "PYTHONPATH": str(site),
        }
        done = subprocess.run(
            [sys.executable, "-c", text],
            env=environ,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return script
