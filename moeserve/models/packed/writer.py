"""Write a packed copy of a model folder: weights as loading holds them, in the kernels' layout.

The loader reads and packs one layer at a time, and its bytes are written as they are: memory holds
a layer, the embedding and the head. The copy is made beside its place and moved there when it is
whole. The kernels' layout is the same for every instruction set.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, Self

import torch
import xxhash
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.ops import Experts, Layer, Linear, Ops, Part
from moeserve.kernels.records import LINE, PAGE
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import load_ends, load_layer, load_mtp, open_weights
from moeserve.models.families import read_spec
from moeserve.models.files import open_regular
from moeserve.models.fingerprint import origin_of
from moeserve.models.packed.decoder import mtp_parts
from moeserve.models.packed.layout import (
    VERSION,
    ExpertForm,
    Header,
    Leaf,
    Origin,
    PackedLayer,
    PackedOptions,
    PackedPart,
    PackedRecords,
    Region,
    TensorForm,
    is_packed,
    read_packed_header,
    write_header,
)
from moeserve.models.packed.leaves import Value, leaves_of, parts_of
from moeserve.models.quantize import copy_others, whole_or_not_at_all
from moeserve.models.unread import explained
from moeserve.models.weights import Weights

FILE_BYTES = 4 << 30
_PIECE = 16 << 20


@dataclass(frozen=True, slots=True)
class PackedSummary:
    """What was written."""

    folder: Path
    layers: int
    records: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Noted(Weights):
    """Notes which tensors the loader found where it looked for alternatives."""

    present: set[str] = field(default_factory=set)

    @staticmethod
    def of(w: Weights) -> Noted:
        return Noted(*(getattr(w, f.name) for f in fields(Weights)))

    def has(self, name: str) -> bool:
        found = Weights.has(self, name)
        if found:
            self.present.add(name)
        return found


def pack_model(
    model: Path,
    out: Path,
    ops: Ops,
    options: LoadOptions,
    *,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> PackedSummary:
    """``out`` must not exist. Loading it with no options gives what loading ``model`` with
    ``options`` gives, to the bit. ``progress`` gets bytes read and bytes in all."""
    if is_packed(model):
        raise ConfigError(f"{model}: is packed already; give the folder it was made from")
    checkpoint = Checkpoint.open(model)
    w = Noted.of(open_weights(checkpoint, ops, options, progress=progress))
    return pack_weights(w, out, options, origin_of(model), file_bytes=file_bytes)


def pack_weights(
    w: Noted, out: Path, options: LoadOptions, origin: Origin, *, file_bytes: int = FILE_BYTES
) -> PackedSummary:
    """The same of weights wherever they come from, opened with ``options``."""
    if out.exists():
        raise ConfigError(f"{out}: exists; give a folder that does not")
    with whole_or_not_at_all(out, 0) as folder, RegionFiles(folder, file_bytes) as files:
        ends, layers, mtp = _write_weights(w, files)
        unread = explained(w, read_spec(w.checkpoint)[0])
        header = Header(
            version=VERSION,
            packing=w.ops.packing,
            byte_order=sys.byteorder,
            options=PackedOptions(options.dtype, options.quantization, options.quantize_attention),
            dtype="bfloat16" if w.dtype is torch.bfloat16 else "float32",
            origin=origin,
            present=tuple(sorted(w.present)),
            unread=unread,
            files=files.close(),
            ends=ends,
            layers=layers,
            mtp=mtp,
        )
        _copy_small(w.checkpoint, folder)
        write_header(folder, header)
    records = sum(len(x.experts.digests) for x in layers if x.experts is not None)
    after = sum(header.files.values())
    return PackedSummary(out, len(layers), records, w.checkpoint.total_bytes, after)


def verify_packed(folder: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Reads every region and compares its digest; how many there are. CheckpointError for the first
    that differs."""
    header = read_packed_header(folder)
    total, done, count = sum(region.nbytes for _, region in header.regions()), 0, 0
    for what, region in header.regions():
        digest = xxhash.xxh3_128()
        try:
            with open_regular(folder / region.file) as opened:
                opened.seek(region.start)
                for start in range(0, region.nbytes, _PIECE):
                    digest.update(opened.read(min(_PIECE, region.nbytes - start)))
        except OSError as error:
            raise CheckpointError(f"{folder / region.file}: cannot be read ({error})") from error
        if digest.hexdigest() != region.digest:
            raise CheckpointError(
                f"{folder / region.file}: {what} ({region.nbytes} bytes from {region.start}) is "
                f"not what was written; pack the model again"
            )
        count, done = count + 1, done + region.nbytes
        if progress is not None:
            progress(done, total)
    return count


class RegionFiles:
    """Writes regions one behind the other; owns the files."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self._most = most_bytes
        self._opened: BinaryIO | None = None
        self._sizes: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> dict[str, int]:
        """The files and their sizes."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        return dict(self._sizes)

    def make_room(self, nbytes: int) -> tuple[str, int]:
        """Where the next so many bytes will lie: all in one file."""
        name = f"packed-{len(self._sizes):05}.bin"
        full = self._opened is None or self._sizes[name] + nbytes > self._most
        if full and (self._opened is None or self._sizes[name]):
            self.close()
            name = f"packed-{len(self._sizes) + 1:05}.bin"
            self._opened = (self._folder / name).open("wb")
            self._sizes[name] = 0
        return name, self._sizes[name]

    def write(self, pieces: Iterable[Tensor]) -> Region:
        """uint8 tensors, then zeros to the end of a page."""
        assert self._opened is not None, "no room was made"
        name = f"packed-{len(self._sizes):05}.bin"
        start, digest = self._sizes[name], xxhash.xxh3_128()
        count = 0
        for piece in pieces:
            content = piece.numpy().data
            self._opened.write(content)
            digest.update(content)
            count += piece.nbytes
        rest = bytes(-count % PAGE)
        self._opened.write(rest)
        digest.update(rest)
        self._sizes[name] += count + len(rest)
        return Region(name, start, count + len(rest), digest.hexdigest())


def _write_weights(
    w: Noted, files: RegionFiles
) -> tuple[PackedPart, tuple[PackedLayer, ...], PackedPart | None]:
    spec, names = read_spec(w.checkpoint)
    embedding_WH, head = load_ends(w, spec)
    ends = _write_part(w.ops, {"embedding": embedding_WH, "head": head.weights}, files)
    layers = []
    for number, of in enumerate(spec.layers):
        layers.append(_write_layer(w.ops, load_layer(w, number, of, names, spec), files))
    mtp = load_mtp(w, names, spec, embedding_WH, head.weights.head)
    if mtp is None:
        return ends, tuple(layers), None
    layers.append(_write_layer(w.ops, mtp.stack.layers[0], files))
    parts = mtp_parts(embedding_WH, head.weights.head, mtp)
    return ends, tuple(layers), _write_part(w.ops, parts, files)


def _write_layer(ops: Ops, layer: Layer, files: RegionFiles) -> PackedLayer:
    parts = parts_of(layer)
    experts = None if isinstance(layer.mlp, Part) else layer.mlp[1].weights.experts
    layout = None if experts is None else ops.record_layout(experts)
    room = 0 if layout is None or experts is None else experts.num_experts * layout.nbytes
    trunk = _write_part(ops, parts, files, room)
    if experts is None or layout is None:
        return PackedLayer(trunk, None)
    record = torch.empty(layout.nbytes, dtype=torch.uint8)
    regions = []
    for e in range(experts.num_experts):
        ops.write_record(experts, e, record)
        regions.append(files.write([record]))
    digests = tuple(region.digest for region in regions)
    form = ExpertForm(layout.gate_up, layout.down)
    first = regions[0]
    return PackedLayer(trunk, PackedRecords(first.file, first.start, layout.nbytes, form, digests))


def _write_part(
    ops: Ops, parts: Mapping[str, object], files: RegionFiles, behind: int = 0
) -> PackedPart:
    """In one file with the ``behind`` bytes that follow."""
    values = leaves_of(parts)
    leaves = {name: _leaf_of(ops, value) for name, value in values.items()}
    files.make_room(sum(_nbytes(ops, value) for value in values.values()) + PAGE + behind)
    region = files.write(piece for value in values.values() for piece in _pieces(ops, value))
    return PackedPart(region, leaves)


def _leaf_of(ops: Ops, value: Value) -> Leaf:
    if isinstance(value, Linear):
        return ops.matrix_form(value)
    if isinstance(value, Experts):
        layout = ops.record_layout(value)
        return ExpertForm(layout.gate_up, layout.down)
    name = str(value.dtype).removeprefix("torch.")
    assert name in ("float32", "bfloat16"), value.dtype
    return TensorForm(name, tuple(value.shape))  # type: ignore[arg-type]


def _nbytes(ops: Ops, value: Value) -> int:
    if isinstance(value, Linear):
        return ops.matrix_bytes(ops.matrix_form(value))
    return ops.record_layout(value).nbytes if isinstance(value, Experts) else value.nbytes


def _pieces(ops: Ops, value: Value) -> Iterator[Tensor]:
    """The bytes of a leaf, to the end of a line."""
    if isinstance(value, Tensor):
        content = value.contiguous().view(-1).view(torch.uint8)
        yield content
        yield torch.zeros(-content.nbytes % LINE, dtype=torch.uint8)
        return
    packed = torch.empty(_nbytes(ops, value), dtype=torch.uint8)
    if isinstance(value, Linear):
        ops.write_matrix(value, packed)
    else:
        ops.write_record(value, 0, packed)
    yield packed


def _copy_small(checkpoint: Checkpoint, folder: Path) -> None:
    """The config as it is, to the byte, and what stands beside the weights."""
    config = checkpoint.path / "config.json"
    copy_others(checkpoint.path, folder)
    if config.is_file():
        shutil.copyfile(config, folder / "config.json")
    else:
        text = json.dumps(checkpoint.config, indent=2)
        (folder / "config.json").write_text(text + "\n", "utf-8")
