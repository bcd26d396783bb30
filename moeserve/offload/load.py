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
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moeserve.config.options import RankModelOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.ops import Experts, Layer, Ops, RecordLayout, Stack
from moeserve.kernels.wire import MOST_SLOTS
from moeserve.models.decoder import Decoder, Mtp
from moeserve.models.packed.decoder import mtp_over, mtp_part
from moeserve.models.packed.layout import Region, is_packed
from moeserve.models.packed.leaves import leaves_of, with_leaves
from moeserve.models.packed.model import PackedModel
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.weights import torch_dtype
from moeserve.offload.arena import Arena, Pages
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
        if not is_packed(folder):
            raise ConfigError(
                f"memory={options.memory}: {folder} holds weights that are packed as they are "
                "loaded, so that all are in memory; pack it once, with `moeserve quantize --model "
                f"{folder} --out OUT --packed`, and serve OUT"
            )
        packed = PackedModel.open(folder, ops, options)
        spec, layers = packed.spec, range(len(packed.spec.layers))
        drafts = options.asks_the_module and packed.skeleton.mtp is not None
        if len(packed.checkpoint.header.layers) < len(layers) + drafts:
            raise CheckpointError(
                f"{folder}: {len(packed.checkpoint.header.layers)} layers were packed, the config "
                f"has {len(layers) + drafts}; pack the model again"
            )
        mine = {
            l: (own or {}).get(l, range(mlp.router.num_experts))
            for l, mlp in routed_of(spec, drafts=drafts)
        }
        trunks = [packed.trunk(l).nbytes for l in layers]
        places = min(options.weights_window or len(trunks), len(trunks))
        counts = [len(experts) for experts in mine.values()]
        records = Records(
            max((packed.record_layout(l).nbytes for l in mine), default=0),
            max(counts, default=0),
            sum(counts),
        )
        fixed = Fixed(
            process=resident() + LATER,
            ends=packed.checkpoint.header.ends.region.nbytes,
            trunk=sum(max(trunks[place::places]) for place in range(places)),
            scratch=kept_bytes(kept, spec.hidden)
            + scratch_of(spec, options.max_num_batched_tokens + kept, options.max_num_seqs),
        )
        kv_dtype = torch_dtype(options.kv_dtype) or packed.skeleton.dtype
        decoder = replace(packed.skeleton, ops=ops, kv_dtype=kv_dtype, mtp=None)
        if drafts:
            held = mtp_part(packed.checkpoint).region.nbytes + packed.trunk(len(layers)).nbytes
            working = drafting_bytes(spec, ops, kv_dtype, options)
            fixed = replace(fixed, drafts=held + working)
        return cls(packed, decoder, ops, options, options.memory, fixed, records, mine, drafts)

    @property
    def room_for_kv(self) -> int:
        return room_for_kv(self.budget, self.fixed, self.records, self._least_kv)

    @property
    def _least_kv(self) -> int:
        """Bytes that were asked for, else those of the longest sequence, else of a block."""
        asked, per_token = self.options, self.decoder.kv_bytes_per_token
        if asked.kv_memory is not None:
            return asked.kv_memory
        blocks = asked.num_blocks or -(-(asked.max_model_len or 2) // asked.block_size)
        return blocks * asked.block_size * per_token

    def load(self, kv: int) -> Decoder:
        """With so many bytes of KV. The runner owns files, threads and memory."""
        division = divide(self.budget, self.fixed, self.records, kv, MOST_SLOTS)
        logging.getLogger("moeserve.offload").info(
            "%s within a memory budget:\n%s", self.packed.checkpoint.path, division.table()
        )
        opened, mover, options = OpenFiles(self.packed), open_mover(), self.options
        window = TrunkWindow(
            [opened.at(self.packed.trunk(l)) for l in range(len(self.decoder.spec.layers))],
            min(options.weights_window or MOST_SLOTS, len(self.decoder.spec.layers)),
            mover,
            check_always=options.check_weights,
        )
        stream = self._stream(opened, mover, max(1, division.slots))
        shared: dict[RecordLayout, Experts] = {}
        layers = self._layers(window, stream.arena, shared)
        whole = with_ends(self, opened, mover)
        runner = StreamedLayerRunner(
            self.ops,
            layers,
            stream,
            PredictionGate(options.weights_prediction),
            window if window.places < len(layers) else None,
            opened.close,
        )
        whole = replace(whole, stack=Stack(tuple(layers), None), runner=runner)
        return (
            replace(whole, mtp=self._mtp(whole, stream, opened, shared)) if self.drafts else whole
        )

    def _stream(self, opened: OpenFiles, mover: DiskMover, slots: int) -> ExpertStream:
        numbers = range(len(self.decoder.spec.layers) + self.drafts)
        counts = [len(self.own.get(l, ())) for l in numbers]
        regions = {
            l: [opened.at(self.packed.expert(l, e)) for e in experts]
            for l, experts in self.own.items()
        }
        return ExpertStream(
            regions,
            Arena(slots, max(self.records.nbytes, PAGE)),
            Residency(counts, slots),
            mover,
            check_always=self.options.check_weights,
        )

    def _layers(
        self, window: TrunkWindow, arena: Arena, shared: dict[RecordLayout, Experts]
    ) -> list[Layer]:
        """Over the window's memory and the arena's."""
        made = []
        for l in range(len(self.decoder.spec.layers)):
            window.need(l)
            experts = self._experts(l, arena, shared)
            made.append(self.packed.layer_over(l, window.memory(l), experts))
        return made

    def _experts(self, l: int, arena: Arena, shared: dict[RecordLayout, Experts]) -> Experts | None:
        """The arena's slots, as a layer that routes has its experts; layers of one layout share
        them."""
        if l not in self.own:
            return None
        layout = replace(self.packed.record_layout(l), nbytes=arena.nbytes)
        if layout not in shared:
            shared[layout] = self.ops.experts_over(arena.memory, layout, arena.slots)
        return shared[layout]

    def _mtp(
        self,
        whole: Decoder,
        stream: ExpertStream,
        opened: OpenFiles,
        shared: dict[RecordLayout, Experts],
    ) -> Mtp:
        """The module that drafts, whose experts are the stream's last layer."""
        packed, number = self.packed, len(self.decoder.spec.layers)
        trunk = read_region(opened.at(packed.trunk(number)), stream.mover)
        layer = packed.layer_over(number, trunk, self._experts(number, stream.arena, shared))
        gate = PredictionGate("off")
        runner = StreamedLayerRunner(self.ops, [layer], stream, gate, first=number)
        memory = read_region(opened.at(mtp_part(packed.checkpoint).region), stream.mover)
        stack = Stack((layer,), None)
        return mtp_over(packed.laid, packed.skeleton, whole, memory, stack, runner)


def routed_of(spec: ModelSpec, *, drafts: bool) -> Iterator[tuple[int, MoeSpec]]:
    """Layers that route, by number; with ``drafts`` the module's is the last."""
    last = (spec.mtp,) if drafts else ()
    for number, layer in enumerate((*spec.layers, *last)):
        if layer is not None and isinstance(layer.mlp, MoeSpec):
            yield number, layer.mlp


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


def with_ends(streaming: Streaming, opened: OpenFiles, mover: DiskMover) -> Decoder:
    """The decoder with its embedding and head, read into memory of their own."""
    packed, decoder, header = (
        streaming.packed,
        streaming.decoder,
        streaming.packed.checkpoint.header,
    )
    memory = read_region(opened.at(header.ends.region), mover)
    skeleton = packed.skeleton
    parts = {"embedding": skeleton.embedding_WH, "head": skeleton.head.weights}
    found = packed.laid.leaves("embedding and head", header.ends, leaves_of(parts), memory)
    head = with_leaves(skeleton.head.weights, "head", found)
    return replace(
        decoder,
        embedding_WH=with_leaves(skeleton.embedding_WH, "embedding", found),
        head=streaming.ops.prepare(head),
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
