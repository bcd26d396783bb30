"""Runs: the KV of consecutive positions of one layer, as bytes that name their place.

A run of ``count`` positions is laid out as a block of so many would be (``kernels.kv_layout``), so
one of a whole block is what ``Ops.export_kv`` writes. Blocks of other sizes are made of runs, and
runs of blocks, section by section. Pure, but for the bytes that are written where the caller says.

P positions of a block, X bytes of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.pools.kv.digests import Data

# Spans begin at multiples of it in a frame.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class KvRun:
    """Positions ``start .. start + count - 1`` of ``layer``; ``digest`` is of ``RunDigests``."""

    layer: int
    start: int
    count: int
    digest: bytes
    data: Data


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions ``start .. stop - 1`` of a layer."""

    layer: int
    start: int
    stop: int


def run_bytes(layout: KvBlockLayout, count: int) -> int:
    """Of a run of so many positions. Sections have no gaps, so it is proportional to them."""
    return layout.nbytes // layout.block_size * count


def run_ends(start: int, stop: int, run_size: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the runs of a stretch: they end at multiples of ``run_size``."""
    while start < stop:
        end = min(stop, (start // run_size + 1) * run_size)
        yield start, end - start
        start = end


def stretch_bytes(layout: KvBlockLayout, stretch: Stretch) -> int:
    """What a stretch takes of a frame."""
    size = run_bytes(layout, stretch.stop - stretch.start)
    return -(-size // ALIGNMENT) * ALIGNMENT


def copy_positions(
    source: tuple[KvBlockLayout, Tensor, int], target: tuple[KvBlockLayout, Tensor, int], count: int
) -> None:
    """``count`` positions of one block or run, from a position on, into another. Each is (layout,
    uint8 [X], first position); the layouts differ in their block size only."""
    (layout, data_X, first), (other, out_X, at) = source, target
    for s, o in zip(layout.sections, other.sections, strict=True):
        width = s.nbytes // layout.block_size
        begin, to = s.start + first * width, o.start + at * width
        out_X[to : to + count * width] = data_X[begin : begin + count * width]


def tensor_of(data: Data) -> Tensor:
    """The bytes, one at least, not copied: they are only read, and whoever calls keeps them for as
    long. ``torch.frombuffer`` warns of bytes that cannot be written to."""
    found = np.frombuffer(data, np.uint8)
    memory = (ctypes.c_ubyte * found.size).from_address(found.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8)


def resized(layout: KvBlockLayout, block_size: int) -> KvBlockLayout:
    return replace(layout, block_size=block_size)


def plan_stretches(
    layouts: Sequence[KvBlockLayout], start: int, stop: int, run_size: int, window: int
) -> Iterator[Stretch]:
    """All layers of positions ``start .. stop - 1``, so many runs of each before the next layer:
    what has come at any time is nearly as far in all layers, and is still in large pieces."""
    step = window * run_size
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield from (Stretch(layer, start, end) for layer in range(len(layouts)))
        start = end


def fill_frames(
    layouts: Sequence[KvBlockLayout], stretches: Iterator[Stretch], run_size: int, most: int
) -> Iterator[tuple[Stretch, ...]]:
    """The stretches in the same order, cut between runs, in frames of at most ``most`` bytes,
    which hold one run at least each."""
    frame: list[Stretch] = []
    room = most
    for stretch in stretches:
        layout, begin = layouts[stretch.layer], stretch.start
        for start, count in run_ends(stretch.start, stretch.stop, run_size):
            piece = Stretch(stretch.layer, begin, start + count)
            if stretch_bytes(layout, piece) <= room or (not frame and begin == start):
                continue
            if begin < start:
                frame.append(Stretch(stretch.layer, begin, start))
            yield tuple(frame)
            frame, begin, room = [], start, most
        piece = Stretch(stretch.layer, begin, stretch.stop)
        frame.append(piece)
        room -= stretch_bytes(layout, piece)
    if frame:
        yield tuple(frame)
