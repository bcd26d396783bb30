"""Which device a process computes on: what was found, and why one was chosen.

``find_cuda`` and ``find_npu`` look; ``choose_device`` decides over what they found, and is pure, so
that every bad set-up is a test. Nothing of CUDA or CANN is imported where no driver is found, nor
where the CPU was asked for; torch is imported only beside a driver. A device that was asked for and
cannot be had is a ConfigError of one line that says what is missing and what to do; ``auto`` then
takes the CPU, and says why only where a driver promised more.

Sizes are bytes. A version that is unknown is "unknown", one of what is absent None.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeserve.errors import ConfigError

if TYPE_CHECKING:
    import torch

KINDS = ("cpu", "cuda", "npu")
ASKED = ("auto", *KINDS)

# The oldest driver of each CUDA release that runs programs built for any minor version of it
# (docs.nvidia.com/deploy/cuda-compatibility).
LEAST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}

NVIDIA_DRIVER = "proc/driver/nvidia/version"
ASCEND_DEVICE = "dev/davinci_manager"
ASCEND_DRIVER = "usr/local/Ascend/driver/version.info"
# Where set_env.sh of CANN says that it is, and where it is installed without being asked.
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_FOLDER = "usr/local/Ascend/ascend-toolkit/latest"
SOURCE_CANN = "source set_env.sh of the CANN toolkit (/usr/local/Ascend/ascend-toolkit/set_env.sh)"


@dataclass(frozen=True, slots=True)
class Card:
    """One device; ``free`` is what a process may still take of ``total``."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class CudaFound:
    """``built_for`` is the CUDA release that torch was built with; ``trouble`` what torch said
    instead of naming its cards."""

    driver: str | None
    torch: str | None = None
    built_for: str | None = None
    triton: str | None = None
    cards: tuple[Card, ...] = ()
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class NpuFound:
    """``trouble`` is what importing torch_npu or asking for its cards failed with; ``lacking`` are
    operators that the backend cannot do without and this torch_npu has not."""

    driver: str | None
    cann: str | None = None
    torch: str | None = None
    torch_npu: str | None = None
    cards: tuple[Card, ...] = ()
    trouble: str = ""
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Devices:
    """What was looked for; None is what nobody asked about."""

    cuda: CudaFound | None = None
    npu: NpuFound | None = None

    def cards(self, kind: str) -> tuple[Card, ...]:
        found = {"cuda": self.cuda, "npu": self.npu}.get(kind)
        return () if found is None else found.cards


@dataclass(frozen=True, slots=True)
class Chosen:
    """``why`` is one clause; ``warning`` what the log should say, if anything."""

    kind: str
    why: str
    warning: str = ""


def choose_device(asked: str, found: Devices) -> Chosen:
    """Pure; ConfigError where the device asked for cannot be had."""
    if asked not in ASKED:
        raise ConfigError(f"device={asked!r}: expected one of {', '.join(ASKED)}")
    if asked == "cpu":
        return Chosen("cpu", "asked for")
    problems = {"cuda": problem_of_cuda(found.cuda), "npu": problem_of_npu(found.npu)}
    if asked != "auto":
        if problems[asked]:
            raise ConfigError(f"device={asked!r}: {problems[asked]}")
        return Chosen(asked, "asked for")
    promised = [kind for kind in problems if has_driver(found, kind)]
    for kind in promised:
        if not problems[kind]:
            return Chosen(kind, f"{len(found.cards(kind))} x {found.cards(kind)[0].name} found")
    if not promised:
        return Chosen("cpu", "no driver of an accelerator is here")
    why = "; ".join(f"{kind}: {problems[kind]}" for kind in promised)
    return Chosen("cpu", why, f"the CPU serves, though a driver is here; {why}")


def has_driver(found: Devices, kind: str) -> bool:
    look = {"cuda": found.cuda, "npu": found.npu}[kind]
    return look is not None and look.driver is not None


def problem_of_cuda(found: CudaFound | None) -> str:
    """Why CUDA cannot be used, and what to do; empty where it can."""
    if found is None or found.driver is None:
        return (
            f"no NVIDIA driver is here (/{NVIDIA_DRIVER}): install one, or in a container pass the "
            "devices in (--gpus all)"
        )
    if found.torch is None:
        return "torch is not installed: install moeserve with its dependencies"
    if found.built_for is None:
        return (
            f"torch {found.torch} was built without CUDA: install the build that pytorch.org names "
            f"for driver {found.driver}"
        )
    if (least := least_driver(found.built_for)) > major(found.driver):
        return (
            f"driver {found.driver} is too old for CUDA {found.built_for}, which torch "
            f"{found.torch} was built for: install driver {least} or newer, or a torch built for "
            "an older CUDA"
        )
    if not found.cards:
        return (
            f"driver {found.driver} is here, and torch {found.torch} finds no card "
            f"({found.trouble or 'it names no reason'}): look at nvidia-smi and at "
            "CUDA_VISIBLE_DEVICES"
        )
    if found.triton is None:
        return "triton is missing: pip install 'moeserve[cuda]'"
    return ""


def problem_of_npu(found: NpuFound | None) -> str:
    """Why an Ascend NPU cannot be used, and what to do; empty where it can."""
    if found is None or found.driver is None:
        return (
            f"no Ascend driver is here (/{ASCEND_DEVICE}): install it, or in a container pass the "
            "devices in (--device /dev/davinci0 --device /dev/davinci_manager)"
        )
    if found.cann is None:
        return f"CANN is missing ({' or '.join(CANN_VARIABLES)}): install it, then {SOURCE_CANN}"
    if found.torch_npu is None:
        wanted = "" if found.torch is None else f"=={minor(found.torch)}.*"
        return f"torch_npu is missing: pip install 'moeserve[ascend]' 'torch_npu{wanted}'"
    if found.torch is None or minor(found.torch) != minor(found.torch_npu):
        wanted = minor(found.torch or found.torch_npu)
        return (
            f"torch_npu {found.torch_npu} is not for torch {found.torch}: pip install "
            f"'torch_npu=={wanted}.*'"
        )
    if found.trouble:
        return (
            f"torch_npu {found.torch_npu} with CANN {found.cann}: {found.trouble}: {SOURCE_CANN}; "
            "where a symbol is undefined, install the CANN that this torch_npu names"
        )
    if not found.cards:
        return "torch_npu finds no card: look at npu-smi info and at ASCEND_RT_VISIBLE_DEVICES"
    if found.lacking:
        return (
            f"torch_npu {found.torch_npu} lacks the operators {', '.join(found.lacking)}: install "
            "2.13 or newer, with its torch"
        )
    return ""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What ``serve`` would compute on: ``chosen`` is empty where that is a ``problem``; a ``note``
    is what its log would say."""

    asked: str
    chosen: str
    why: str
    found: Devices
    problem: str = ""
    note: str = ""
    attention: str = "device"

    @property
    def line(self) -> str:
        cards = self.found.cards(self.chosen)
        sizes = "".join(
            f"\n{self.chosen}:{i} {c.name}, {c.free >> 20} of {c.total >> 20} MiB free"
            for i, c in enumerate(cards)
        )
        apart = "; attention and KV on the CPU" if self.attention != "device" else ""
        return f"{self.chosen or 'none'}: {self.why}{apart}{sizes}"


def examine_device(asked: str, root: Path = Path("/")) -> DeviceReport:
    """For ``doctor``; raises nothing."""
    found = look_for(asked, root)
    try:
        chosen = choose_device(asked, found)
    except ConfigError as refused:
        return DeviceReport(asked, "", refused.message, found, problem=refused.message)
    return DeviceReport(asked, chosen.kind, chosen.why, found, note=chosen.warning)


def least_driver(cuda: str) -> int:
    """0 where the release is not known."""
    return LEAST_DRIVER.get(major(cuda), 0)


def major(version: str) -> int:
    """``580.95.05`` -> 580; 0 where it does not begin with a number."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def minor(version: str) -> str:
    """``2.13.0+cpu`` -> ``2.13``."""
    return ".".join(version.split("+")[0].split(".")[:2])


def look_for(asked: str, root: Path = Path("/")) -> Devices:
    """What ``choose_device`` needs to know for what is asked."""
    return Devices(
        find_cuda(root) if asked in ("auto", "cuda") else None,
        find_npu(root, os.environ) if asked in ("auto", "npu") else None,
    )


def find_cuda(root: Path = Path("/")) -> CudaFound:
    driver = nvidia_driver(root)
    torch = version_of("torch")
    if driver is None or torch is None:
        return CudaFound(driver, torch)
    built_for = importlib.import_module("torch").version.cuda
    cards, trouble = cards_of("cuda") if built_for else ((), "")
    return CudaFound(driver, torch, built_for, version_of("triton"), cards, trouble)


def find_npu(root: Path, environ: Mapping[str, str]) -> NpuFound:
    driver, cann = ascend_driver(root), cann_version(root, environ)
    torch, torch_npu = version_of("torch"), version_of("torch_npu")
    found = NpuFound(driver, cann, torch, torch_npu)
    if None in (driver, cann, torch, torch_npu) or problem_of_npu_versions(found):
        return found
    try:
        importlib.import_module("torch_npu")
        lacking = importlib.import_module("moeserve.kernels.ascend.calls").lacking()
    except (ImportError, OSError, RuntimeError) as broken:
        return NpuFound(driver, cann, torch, torch_npu, trouble=one_line(broken))
    cards, trouble = cards_of("npu")
    return NpuFound(driver, cann, torch, torch_npu, cards, trouble, tuple(lacking))


def problem_of_npu_versions(found: NpuFound) -> bool:
    return minor(found.torch or "") != minor(found.torch_npu or "")


def cards_of(kind: str) -> tuple[tuple[Card, ...], str]:
    """Of ``torch.cuda`` or ``torch.npu``, and what went wrong instead; says nothing itself."""
    backend = getattr(importlib.import_module("torch"), kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cards = tuple(card_of(backend, i) for i in range(backend.device_count()))
        except (RuntimeError, OSError, AssertionError) as broken:
            return (), one_line(broken)
    return cards, "" if cards or not said else one_line(said[0].message)


def card_of(backend: Any, index: int) -> Card:
    free, total = backend.mem_get_info(index)
    return Card(str(backend.get_device_name(index)), int(total), int(free))


def one_line(error: object, most: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def nvidia_driver(root: Path) -> str | None:
    """From ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue ...``."""
    text = text_of(root / NVIDIA_DRIVER)
    if text is None:
        return None
    found = re.search(r"(?:Kernel Module\D*?|for x86_64\s+)(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def ascend_driver(root: Path) -> str | None:
    """From ``Version=25.0.rc1``; only where the driver's device file is there as well."""
    if not (root / ASCEND_DEVICE).exists():
        return None
    found = re.search(r"(?im)^version=(\S+)", text_of(root / ASCEND_DRIVER) or "")
    return found[1] if found else "unknown"


def cann_version(root: Path, environ: Mapping[str, str]) -> str | None:
    """Of the toolkit that the environment names, or that lies where it is installed."""
    named = [Path(environ[name]) for name in CANN_VARIABLES if environ.get(name)]
    for home in (*named, root / CANN_FOLDER):
        if home.is_dir():
            infos = [*sorted(home.glob("*/ascend_toolkit_install.info")), home / "version.cfg"]
            texts = "\n".join(text_of(info) or "" for info in infos)
            found = re.search(r"(?im)^(?:version|.*running_version)=\[?(?:[\d.]+:)?([\w.]+)", texts)
            return found[1] if found else "unknown"
    return None


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def free_memory(device: torch.device) -> Card:
    """What the device of an op table has now; not of a CPU (``host.read_memory``)."""
    backend = getattr(importlib.import_module("torch"), device.type)
    return card_of(backend, device.index or 0)
