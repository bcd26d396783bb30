"""Whether tokens can stay on devices between ranks: every bad set-up is one line with a remedy."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moeserve.comm.exchange.base import Lanes
from moeserve.comm.exchange.cards import DEVICE_BACKENDS, RankDevice, choose, device_of_rank, meet
from moeserve.comm.exchange.collective import BeginningOrder
from moeserve.comm.exchange.media import lacking
from moeserve.comm.exchange.open import open_device_exchange
from moeserve.comm.group import Group, Topology
from moeserve.errors import ConfigError

LAUNCH = Path(__file__).parents[2] / "launch"
ONE, TWO = RankDevice("cuda", "GPU-1"), RankDevice("cuda", "GPU-2")
NPU = RankDevice("npu", "npu:0")
CPU = RankDevice("cpu")
ON_HOST = "the experts of layer 3 run on the host"


@pytest.mark.parametrize(
    ("devices", "nodes", "taken"),
    [
        ([ONE, TWO], [0, 0], "nccl"),
        ([ONE, ONE], [0, 1], "nccl"),  # of two hosts, whatever they are called there
        ([ONE, ONE], [0, 0], "mapped"),
        ([RankDevice("cuda", "GPU-1", lacks="no NCCL"), TWO], [0, 0], "mapped"),
        ([RankDevice("cuda", "GPU-1", lacks="no NCCL"), TWO], [0, 1], ""),
        ([NPU, RankDevice("npu", "npu:1")], [0, 0], "hccl"),
        ([ONE, CPU], [0, 0], ""),
        ([ONE, NPU], [0, 0], ""),
        (
            [ONE, RankDevice("cuda", "GPU-2", on_host=ON_HOST)],
            [0, 0],
            "",
        ),
        ([CPU, CPU], [0, 0], ""),
    ],
)
def test_auto_keeps_tokens_on_devices_where_all_ranks_can(
    devices: list[RankDevice], nodes: list[int], taken: str
) -> None:
    assert choose("auto", devices, nodes) == taken


@pytest.mark.parametrize(
    ("asked", "devices", "nodes", "told"),
    [
        ("nccl", [ONE, CPU], [0, 0], "'nccl': it joins cuda devices alone, not the cpu of rank 1"),
        ("hccl", [ONE, TWO], [0, 0], "'hccl': it joins npu devices alone, not the cuda of ranks 0"),
        ("nccl", [ONE, TWO, ONE], [0, 0, 0], "ranks 0 and 2 share the card GPU-1"),
        ("nccl", [ONE, RankDevice("cuda", "", lacks="torch 2 was built without NCCL: x")], [0, 0],
         "'nccl': rank 1: torch 2 was built without NCCL: x"),
        ("mapped", [ONE, TWO], [0, 1], "'mapped': ranks are spread over 2 nodes: choose 'auto'"),
        ("mapped", [ONE, RankDevice("cuda", "b", on_host=ON_HOST)],
         [0, 0], "rank 1: the experts of layer 3 run on the host: choose 'auto'"),
    ],
)  # fmt: skip
def test_what_was_asked_for_and_cannot_be_is_refused(
    asked: str, devices: list[RankDevice], nodes: list[int], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        choose(asked, devices, nodes)
    assert told in error.value.message and "\n" not in error.value.message


kinds = st.sampled_from(["cpu", "cuda", "npu"])
device = st.builds(
    RankDevice, kinds, st.sampled_from("ab"), st.sampled_from(["", "x"]), st.just("")
)


@given(st.lists(device, min_size=2, max_size=4))
def test_auto_never_takes_what_would_be_refused(devices: list[RankDevice]) -> None:
    nodes = [0] * len(devices)
    taken = choose("auto", devices, nodes)
    if taken:
        assert choose(taken, devices, nodes) == taken
        return
    for asked in DEVICE_BACKENDS:
        with pytest.raises(ConfigError):
            choose(asked, devices, nodes)


def test_ranks_hear_of_one_another_and_refuse_alike() -> None:
    store = HashStore()
    own = device_of_rank(torch.device("cpu"), [])

    def rank(r: int) -> str:
        group = Group(r, 2, store)
        assert meet("shm", group, own, [0, 0]) == ""
        with pytest.raises(ConfigError) as error:
            meet("nccl", group, own, [0, 0])
        return error.value.message

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank, range(2))
    assert one == other
    with pytest.raises(ConfigError, match="no device of rank 1"):
        RankDevice.read(b'{"kind": 3}', 1)
    with pytest.raises(ConfigError, match="no device of rank 1"):
        RankDevice.read(b"[1]", 1)


def environment(driver: Path, **given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / "cuda.sh"), "env"],
        env={"PATH": os.environ["PATH"], "DRIVER": str(driver)} | given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_launch_script_sets_what_ranks_need_or_says_what_is_missing(tmp_path: Path) -> None:
    missing = environment(tmp_path / "version")
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"cuda.sh: there is no {tmp_path}/version: install NVIDIA's")
    (tmp_path / "version").write_text("")
    found = environment(tmp_path / "version", TORCH_NCCL_ENABLE_MONITORING="1")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=0\n" in found.stdout
    assert "TORCH_NCCL_ENABLE_MONITORING=1\n" in found.stdout


@pytest.mark.parametrize(("kind", "told"), [("cuda", "without NCCL"), ("npu", "no HCCL")])
def test_a_torch_without_the_library_is_told_so_in_one_line(kind: str, told: str) -> None:
    reason = lacking(kind)
    assert told in reason and "choose 'tcp'" in reason and "\n" not in reason


def test_nothing_is_left_of_an_exchange_whose_library_is_missing() -> None:
    store = HashStore()

    def rank(r: int) -> None:
        with pytest.raises(ConfigError, match="NCCL"):
            open_device_exchange(
                "nccl", Group(r, 2, store), Topology((0, 0)), Lanes((64,)), torch.device("cuda", r),
                BeginningOrder(),
            )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
