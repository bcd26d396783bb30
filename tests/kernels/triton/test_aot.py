"""Every kernel compiles for devices that are not here: right instructions, nothing spilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def compiled(target: str, only: str, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own, for this one's kernels are interpreted; it fails where a kernel
    spills, has too much shared memory, an approximate instruction, or not the integer unit."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "moeserve.kernels.triton.aot", "--target", target, "--only", only],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_experts_of_codes_use_the_integer_unit_of_hopper(tmp_path: Path) -> None:
    (found,) = compiled("cuda:90", "up-int8-64", tmp_path)
    assert found["name"] == "up-int8-64x64x128"
    assert all("wgmma" in product for product in found["products"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "only"), [("cuda:80", "attend-gqa-i8"), ("hip:gfx942", "down-int8-16")]
)
def test_older_and_other_devices_have_integer_units_too(
    target: str, only: str, tmp_path: Path
) -> None:
    (found,) = compiled(target, only, tmp_path)
    assert found["products"]
    assert not found["note"]


@pytest.mark.long
def test_a_device_without_a_fast_integer_unit_says_so(tmp_path: Path) -> None:
    (found,) = compiled("cuda:100", "down-int8-16", tmp_path)
    assert "tcgen05" in found["note"]


@pytest.mark.rare
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_fault(target: str, tmp_path: Path) -> None:
    found = compiled(target, "", tmp_path)
    assert len(found) > 40
    assert {k["name"] for k in found} >= {"attend-mla-i8", "attend-mla-bf16", "merge-mla", "route"}
