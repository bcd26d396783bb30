"""Which runs (``kernels.kv_runs``) of a sequence go where: stretches of runs of one layer, and
frames of stretches.

Pure. R runs, L layers, H bytes of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import run_bytes
from moeserve.kernels.ops import KvRuns
from moeserve.pools.kv.digests import HEAD_BYTES, Data, RunDigests

# Spans begin at multiples of it in a frame.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions ``start .. stop - 1`` of a layer."""

    layer: int
    start: int
    stop: int


def run_ends(start: int, stop: int, run_size: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the runs of a stretch: they end at multiples of ``run_size``."""
    while start < stop:
        end = min(stop, (start // run_size + 1) * run_size)
        yield start, end - start
        start = end


def count_runs(stretch: Stretch, run_size: int) -> int:
    return -(-stretch.stop // run_size) - stretch.start // run_size


def stretch_bytes(layout: KvBlockLayout, stretch: Stretch) -> int:
    """What a stretch takes of a frame."""
    size = run_bytes(layout, stretch.stop - stretch.start)
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_of(data: Data) -> Tensor:
    """The bytes, one at least, not copied: they are only read, and whoever calls keeps them for as
    long. ``torch.frombuffer`` warns of bytes that cannot be written to."""
    found = np.frombuffer(data, np.uint8)
    memory = (ctypes.c_ubyte * found.size).from_address(found.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class FrameRuns:
    """The runs of a frame: of blocks ``first_block`` to ``last_block`` of its sequence, from whose
    first position the positions of ``runs`` count. ``counts`` of them are in each stretch."""

    runs: KvRuns
    first_block: int
    last_block: int
    counts: tuple[int, ...]


def frame_runs(
    layouts: Sequence[KvBlockLayout],
    digests: RunDigests,
    stretches: Sequence[Stretch],
    run_size: int,
    block_size: int,
) -> FrameRuns:
    """Of stretches that lie ``stretch_bytes`` one behind the other. Those with equal bounds, which
    are most, are made together: there is no work for each run."""
    first = min(stretch.start for stretch in stretches) // block_size
    last = (max(stretch.stop for stretch in stretches) - 1) // block_size
    parts, heads, counts, at = [], [], [], 0
    for (start, stop), group in groupby(stretches, key=lambda s: (s.start, s.stop)):
        layers = [stretch.layer for stretch in group]
        starts, sizes = zip(*run_ends(start, stop, run_size), strict=True)
        begin = np.empty(len(layers), np.int64)
        for i, layer in enumerate(layers):
            begin[i] = at
            at += stretch_bytes(layouts[layer], Stretch(layer, start, stop))
        width = np.array([run_bytes(layouts[layer], 1) for layer in layers], np.int64)
        part = np.empty((len(layers), len(starts), 4), np.int64)
        part[:, :, 0] = np.array(layers)[:, None]
        part[:, :, 1] = np.array(starts) - first * block_size
        part[:, :, 2] = sizes
        part[:, :, 3] = begin[:, None] + width[:, None] * (np.array(starts) - start)
        parts.append(part.reshape(-1, 4))
        heads.append(digests.heads(layers, starts, sizes).reshape(-1, HEAD_BYTES))
        counts += [len(starts)] * len(layers)
    runs = torch.from_numpy(np.concatenate(parts)), torch.from_numpy(np.concatenate(heads))
    return FrameRuns(KvRuns(*runs), first, last, tuple(counts))


def plan_stretches(
    starts: Sequence[int], stop: int, run_size: int, window: int
) -> Iterator[Stretch]:
    """Of each layer the positions from its start to ``stop`` - 1, so many runs of each before the
    next layer: what has come at any time is nearly as far in all layers, and is still in large
    pieces."""
    step, start = window * run_size, min(starts)
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        for layer, first in enumerate(starts):
            if first < end:
                yield Stretch(layer, max(first, start), end)
        start = end


def fill_frames(
    layouts: Sequence[KvBlockLayout], stretches: Iterator[Stretch], run_size: int, most: int
) -> Iterator[tuple[Stretch, ...]]:
    """The stretches in the same order, cut between runs, in frames of at most ``most`` bytes,
    which hold one run at least each. A stretch that fits into a frame is not cut: those with equal
    bounds cost less than others (``frame_runs``)."""
    frame: list[Stretch] = []
    room = most
    for stretch in stretches:
        layer, begin = stretch.layer, stretch.start
        width = run_bytes(layouts[layer], 1)
        if frame and room < stretch_bytes(layouts[layer], stretch) <= most:
            yield tuple(frame)
            frame, room = [], most
        while begin < stretch.stop:
            fits = begin + room // ALIGNMENT * ALIGNMENT // width
            end = min(stretch.stop, max(begin, fits // run_size * run_size))
            if stretch.stop <= fits:
                end = stretch.stop
            elif end == begin and not frame:
                end = min(stretch.stop, (begin // run_size + 1) * run_size)
            if end > begin:
                frame.append(Stretch(layer, begin, end))
                room -= stretch_bytes(layouts[layer], frame[-1])
                begin = end
            if begin < stretch.stop:
                yield tuple(frame)
                frame, room = [], most
    if frame:
        yield tuple(frame)
