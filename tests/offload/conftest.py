"""Movers, both, files of known bytes, and steps of all kinds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder
from moeserve.offload.mover import DiskMover, NativeMover, PlainMover
from moeserve.offload.native import native_half

BUILT = importlib.util.find_spec("moeserve.offload._mover") is not None

MakeMover = Callable[..., DiskMover]
BLOCK, BLOCKS = 4, 24


@pytest.fixture(params=["plain", "native"] if BUILT else ["plain"])
def make_mover(request: pytest.FixtureRequest) -> Iterator[MakeMover]:
    opened: list[DiskMover] = []

    def make(**how: int) -> DiskMover:
        if request.param == "plain":
            opened.append(PlainMover(**how))
        else:
            module, reason = native_half()
            assert module is not None, reason
            opened.append(NativeMover(module, **how))
        return opened[-1]

    yield make
    for mover in opened:
        mover.close()


@pytest.fixture
def mover(make_mover: MakeMover) -> DiskMover:
    return make_mover()


@pytest.fixture
def noise(tmp_path: Path) -> Callable[[int], tuple[Path, bytes]]:
    """A file of so many random bytes, and these."""

    def write(nbytes: int) -> tuple[Path, bytes]:
        data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8).tobytes()
        file = tmp_path / f"noise-{nbytes}.bin"
        file.write_bytes(data)
        return file, data

    return write


@pytest.fixture(scope="session")
def serve() -> Callable[[Decoder], list[Any]]:
    return serve_steps


class Routes:
    """An observer that keeps all."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[list[int]]]] = []

    def record(self, layer: int, ids_TC: Any) -> None:
        self.seen.append((layer, ids_TC.tolist()))


def serve_steps(decoder: Decoder) -> list[Any]:
    """Prompts alone, decoding alone, both together, and two microbatches: logits and routes."""
    cache, routes, found = decoder.new_cache(BLOCKS, BLOCK), Routes(), list[Tensor]()
    one, two, three = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    steps: list[list[list[Span]]] = [
        [[Span([*range(1, 10)], 0, one)]],
        [[Span([11], 9, one)]],
        [[Span([12], 10, one), Span([5, 6, 7, 5, 9], 0, two)]],
        [[Span([13], 11, one)], [Span([20], 5, two), Span([21, 22], 0, three)]],
        [[Span([14], 12, one), Span([23], 6, two), Span([24], 2, three)], []],
    ]
    for spans in steps:
        batches = [pack_spans(of, BLOCK) for of in spans]
        found += decoder.forward_micro(batches, cache, routes)
    return [[logits.view(torch.int32).tolist() for logits in found], routes.seen]
