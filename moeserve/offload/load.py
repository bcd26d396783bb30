"""A packed folder as a decoder within a memory budget: trunk in memory, experts from disk.

Two steps, for what KV may take lies between them: ``Streaming.open`` reads what is where and what
is fixed; ``Streaming.load`` divides the rest and reads the trunk. Nothing is mapped. Experts of the
module of multi-token prediction, where that is wanted, are read as those of one more layer, the
last; all else of it is in memory. ConfigError where the budget is too small, or the folder is not a
packed one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moeserve.config.options import RankModelOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.ops import Experts, Layer, Ops, RecordLayout, Stack
from moeserve.kernels.wire import MOST_SLOTS
from moeserve.models.decoder import Decoder, Mtp
from moeserve.models.packed.decoder import mtp_over, mtp_part, on_device
from moeserve.models.packed.layout import Region, is_packed
from moeserve.models.packed.leaves import leaves_of, with_leaves
from moeserve.models.packed.model import PackedModel
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.weights import torch_dtype
from moeserve.offload.arena import Arena, ExpertSlots, Pages
from moeserve.offload.budget import Fixed, Records, divide, room_for_kv
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.experts import ExpertStream
from moeserve.offload.foresight import PredictionGate
from moeserve.offload.mover import PAGE, DiskMover, Read, open_mover
from moeserve.offload.process_memory import (
    LATER,
    drafting_bytes,
    kept_bytes,
    resident,
    scratch_of,
)
from moeserve.offload.residency import Residency
from moeserve.offload.runner import StreamedLayerRunner
from moeserve.offload.window import READ_DEADLINE_S, TrunkWindow


@dataclass(frozen=True, slots=True)
class Streaming:
    """A model that is to be served within ``budget``; ``decoder`` has no weights yet."""

    packed: PackedModel
    decoder: Decoder
    ops: Ops
    options: RankModelOptions
    budget: int
    fixed: Fixed
    records: Records
    own: Mapping[int, Sequence[int]]
    drafts: bool = False

    @classmethod
    def open(
        cls,
        folder: Path,
        ops: Ops,
        options: RankModelOptions,
        own: Mapping[int, Sequence[int]] | None = None,
        kept: int = 0,
    ) -> Streaming:
        """With the ``memory`` that ``options`` give. ``own`` are the experts of a rank by layer, in
        order of its slots; None is all, and so is a layer that is left out. ``kept`` rows rest
        between two steps, and run in one layer beside those that run in all. Where ``options`` do
        not ask it, the module of multi-token prediction is left aside."""
        assert options.memory is not None, options
        packed = open_packed(folder, ops, options)
        spec, drafts = packed.spec, options.asks_the_module and packed.skeleton.mtp is not None
        if drafts:
            require_layers(packed, len(spec.layers) + 1)
        mine = own_of(packed, own, drafts=drafts)
        trunks = [packed.trunk(l).nbytes for l in range(len(spec.layers))]
        places = min(options.weights_window or len(trunks), len(trunks))
        fixed = Fixed(
            process=resident() + LATER,
            ends=packed.checkpoint.header.ends.region.nbytes,
            trunk=sum(max(trunks[place::places]) for place in range(places)),
            scratch=kept_bytes(kept, spec.hidden)
            + scratch_of(spec, options.max_num_batched_tokens + kept, options.max_num_seqs),
        )
        records, decoder = records_of(packed, mine), without_weights(packed, ops, options)
        if drafts:
            held = mtp_part(packed.checkpoint).region.nbytes + packed.trunk(len(spec.layers)).nbytes
            working = drafting_bytes(spec, ops, decoder.kv_dtype, options)
            fixed = replace(fixed, drafts=held + working)
        return cls(packed, decoder, ops, options, options.memory, fixed, records, mine, drafts)

    @property
    def room_for_kv(self) -> int:
        least = least_kv(self.options, self.decoder.kv_bytes_per_token)
        return room_for_kv(self.budget, self.fixed, self.records, least)

    def load(self, kv: int) -> Decoder:
        """With so many bytes of KV. The runner owns files, threads and memory."""
        division = divide(self.budget, self.fixed, self.records, kv, MOST_SLOTS)
        logging.getLogger("moeserve.offload").info(
            "%s within a memory budget:\n%s", self.packed.checkpoint.path, division.table()
        )
        with ExitStack() as undo:
            opened, mover = OpenFiles(self.packed), open_mover()
            undo.callback(opened.close)
            undo.callback(mover.close)
            decoder = self._load(opened, mover, max(1, division.slots))
            undo.pop_all()  # the runner's
        return decoder

    def _load(self, opened: OpenFiles, mover: DiskMover, slots: int) -> Decoder:
        options = self.options
        window = TrunkWindow(
            [opened.at(self.packed.trunk(l)) for l in range(len(self.decoder.spec.layers))],
            min(options.weights_window or MOST_SLOTS, len(self.decoder.spec.layers)),
            mover,
            check_always=options.check_weights,
        )
        stream = self._stream(opened, mover, slots)
        experts = list(experts_by_layer(self.packed, self.ops, stream.arena, drafts=self.drafts))
        layers = self._layers(window, experts)
        whole = with_ends(self.packed, self.decoder, opened, mover)
        runner = StreamedLayerRunner(
            self.ops,
            layers,
            stream,
            PredictionGate(options.weights_prediction),
            window if window.places < len(layers) else None,
            opened.close,
        )
        whole = replace(whole, stack=Stack(tuple(layers), None), runner=runner)
        if not self.drafts:
            return whole
        return replace(whole, mtp=self._mtp(whole, stream, opened, experts[-1]))

    def _stream(self, opened: OpenFiles, mover: DiskMover, slots: int) -> ExpertStream:
        numbers = range(len(self.decoder.spec.layers) + self.drafts)
        counts = [len(self.own.get(l, ())) for l in numbers]
        return ExpertStream(
            regions_of(self.packed, self.own, opened),
            Arena(slots, max(self.records.nbytes, PAGE)),
            Residency(counts, slots),
            mover,
            check_always=self.options.check_weights,
        )

    def _layers(self, window: TrunkWindow, experts: Sequence[Experts | None]) -> list[Layer]:
        """Over the window's memory, with each layer's ``experts``."""
        made = []
        for l in range(len(self.decoder.spec.layers)):
            window.need(l)
            made.append(self.packed.layer_over(l, window.memory(l), experts[l]))
        return made

    def _mtp(
        self, whole: Decoder, stream: ExpertStream, opened: OpenFiles, experts: Experts | None
    ) -> Mtp:
        """The module that drafts, whose experts are the stream's last layer."""
        packed, number = self.packed, len(self.decoder.spec.layers)
        trunk = read_region(opened.at(packed.trunk(number)), stream.mover)
        layer = packed.layer_over(number, trunk, experts)
        gate = PredictionGate("off")
        runner = StreamedLayerRunner(self.ops, [layer], stream, gate, first=number)
        memory = read_region(opened.at(mtp_part(packed.checkpoint).region), stream.mover)
        stack = Stack((layer,), None)
        return mtp_over(packed.laid, packed.skeleton, whole, memory, stack, runner)


def routed_of(spec: ModelSpec, *, drafts: bool = False) -> Iterator[tuple[int, MoeSpec]]:
    """Layers that route, by number; with ``drafts`` the module's is the last."""
    last = (spec.mtp,) if drafts else ()
    for number, layer in enumerate((*spec.layers, *last)):
        if layer is not None and isinstance(layer.mlp, MoeSpec):
            yield number, layer.mlp


def open_packed(folder: Path, ops: Ops, options: RankModelOptions) -> PackedModel:
    """ConfigError for a folder that is not packed, CheckpointError for one that is not whole."""
    if not is_packed(folder):
        how = "" if ops.device.type == "cpu" else " --for-device cuda"
        raise ConfigError(
            f"memory={options.memory}: {folder} holds weights that are packed as they are "
            "loaded, so that all are in memory; pack it once, with `moeserve quantize --model "
            f"{folder} --out OUT --packed{how}`, and serve OUT"
        )
    packed = PackedModel.open(folder, ops, options)
    require_layers(packed, len(packed.spec.layers))
    return packed


def require_layers(packed: PackedModel, wanted: int) -> None:
    """CheckpointError where fewer were packed."""
    there = len(packed.checkpoint.header.layers)
    if there < wanted:
        raise CheckpointError(
            f"{packed.checkpoint.path}: {there} layers were packed, the config has {wanted}; pack "
            "the model again"
        )


def own_of(
    packed: PackedModel, own: Mapping[int, Sequence[int]] | None, *, drafts: bool = False
) -> dict[int, Sequence[int]]:
    """The experts of each layer that routes (``routed_of``): those that a rank has, or all."""
    return {
        l: (own or {}).get(l, range(mlp.router.num_experts))
        for l, mlp in routed_of(packed.spec, drafts=drafts)
    }


def records_of(packed: PackedModel, own: Mapping[int, Sequence[int]]) -> Records:
    counts = [len(experts) for experts in own.values()]
    most = max((packed.record_layout(l).nbytes for l in own), default=0)
    return Records(most, max(counts, default=0), sum(counts))


def without_weights(packed: PackedModel, ops: Ops, options: RankModelOptions) -> Decoder:
    """The decoder to be, of which only shapes are there."""
    kv_dtype = torch_dtype(options.kv_dtype) or packed.skeleton.dtype
    return replace(packed.skeleton, ops=ops, kv_dtype=kv_dtype, mtp=None)


def least_kv(options: RankModelOptions, per_token: int) -> int:
    """Bytes that were asked for, else those of the longest sequence, else of a block."""
    if options.kv_memory is not None:
        return options.kv_memory
    blocks = options.num_blocks or -(-(options.max_model_len or 2) // options.block_size)
    return blocks * options.block_size * per_token


def regions_of(
    packed: PackedModel, own: Mapping[int, Sequence[int]], opened: OpenFiles
) -> dict[int, list[DiskRegion]]:
    """Where the experts of each layer lie."""
    return {l: [opened.at(packed.expert(l, e)) for e in of] for l, of in own.items()}


def experts_by_layer(
    packed: PackedModel, ops: Ops, arena: ExpertSlots, *, drafts: bool = False
) -> Iterator[Experts | None]:
    """Over the arena's slots, for each layer (with ``drafts`` the module's is the last); layers of
    one layout share their experts."""
    routed = dict(routed_of(packed.spec, drafts=drafts))
    shared: dict[RecordLayout, Experts] = {}
    for l in range(len(packed.spec.layers) + drafts):
        if l not in routed:
            yield None
            continue
        layout = replace(packed.record_layout(l), nbytes=arena.nbytes)
        if layout not in shared:
            shared[layout] = ops.experts_over(arena.memory, layout, arena.slots)
        yield shared[layout]


class OpenFiles:
    """The files of a packed folder, opened as regions of them are asked for."""

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._files: dict[str, DiskFile] = {}

    def at(self, region: Region) -> DiskRegion:
        if region.file not in self._files:
            self._files[region.file] = DiskFile.open(self._packed.file(region))
        digest = bytes.fromhex(region.digest)
        return DiskRegion(self._files[region.file], region.start, region.nbytes, digest)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def with_ends(
    packed: PackedModel, decoder: Decoder, opened: OpenFiles, mover: DiskMover
) -> Decoder:
    """The decoder with its embedding and head, read into memory of their own, where its table
    reads them."""
    header, skeleton, ops = packed.checkpoint.header, packed.skeleton, decoder.ops
    memory = on_device(ops, read_region(opened.at(header.ends.region), mover))
    parts = {"embedding": skeleton.embedding_WH, "head": skeleton.head.weights}
    found = packed.laid.leaves("embedding and head", header.ends, leaves_of(parts), memory)
    head = with_leaves(skeleton.head.weights, "head", found)
    return replace(
        decoder,
        embedding_WH=with_leaves(skeleton.embedding_WH, "embedding", found),
        head=ops.prepare(head),
        unread=header.unread,
    )


def read_region(region: DiskRegion, mover: DiskMover) -> Tensor:
    """uint8 of its bytes, checked."""
    pages = Pages(region.nbytes)
    read = Read(region.file, region.offset, region.nbytes, pages.address)
    (ticket,) = mover.submit([read])
    mover.wait(ticket, READ_DEADLINE_S)
    region.file.require_unchanged()
    region.file.require_digest(pages.data, region.offset, region.digest)
    return pages.memory
