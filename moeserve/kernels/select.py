"""Choose the op table of a device, once, when an engine starts.

The native half may be missing where the package was not built: plain torch then does its work,
much slower, and the log says so. With ``MOESERVE_REQUIRE_NATIVE=1`` that is an error instead.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import cast

import torch

from moeserve.errors import ConfigError
from moeserve.kernels.device import ASKED, Devices, choose_device, look_for
from moeserve.kernels.ops import Ops
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.native import native_module

# Gives so many bytes of memory, uint8.
KvRoom = Callable[[int], torch.Tensor]
# The op tables of accelerators: imported only where one is chosen, and made with their device.
TABLES = {
    "cuda": ("moeserve.kernels.triton.ops", "TritonOps"),
    "npu": ("moeserve.kernels.ascend.ops", "AscendOps"),
}


def choose_ops(
    device: str | torch.device = "cpu",
    threads: int | None = None,
    *,
    local_rank: int = 0,
    host_attention: bool = False,
) -> Ops:
    """The backend of a device, which is then its ``device``.

    ``device`` is one of ``device.ASKED``, or names a card as torch does ("cuda:1"); where it names
    none, ranks of one node take one card each, by ``local_rank``. ``threads`` None leaves the
    number as it is: all cores this process may use. With ``host_attention`` an accelerator leaves
    attention and KV to the CPU. ConfigError where no backend serves the device, or it cannot be
    had, or has not that.
    """
    asked, _, number = str(device).partition(":")
    if asked not in ASKED or (number and not number.isdecimal()):
        raise ConfigError(f"device={str(device)!r}: expected one of {', '.join(ASKED)}")
    if asked == "cpu":
        return cpu_ops(threads)
    found = look_for(asked)
    chosen = choose_device(asked, found)
    log = logging.getLogger(__name__)
    if chosen.warning:
        log.warning("%s", chosen.warning)
    if chosen.kind == "cpu":
        return cpu_ops(threads)
    card = card_of_rank(chosen.kind, found, int(number) if number else local_rank)
    log.info("computes on %s: %s", card, chosen.why)
    return host_attention_ops(card, threads) if host_attention else device_ops(card)


def card_of_rank(kind: str, found: Devices, index: int) -> torch.device:
    """ConfigError where there are fewer cards."""
    cards = len(found.cards(kind))
    if index >= cards:
        raise ConfigError(
            f"device={kind!r}: rank {index} of this node has no card of its own, for there are "
            f"{cards}: start fewer ranks, or show it more cards"
        )
    return torch.device(kind, index)


def device_ops(device: torch.device) -> Ops:
    """The table of an accelerator. ConfigError where this installation has none for it."""
    module, name = TABLES[device.type]
    try:
        table = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"device={str(device)!r}: {missing.name} is not installed; install moeserve with the "
            f"extra {'cuda' if device.type == 'cuda' else 'ascend'}"
        ) from missing
    return cast("Ops", table(device))


def host_attention_ops(card: torch.device, threads: int | None) -> Ops:
    """The table of a CUDA device that leaves attention to the CPU's. ConfigError for others."""
    if card.type != "cuda":
        raise ConfigError(
            f"attention_device='cpu': {card} has no such table, only CUDA devices have: leave out "
            "--attention-device, or give --device cuda"
        )
    device_ops(card)  # is an error where Triton is missing
    from moeserve.kernels.triton.host_attention import HostAttentionOps

    return cast("Ops", HostAttentionOps(card, cpu_ops(threads)))


def cpu_ops(threads: int | None, kv_room: KvRoom | None = None) -> Ops:
    """``kv_room`` gives the memory of KV; only native kernels take it from there."""
    native, reason = native_module("moeserve.kernels.cpu.ops")
    if native is None:
        logging.getLogger(__name__).warning(
            "no native kernels: plain torch takes their place, much slower; %s", reason
        )
        return ReferenceOps()
    from moeserve.kernels.cpu import _cpu
    from moeserve.kernels.cpu.ops import CpuOps

    if threads is not None:
        _cpu.set_threads(threads)
    return CpuOps() if kv_room is None else CpuOps(kv_room)


def set_threads(count: int) -> None:
    """From the next loop of the native kernels on; ``cpu_ops`` has found them."""
    from moeserve.kernels.cpu import _cpu

    _cpu.set_threads(count)


def num_threads() -> int:
    """Of the native kernels, which ``cpu_ops`` has found."""
    from moeserve.kernels.cpu import _cpu

    return _cpu.threads()
