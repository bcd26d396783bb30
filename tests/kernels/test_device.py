"""Which device is chosen, over every set-up that is wrong in its own way; no device is needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moeserve.errors import ConfigError
from moeserve.kernels.device import (
    Card,
    CudaFound,
    Devices,
    NpuFound,
    ascend_driver,
    cann_version,
    choose_device,
    examine_device,
    find_cuda,
    find_npu,
    nvidia_driver,
)
from moeserve.kernels.select import card_of_rank, device_ops

GIB = 1 << 30
H200 = Card("NVIDIA H200", 141 * GIB, 139 * GIB)
ATLAS = Card("Ascend910B3", 64 * GIB, 61 * GIB)
CUDA = CudaFound("580.95.05", "2.13.0+cu130", "13.0", "3.7.1", (H200, H200))
NPU = NpuFound("25.0.rc1", "8.3.RC1", "2.13.0+cpu", "2.13.0", (ATLAS,))
BARE = Devices(CudaFound(None, "2.13.0+cpu"), NpuFound(None, None, "2.13.0+cpu"))

BAD_CUDA = {
    "no driver": (CudaFound(None, "2.13.0+cpu"), "no NVIDIA driver", "install one"),
    "no torch": (CudaFound("580.1"), "torch is not installed", "install moeserve"),
    "torch without CUDA": (
        CudaFound("580.1", "2.13.0+cpu"),
        "2.13.0+cpu was built without CUDA",
        "pytorch.org names for driver 580.1",
    ),
    "old driver": (
        replace(CUDA, driver="535.183.01"),
        "535.183.01 is too old for CUDA 13.0",
        "install driver 580",
    ),
    "no card": (
        replace(CUDA, cards=(), trouble="CUDA unknown error"),
        "finds no card (CUDA unknown error)",
        "CUDA_VISIBLE_DEVICES",
    ),
    "no triton": (replace(CUDA, triton=None), "triton is missing", "moeserve[cuda]"),
}
BAD_NPU = {
    "no driver": (NpuFound(None), "no Ascend driver", "--device /dev/davinci0"),
    "no CANN": (replace(NPU, cann=None), "CANN is missing", "set_env.sh"),
    "no torch_npu": (replace(NPU, torch_npu=None), "torch_npu is missing", "'torch_npu==2.13.*'"),
    "another torch": (
        replace(NPU, torch_npu="2.9.0"),
        "torch_npu 2.9.0 is not for torch 2.13.0+cpu",
        "'torch_npu==2.13.*'",
    ),
    "no library": (
        replace(NPU, trouble="libhccl.so: cannot open shared object file"),
        "libhccl.so: cannot open",
        "set_env.sh",
    ),
    "another CANN": (
        replace(NPU, trouble="undefined symbol: aclrtMallocHost"),
        "undefined symbol: aclrtMallocHost",
        "install the CANN that this torch_npu names",
    ),
    "no card": (replace(NPU, cards=()), "finds no card", "npu-smi"),
    "an operator": (
        replace(NPU, lacking=("npu_moe_gating_top_k",)),
        "lacks the operators npu_moe_gating_top_k",
        "install 2.13",
    ),
}


@pytest.mark.parametrize("case", BAD_CUDA)
def test_a_cuda_that_cannot_be_used_is_one_line_with_a_remedy(case: str) -> None:
    found, problem, remedy = BAD_CUDA[case]
    refused(Devices(found, None), "cuda", problem, remedy)


@pytest.mark.parametrize("case", BAD_NPU)
def test_an_npu_that_cannot_be_used_is_one_line_with_a_remedy(case: str) -> None:
    found, problem, remedy = BAD_NPU[case]
    refused(Devices(None, found), "npu", problem, remedy)


def refused(found: Devices, kind: str, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_device(kind, found)
    said = error.value.message
    assert said.startswith(f"device={kind!r}: ")
    assert problem in said
    assert remedy in said
    assert "\n" not in said
    chosen = choose_device("auto", found)
    assert chosen.kind == "cpu"
    promised = "no NVIDIA driver" not in said and "no Ascend driver" not in said
    assert bool(chosen.warning) == promised
    assert not promised or remedy in chosen.warning


def test_auto_takes_what_can_be_used_and_the_cpu_without_a_word_otherwise() -> None:
    assert choose_device("auto", BARE).kind == "cpu"
    assert choose_device("auto", BARE).warning == ""
    chosen = choose_device("auto", Devices(CUDA, NpuFound(None)))
    assert (chosen.kind, chosen.why) == ("cuda", "2 x NVIDIA H200 found")
    assert choose_device("auto", Devices(CudaFound(None), NPU)).kind == "npu"
    half = Devices(replace(CUDA, triton=None), NPU)
    assert choose_device("auto", half).kind == "npu"
    assert choose_device("cpu", Devices()).kind == "cpu"
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda, npu"):
        choose_device("abacus", Devices())


def test_drivers_and_toolkits_are_read_from_their_files(tmp_path: Path) -> None:
    assert nvidia_driver(tmp_path) is None
    assert ascend_driver(tmp_path) is None
    assert cann_version(tmp_path, {}) is None
    proc = tmp_path / "proc/driver/nvidia"
    proc.mkdir(parents=True)
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build",
            "580.95.05",
        ),
        ("something else", "unknown"),
    ):
        (proc / "version").write_text(text)
        assert nvidia_driver(tmp_path) == version
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci_manager").touch()
    assert ascend_driver(tmp_path) == "unknown"
    driver = tmp_path / "usr/local/Ascend/driver"
    driver.mkdir(parents=True)
    (driver / "version.info").write_text("Version=25.0.rc1\nascendhal_version=7.35\n")
    assert ascend_driver(tmp_path) == "25.0.rc1"
    home = tmp_path / "toolkit"
    (home / "x86_64-linux").mkdir(parents=True)
    named = {"ASCEND_HOME_PATH": str(home)}
    assert cann_version(tmp_path, named) == "unknown"
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text("version=8.3.RC1\narch=x86_64\n")
    assert cann_version(tmp_path, named) == "8.3.RC1"


def test_of_this_machine_no_more_is_asked_than_its_files_promise(tmp_path: Path) -> None:
    cuda, npu = find_cuda(tmp_path), find_npu(tmp_path, {})
    assert (cuda.driver, cuda.built_for, cuda.cards) == (None, None, ())
    assert (npu.driver, npu.cann, npu.cards) == (None, None, ())
    report = examine_device("npu", tmp_path)
    assert report.chosen == ""
    assert "no Ascend driver" in report.problem
    assert report.line.startswith("none: ")
    assert examine_device("auto", tmp_path).line == "cpu: no driver of an accelerator is here"


def test_a_rank_without_a_card_of_its_own_is_named() -> None:
    found = Devices(CUDA, None)
    assert str(card_of_rank("cuda", found, 1)) == "cuda:1"
    with pytest.raises(ConfigError, match=r"rank 2 of this node has no card .* there are 2"):
        card_of_rank("cuda", found, 2)


UNTOUCHED = """
import sys, logging
logging.basicConfig(level="INFO")
from moeserve.errors import ConfigError
from moeserve.kernels.select import choose_ops
for asked in ("cpu", "auto"):
    assert choose_ops(asked).device.type == "cpu"
for asked in ("cuda", "npu", "cuda:1"):
    try:
        choose_ops(asked)
    except ConfigError as refused:
        assert "driver is here" in refused.message, refused.message
import torch
assert not torch.cuda.is_initialized()
names = ("triton", "torch_npu", "moeserve.kernels.triton", "moeserve.kernels.ascend")
print(sorted(set(names) & set(sys.modules)))
"""


def test_nothing_of_an_accelerator_is_imported_where_none_is_here() -> None:
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/davinci_manager").exists():
        return  # there is one
    done = subprocess.run(
        [sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_table_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "moeserve.kernels.triton.ops", None)
    with pytest.raises(ConfigError, match=r"install moeserve with the extra cuda"):
        device_ops(torch.device("cuda", 0))
