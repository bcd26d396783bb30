"""A packed folder served by a device that its experts do not fit: trunk on the device, experts in
slots there, in slots of host memory, and on disk.

``DeviceStreaming.open`` finds what is where and what is fixed; ``load`` divides the device's
budget, as ``offload.load`` does that of a process, and reads the trunk. Experts come by
``DeviceMover`` from as many host slots as there is room for; with one for each, the disk is read
once. Sizes are bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from moeserve.config.options import RankModelOptions
from moeserve.errors import ConfigError
from moeserve.kernels.ops import Layer, Ops, Stack
from moeserve.kernels.wire import MOST_SLOTS
from moeserve.models.decoder import Decoder
from moeserve.models.packed.decoder import on_device
from moeserve.models.packed.model import PackedModel
from moeserve.offload.arena import Arena, DeviceArena
from moeserve.offload.budget import MIB, Fixed, Records, divide, room_for_kv
from moeserve.offload.copies import open_copies
from moeserve.offload.device_mover import DeviceMover, HostSlots
from moeserve.offload.experts import ExpertStream
from moeserve.offload.foresight import PredictionGate
from moeserve.offload.load import (
    OpenFiles,
    experts_by_layer,
    least_kv,
    open_packed,
    own_of,
    read_region,
    records_of,
    regions_of,
    with_ends,
    without_weights,
)
from moeserve.offload.mover import PAGE, DiskMover, open_mover
from moeserve.offload.residency import Residency
from moeserve.offload.runner import StreamedLayerRunner

# One that is copied to the device, and one that is read meanwhile.
LEAST_HOST_SLOTS = 2


@dataclass(frozen=True, slots=True)
class DeviceStreaming:
    """A model that is to be served within ``budget`` bytes of a device; ``decoder`` has no weights
    yet."""

    packed: PackedModel
    decoder: Decoder
    ops: Ops
    options: RankModelOptions
    budget: int
    fixed: Fixed
    records: Records
    own: Mapping[int, Sequence[int]]

    @classmethod
    def open(
        cls, folder: Path, ops: Ops, options: RankModelOptions, budget: int, workspace: int
    ) -> Self:
        """``workspace`` is what a step takes of the device. ConfigError where the folder is not
        packed, or layers were asked to be windowed: all trunks are on the device; or the module
        of multi-token prediction was asked to guess, which is left aside."""
        if options.weights_window is not None:
            raise ConfigError(
                f"weights_window={options.weights_window}: on a device all layers without their "
                "experts are in its memory: leave it out"
            )
        if options.speculation == "mtp":
            raise ConfigError(
                "speculation=mtp: the module that guesses is left aside where experts are streamed "
                "to a device: choose ngram, draft or off"
            )
        packed = open_packed(folder, ops, options)
        own = own_of(packed, None)
        trunks = [packed.trunk(l).nbytes for l in range(len(packed.spec.layers))]
        ends = packed.checkpoint.header.ends.region.nbytes
        fixed = Fixed(0, ends, sum(trunks), workspace, of="device_memory")
        decoder, records = without_weights(packed, ops, options), records_of(packed, own)
        return cls(packed, decoder, ops, options, budget, fixed, records, own)

    @property
    def room_for_kv(self) -> int:
        """On the device."""
        least = least_kv(self.options, self.decoder.kv_bytes_per_token)
        return room_for_kv(self.budget, self.fixed, self.records, least)

    def load(self, kv: int, host: int) -> Decoder:
        """With so many bytes of KV on the device, and of experts in host memory. The runner owns
        files, threads and memory. ConfigError where either is too little."""
        division = divide(self.budget, self.fixed, self.records, kv, MOST_SLOTS)
        nbytes = max(self.records.nbytes, PAGE)
        host_slots = min(host // nbytes, self.records.count, MOST_SLOTS)
        if host_slots < min(LEAST_HOST_SLOTS, self.records.count):
            remedy = "free some" if self.options.memory is None else "give more with --memory"
            raise ConfigError(
                f"{max(0, host) / MIB:.1f}MiB of host memory are left for experts, and the least "
                f"is {LEAST_HOST_SLOTS} of {nbytes} bytes: {remedy}"
            )
        path, log = self.packed.checkpoint.path, logging.getLogger("moeserve.offload")
        log.info("%s within the memory of a device:\n%s", path, division.table())
        log.info("%s: %d of %d experts in host memory", path, host_slots, self.records.count)
        with ExitStack() as undo:
            opened, disk = OpenFiles(self.packed), open_mover()
            undo.callback(opened.close)
            undo.callback(disk.close)
            arena = DeviceArena(max(1, division.slots), nbytes, self.ops.device)
            stream = self._stream(opened, disk, arena, Arena(max(1, host_slots), nbytes))
            undo.callback(stream.mover.close)
            decoder = self._load(opened, disk, arena, stream)
            undo.pop_all()  # the runner's
        return decoder

    def _load(
        self, opened: OpenFiles, disk: DiskMover, arena: DeviceArena, stream: ExpertStream
    ) -> Decoder:
        layers = self._layers(opened, disk, arena)
        decoder = with_ends(self.packed, self.decoder, opened, disk)
        gate = PredictionGate(self.options.weights_prediction)
        runner = StreamedLayerRunner(self.ops, layers, stream, gate, None, opened.close)
        return replace(decoder, stack=Stack(tuple(layers), None), runner=runner)

    def _stream(
        self, opened: OpenFiles, disk: DiskMover, arena: DeviceArena, host: Arena
    ) -> ExpertStream:
        """Digests are compared in host memory, by the mover."""
        counts = [len(self.own.get(l, ())) for l in range(len(self.decoder.spec.layers))]
        regions, checks = regions_of(self.packed, self.own, opened), self.options.check_weights
        below = HostSlots(regions, host)
        mover = DeviceMover(below, arena, disk, open_copies(self.ops.device), check_always=checks)
        return ExpertStream(
            {l: [replace(region, digest=b"") for region in of] for l, of in regions.items()},
            arena,
            Residency(counts, arena.slots),
            mover,
            below=(below.residency,),
        )

    def _layers(self, opened: OpenFiles, disk: DiskMover, arena: DeviceArena) -> list[Layer]:
        made = []
        for l, experts in enumerate(experts_by_layer(self.packed, self.ops, arena)):
            trunk = read_region(opened.at(self.packed.trunk(l)), disk)
            made.append(self.packed.layer_over(l, on_device(self.ops, trunk), experts))
        return made
