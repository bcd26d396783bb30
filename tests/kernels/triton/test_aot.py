"""Every kernel compiles for devices that are not here: right instructions, nothing spilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIMITS = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "hip:gfx942": 64 << 10}


def compiled(target: str, only: str, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own, for this one's kernels are interpreted."""
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


def holds(target: str, found: list[dict[str, Any]]) -> None:
    for kernel in found:
        assert not kernel["spills"], kernel
        assert not kernel["approximate"], kernel
        assert kernel["shared"] <= LIMITS[target], kernel
        assert bool(kernel["products"]) == kernel["integer"], kernel


def test_experts_of_codes_use_the_integer_unit_of_hopper(tmp_path: Path) -> None:
    found = compiled("cuda:90", "up-int8-64", tmp_path)
    assert [k["name"] for k in found] == ["up-int8-64x64x128"]
    assert all("wgmma" in product for product in found[0]["products"])
    holds("cuda:90", found)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", LIMITS)
def test_every_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    found = compiled(target, "", tmp_path)
    assert len(found) > 40
    holds(target, found)
