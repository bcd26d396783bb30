"""The dispatcher of a library that was asked for, or one line about what the set-up lacks.

Every rank tells the others whether it is able before any of them opens a group, so that all refuse
together and name the rank that is not.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from moeserve.comm.build import Bounds, host_layers, lanes_of, shard_layers
from moeserve.comm.dispatcher import Dispatcher, FlatDispatcher, RunExperts, ShardedExperts
from moeserve.comm.group import Group, Topology
from moeserve.comm.layout import LayerLayout
from moeserve.comm.libraries.deepep import BufferRank, DeepEpDispatcher, DeepEpLowLatencyDispatcher
from moeserve.comm.libraries.deepep_exchange import PAGE, DeepEpExchange
from moeserve.comm.libraries.process_group import hccl_group, nccl_group
from moeserve.comm.libraries.promise import DEEPEP, LOW_LATENCY, MOE_DISTRIBUTE, promise_of
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.errors import ConfigError, first_line
from moeserve.kernels.ops import Layer, Ops
from moeserve.kernels.wire import Combine
from moeserve.observe.progress import Progress

if TYPE_CHECKING:
    from moeserve.kernels.ascend.ops import AscendOps

MODULE = "deep_ep"
# Of DeepEP's kernels of low latency (SWITCH_HIDDEN); the normal ones take rows of whole 16 bytes.
LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LANE_BYTES = 16
# Chips of the generations of Atlas, as torch_npu names devices.
CHIPS = {"Ascend910B": "A2", "Ascend910_93": "A3"}
OTHERWISE = "or leave out --dispatcher"


@dataclass(frozen=True, slots=True)
class LibrarySetup:
    """What a dispatcher is opened from. ``layers`` are those that route."""

    ops: Ops
    layers: Sequence[ShardedExperts]
    group: Group
    topology: Topology
    bounds: Bounds
    progress: Progress

    @property
    def own_rank(self) -> BufferRank:
        return BufferRank(self.group.rank, self.group.world, self.topology)

    @property
    def hidden(self) -> int:
        return self.layers[0].wire.hidden

    @property
    def slots(self) -> int:
        return self.layers[0].layout.slots

    @property
    def combine(self) -> Combine:
        return self.layers[0].part.weights.combine


def open_with_library(
    name: str,
    ops: Ops,
    layers: Sequence[Layer],
    layouts: Mapping[int, LayerLayout],
    group: Group,
    topology: Topology,
    *,
    bounds: Bounds,
    progress: Progress,
    runs: Mapping[int, RunExperts] | None = None,
) -> ParallelLayerRunner:
    """``build.open_parallel`` by the library ``name``. Collective; ConfigError where a rank lacks
    something, with the remedy."""
    wide = not host_layers(ops, layers, runs)
    sharded = shard_layers(ops, layers, layouts, runs=runs, wide=wide)
    routed = [s for s in sharded if s is not None]
    setup = LibrarySetup(ops, routed, group, topology, bounds, progress)
    promise = promise_of(name, setup.combine)
    why = "experts are read from disk: leave out --memory" if runs else LACKS[name](setup)
    said = group.all_gather(f"{name}/lacks", why.encode())
    for rank, note in enumerate(said):
        if note:
            raise ConfigError(f"dispatcher={name}: rank {rank}: {note.decode()}, {OTHERWISE}")
    dispatcher = OPEN[name](setup)
    logging.getLogger("moeserve.comm").info("dispatcher %s: %s", name, promise)
    return ParallelLayerRunner(ops, layers, sharded, dispatcher, progress)


def deepep_lacks(setup: LibrarySetup) -> str:
    """Of either kind of DeepEP's kernels."""
    if setup.ops.device.type != "cuda":
        return f"DeepEP is for CUDA devices, and this rank computes on {setup.ops.device}"
    if importlib.util.find_spec(MODULE) is None:
        return f"{MODULE} is not installed: build it as github.com/deepseek-ai/DeepEP says"
    try:
        found = importlib.import_module(MODULE)
    except (ImportError, OSError) as error:
        built = f"build it for torch {torch.__version__}"
        return f"{MODULE} cannot be loaded: {first_line(error)}: {built}"
    if not hasattr(found, "Buffer"):
        return f"this {MODULE} has no Buffer: install one with the legacy interface"
    if setup.combine is Combine.FAST and setup.layers[0].wire.payload is torch.float32:
        return "experts in fp32 would be sent in bf16: give --dtype bfloat16 or --quantization int8"
    return ""


def normal_lacks(setup: LibrarySetup) -> str:
    if why := deepep_lacks(setup):
        return why
    if setup.combine is Combine.FAST and 2 * setup.hidden % LANE_BYTES:
        return f"{setup.hidden} features are no whole {LANE_BYTES} bytes"
    try:
        deep_ep().Buffer.get_dispatch_config(setup.group.world)
    except AssertionError:
        return (
            f"DeepEP has no settings for {setup.group.world} ranks: run 2, 4, 8, 16, 24, 32 or 64"
        )
    return ""


def low_latency_lacks(setup: LibrarySetup) -> str:
    if why := deepep_lacks(setup):
        return why
    if setup.hidden not in LOW_LATENCY_HIDDEN:
        listed = ", ".join(map(str, LOW_LATENCY_HIDDEN))
        return f"{setup.hidden} features: kernels of low latency take {listed}: use deepep"
    return ""


def moe_distribute_lacks(setup: LibrarySetup) -> str:
    if setup.ops.name != "ascend":
        return f"the operators are of Ascend NPUs, and this rank computes on {setup.ops.device}"
    from moeserve.kernels.ascend import calls
    from moeserve.kernels.ascend.buffers import require_buffer
    from moeserve.kernels.ascend.dispatch import host_of
    from moeserve.kernels.ascend.limits import distribute_lacks

    if missing := [x for x in calls.BETWEEN_RANKS if not calls.has(x)]:
        return f"this torch_npu has no {missing[0]}: install torch_npu 2.13"
    if any(host_of(layer.part) is not None for layer in setup.layers):
        return "int4 experts run on the host: give --quantization int8"
    if setup.layers[0].wire.payload is torch.float32:
        return "experts in fp32 would be sent in bf16: give --dtype bfloat16 or --quantization int8"
    try:
        generation = generation_of(setup.ops.device)
        traffic = traffic_of(setup)
        why = distribute_lacks(traffic, generation)
        if not why:
            require_buffer(traffic, os.environ, generation)
    except ConfigError as error:
        return error.message
    return why


def traffic_of(setup: LibrarySetup) -> Any:
    from moeserve.kernels.ascend.buffers import ExpertTraffic

    top_k = max(layer.wire.top_k for layer in setup.layers)
    world, tokens = setup.group.world, setup.bounds.tokens
    return ExpertTraffic(world, setup.slots, tokens, setup.hidden, top_k)


def generation_of(device: torch.device) -> Any:
    """ConfigError for chips that the operators do not know."""
    from moeserve.kernels.ascend.buffers import AtlasGeneration

    name = npu_name(device)
    for chip, generation in CHIPS.items():
        if name.startswith(chip):
            return AtlasGeneration(generation)
    raise ConfigError(f"{name} is neither Atlas A2 nor A3, which the operators are for")


def npu_name(device: torch.device) -> str:
    backend: Any = getattr(torch, "npu")  # noqa: B009, torch_npu puts it there
    return str(backend.get_device_name(device))


def deep_ep() -> Any:
    return importlib.import_module(MODULE)


def open_normal(setup: LibrarySetup) -> Dispatcher:
    """By records, where sums are exact."""
    exact = setup.combine is Combine.EXACT
    row_bytes = PAGE if exact else 2 * setup.hidden
    buffer, world = deep_ep().Buffer, setup.group.world
    nvlink = rdma = 0
    for config in (buffer.get_dispatch_config(world), buffer.get_combine_config(world)):
        nvlink = max(nvlink, config.get_nvl_buffer_size_hint(row_bytes, world))
        rdma = max(rdma, config.get_rdma_buffer_size_hint(row_bytes, world))
    opened = opened_buffer(setup, lambda group: buffer(group, nvlink, rdma))
    if not exact:
        return DeepEpDispatcher(setup.ops, opened, setup.own_rank, setup.progress)
    lanes = lanes_of(setup.ops, setup.layers, setup.bounds, setup.bounds.tokens)
    staged = not setup.layers[0].wire.wide
    exchange = DeepEpExchange(setup.group, lanes, opened, setup.ops.device, staged=staged)
    return FlatDispatcher(setup.ops, exchange, setup.topology, setup.progress)


def open_low_latency(setup: LibrarySetup) -> Dispatcher:
    buffer, tokens, slots = deep_ep().Buffer, setup.bounds.tokens, setup.slots
    world = setup.group.world
    size = buffer.get_low_latency_rdma_size_hint(tokens, setup.hidden, world, slots * world)
    opened = opened_buffer(
        setup,
        lambda group: buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=slots),
    )
    return DeepEpLowLatencyDispatcher(setup.ops, opened, setup.own_rank, setup.progress, tokens)


def opened_buffer(setup: LibrarySetup, make: Callable[[Any], Any]) -> Any:
    """ConfigError with DeepEP's own first line where it cannot be opened."""
    group = nccl_group(setup.group)
    try:
        return make(group)
    except (RuntimeError, AssertionError, OSError) as error:
        raise ConfigError(
            f"DeepEP cannot open its buffer: {first_line(error)}: check NVLink within a node "
            "(nvidia-smi topo -m), NVSHMEM and IBGDA between nodes and for low latency, "
            f"{OTHERWISE}"
        ) from error


def open_moe_distribute(setup: LibrarySetup) -> Dispatcher:
    from moeserve.comm.libraries.moe_distribute import MoeDistributeDispatcher
    from moeserve.kernels.ascend.calls import EpGroup

    name, held = hccl_group(setup.group)
    group = EpGroup(
        name,
        setup.group.world,
        setup.group.rank,
        setup.slots,
        setup.bounds.tokens,
        generation_of(setup.ops.device),
    )
    ops = cast("AscendOps", setup.ops)
    return MoeDistributeDispatcher(ops, group, setup.topology, setup.progress, held)


LACKS: Mapping[str, Callable[[LibrarySetup], str]] = {
    DEEPEP: normal_lacks,
    LOW_LATENCY: low_latency_lacks,
    MOE_DISTRIBUTE: moe_distribute_lacks,
}
OPEN: Mapping[str, Callable[[LibrarySetup], Dispatcher]] = {
    DEEPEP: open_normal,
    LOW_LATENCY: open_low_latency,
    MOE_DISTRIBUTE: open_moe_distribute,
}
