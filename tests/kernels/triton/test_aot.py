"""Every kernel compiles for devices that are not here: right instructions, nothing spilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = 227 << 10  # of a multiprocessor of Hopper


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


def holds(found: list[dict[str, Any]]) -> None:
    for kernel in found:
        assert not kernel["approximate"], kernel
        assert kernel["shared"] <= SHARED, kernel
        assert bool(kernel["products"]) == kernel["integer"], kernel


def test_experts_of_codes_use_the_integer_unit_of_hopper(tmp_path: Path) -> None:
    found = compiled("cuda:90", "up-int8-64", tmp_path)
    assert [k["name"] for k in found] == ["up-int8-64x64x128"]
    assert all("wgmma" in product for product in found[0]["products"])
    assert not found[0]["spills"]
    holds(found)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("only", ["linear-int8", "up-int8", "down-int8"])
def test_products_of_codes_spill_no_register(only: str, tmp_path: Path) -> None:
    found = compiled("cuda:90", only, tmp_path)
    assert len(found) == 3
    assert not any(kernel["spills"] for kernel in found)
    holds(found)
