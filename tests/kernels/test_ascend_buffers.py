"""HCCL's buffer is known at start, and one that is too small is refused with the number."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError
from moeserve.kernels.ascend.buffers import (
    ENVIRONMENT,
    MIB,
    ExpertTraffic,
    least_buffer,
    least_mib,
)
from moeserve.kernels.ascend.buffers import require_buffer as require

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
# DeepSeek-V3 over 16 ranks of 16 experts, 64 tokens each.
V3 = ExpertTraffic(world=16, local=16, tokens=64, hidden=7168, top_k=8)


def test_the_formula_is_the_documentation_s() -> None:
    row_in, row_out = 14848, 14336  # align512(align32(2 * 7168) + 64), align512(2 * 7168)
    assert least_buffer(V3) == 2 * (16 * 64 * 16 * row_in + 8 * 64 * row_out)
    assert least_mib(V3) == 478


def test_a_buffer_that_is_too_small_is_refused_with_what_is_needed() -> None:
    require(V3, {"HCCL_BUFFSIZE": "478"})
    for environ in ({}, {"HCCL_BUFFSIZE": "477"}):
        with pytest.raises(ConfigError, match="need 478 MiB: set HCCL_BUFFSIZE=478") as refused:
            require(V3, environ)
        assert ("is not set, which means 200" in refused.value.message) == (not environ)
    with pytest.raises(ConfigError, match="expected a number of MiB"):
        require(V3, {"HCCL_BUFFSIZE": "1GB"})


counts = st.integers(1, 512)


@given(counts, counts, counts, st.integers(1, 8192), st.integers(1, 16))
def test_more_of_anything_needs_no_less(w: int, e: int, t: int, h: int, k: int) -> None:
    least = least_buffer(ExpertTraffic(w, e, t, h, k))
    assert least_mib(ExpertTraffic(w, e, t, h, k)) * MIB >= least
    for more in ((1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0)):
        a, b, c, d, f = (x + y for x, y in zip((w, e, t, h, k), more, strict=True))
        assert least_buffer(ExpertTraffic(a, b, c, d, f)) >= least


def environment(cann: Path, **given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / "ascend.sh"), "env"],
        env={"PATH": os.environ["PATH"], "CANN": str(cann)} | given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_launch_script_sets_what_ranks_need_and_keeps_what_is_set(tmp_path: Path) -> None:
    (tmp_path / "set_env.sh").write_text('export ASCEND_HOME_PATH="$UNSET/cann"\n')
    found = environment(tmp_path, TASK_QUEUE_ENABLE="2")
    said = dict(line.split("=", 1) for line in found.stdout.splitlines())
    assert said["ASCEND_HOME_PATH"] == "/cann"
    assert {name: said[name] for name in ENVIRONMENT} == ENVIRONMENT | {"TASK_QUEUE_ENABLE": "2"}


def test_the_launch_script_says_where_it_looked_for_cann(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert found.returncode == 1
    assert found.stderr.splitlines() == [
        f"ascend.sh: there is no {tmp_path}/set_env.sh: install CANN, or name its folder in CANN"
    ]
