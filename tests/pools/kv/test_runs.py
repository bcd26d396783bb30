"""Runs, their order, their digests and the frames they travel in: without sockets."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.core import CacheScope
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import copy_positions, digest_of, resized, run_bytes
from moeserve.pools.kv.digests import RunDigests, geometry_of
from moeserve.pools.kv.frames import PREFIX_BYTES, FramePlace, Side, seal, unseal
from moeserve.pools.kv.order import MOST_MISSING, RunOrder
from moeserve.pools.kv.runs import (
    Stretch,
    fill_frames,
    frame_runs,
    plan_stretches,
    run_ends,
    stretch_bytes,
)

LAYOUTS = [
    KvBlockLayout(torch.bfloat16, 4, 2, 5, 3, latent=False),
    KvBlockLayout(torch.int8, 6, 3, 5, 3, latent=False),
    KvBlockLayout(torch.int8, 3, 1, 7, 5, latent=True),
    KvBlockLayout(torch.float32, 16, 1, 7, 7, latent=True),
]
SALTED = CacheScope("salt")
sizes = st.integers(1, 9)


@given(st.sampled_from(LAYOUTS), sizes, sizes, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_blocks_of_one_size_become_blocks_of_another(
    layout: KvBlockLayout, size: int, other: int, length: int
) -> None:
    """By way of runs of either; every section of every position comes out where it was."""
    whole = resized(layout, length)
    data = torch.randint(256, (whole.nbytes,), dtype=torch.uint8)

    def cut(source: KvBlockLayout, data_X: torch.Tensor, first: int, count: int) -> torch.Tensor:
        out = torch.zeros(run_bytes(layout, count), dtype=torch.uint8)
        copy_positions((source, data_X, first), (resized(layout, count), out, 0), count)
        return out

    again = torch.zeros_like(data)
    for start, count in run_ends(0, length, size):
        run = cut(whole, data, start, count)
        for at, n in run_ends(start, start + count, other):
            piece = cut(resized(layout, count), run, at - start, n)
            copy_positions((resized(layout, n), piece, 0), (whole, again, at), n)
    assert torch.equal(again, data)
    name = whole.sections[0]
    numbers = data[name.start : name.end].view(length, -1)
    width = resized(layout, 1).sections[0].nbytes
    assert torch.equal(cut(whole, data, length - 1, 1)[:width], numbers[-1])


@given(
    st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3),
    st.integers(0, 50),
    st.integers(1, 60),
    sizes,
    st.integers(1, 5),
    st.integers(64, 4000),
)
@settings(max_examples=80, deadline=None)
def test_frames_hold_everything_once_and_in_order(
    layouts: list[KvBlockLayout], start: int, count: int, size: int, window: int, most: int
) -> None:
    stop = start + count
    stretches = list(plan_stretches([start] * len(layouts), stop, size, window))
    frames = list(fill_frames(layouts, iter(stretches), size, most))
    order = RunOrder(len(layouts), start, stop)
    for frame in frames:
        assert frame
        runs = [(s.layer, *run) for s in frame for run in run_ends(s.start, s.stop, size)]
        total = sum(stretch_bytes(layouts[s.layer], s) for s in frame)
        assert total <= most or len(runs) == 1
        for layer, begin, n in runs:
            order.take(layer, begin, n)
    assert order.complete


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_not_due_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    layers, have, length = 2, data.draw(st.integers(0, 5)), data.draw(st.integers(6, 20))
    order = RunOrder(layers, have, length)
    came = [set(range(have)) for _ in range(layers)]
    missing: dict[tuple[int, int], int] = {}
    asked: set[tuple[int, int]] = set()
    for _ in range(30):
        layer = data.draw(st.integers(-1, layers))
        start, count = data.draw(st.integers(-1, length)), data.draw(st.integers(-1, 5))
        again = 0 <= layer < layers and missing.get((layer, start)) == count
        due = 0 <= layer < layers and start == len(came[layer]) and 1 <= count <= length - start
        if not (due or again):
            with pytest.raises(InvalidRequestError):
                order.take(layer, start, count)
            continue
        order.take(layer, start, count)
        came[layer] |= set(range(start, start + count))
        missing.pop((layer, start), None)
        if data.draw(st.booleans()) and (layer, start) not in asked:
            order.miss(layer, start, count)
            asked.add((layer, start))
            missing[layer, start] = count
        assert not order.awaits_again or missing
        firsts = [min([len(came[l]), *(s for (m, s) in missing if m == l)]) for l in range(layers)]
        assert order.arrived == min(firsts)
        assert order.complete == (order.arrived == length)


def test_a_run_that_is_wrong_twice_is_lost() -> None:
    order = RunOrder(1, 0, 1000)
    order.take(0, 0, 4)
    order.miss(0, 0, 4)
    assert order.arrived == 0
    order.take(0, 0, 4)
    assert order.arrived == 4
    with pytest.raises(DataLossError, match="2 times"):
        order.miss(0, 0, 4)
    assert order.arrived == 0, "it has still not come"
    order.take(0, 0, 4)
    for i in range(1, MOST_MISSING):
        order.take(0, 4 * i, 4)
        order.miss(0, 4 * i, 4)
    order.take(0, 4 * MOST_MISSING, 4)
    with pytest.raises(DataLossError):
        order.miss(0, 4 * MOST_MISSING, 4)


def test_a_digest_is_of_one_place_of_one_prompt_of_one_model() -> None:
    tokens, data = list(range(40)), bytes(range(200))

    def digest(
        compute_id: str = "m",
        layouts: list[KvBlockLayout] = LAYOUTS,
        scope: CacheScope = SALTED,
        tokens: list[int] = tokens,
        layer: int = 1,
        start: int = 8,
        count: int = 8,
        data: bytes = data,
    ) -> bytes:
        return RunDigests(compute_id, layouts, scope, tokens).of(layer, start, count, data)

    own = digest()
    assert own == digest(tokens=[*tokens[:16], 999]), "later tokens do not matter"
    assert own == digest(layouts=[resized(x, 99) for x in LAYOUTS]), "nor do block sizes"
    others = [
        digest("n"),
        digest(""),
        digest(scope=CacheScope("other")),
        digest(scope=CacheScope("salt", "adapter")),
        digest(tokens=[*tokens[:15], 999, *tokens[16:]]),
        digest(tokens=[7, *tokens[1:]]),
        digest(layer=2),
        digest(layouts=[replace(x, value_size=4, latent=False) for x in LAYOUTS]),
        digest(start=0),
        digest(start=9, count=7),
        digest(start=7, count=9),
        digest(data=data[:-1]),
        digest(data=data[:-1] + b"x"),
    ]
    assert len({own, *others}) == len(others) + 1
    grown = RunDigests("m", LAYOUTS, CacheScope("salt"), tokens[:10])
    early = grown.of(1, 4, 4, data)
    grown.extend(tokens[10:])
    assert grown.of(1, 8, 8, data) == own
    assert grown.of(1, 4, 4, data) == early, "in any order"
    assert geometry_of(LAYOUTS) != geometry_of(LAYOUTS[:2]) != geometry_of(LAYOUTS[1:3])


def test_every_bit_of_a_frame_counts_but_those_of_its_data() -> None:
    head, data = b"what is said" * 3, bytes(100)
    frame = seal(Side.SOURCE, 5, head, data)
    assert unseal(Side.SOURCE, 5, frame) == (head, memoryview(data))
    for bit in range(8 * (PREFIX_BYTES + len(head))):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataLossError):
            unseal(Side.SOURCE, 5, bytes(flipped))
    for side, number in ((Side.RECEIVER, 5), (Side.SOURCE, 4), (Side.SOURCE, 6)):
        with pytest.raises(DataLossError):
            unseal(side, number, frame)
    for cut in random.Random(1).sample(range(len(frame)), 40):
        with pytest.raises(DataLossError):
            unseal(Side.SOURCE, 5, frame[:cut])


@given(st.binary(max_size=50), st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_frame_that_is_filled_in_place_is_the_one_that_is_copied(
    head: bytes, data: bytes, number: int
) -> None:
    place = FramePlace(len(head), len(data))
    place.data_X.copy_(torch.tensor(list(data), dtype=torch.uint8))
    assert place.seal(Side.SOURCE, number, head) == seal(Side.SOURCE, number, head, data)


@given(sizes, sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_runs_of_a_frame_are_those_of_its_stretches(size: int, block: int, data: Any) -> None:
    """Their places, one behind the other, and digests as of each run by itself."""
    digests = RunDigests("m", LAYOUTS, SALTED, range(40))
    bounds = st.tuples(st.integers(0, 3), st.integers(0, 38), st.integers(1, 39))
    drawn = data.draw(st.lists(bounds, min_size=1, max_size=6))
    stretches = [Stretch(layer, min(a, b - 1), max(a + 1, b)) for layer, a, b in drawn]
    total = sum(stretch_bytes(LAYOUTS[s.layer], s) for s in stretches)
    content = torch.randint(256, (total,), dtype=torch.uint8)
    made = frame_runs(LAYOUTS, digests, stretches, size, block)
    found = iter(zip(made.runs.runs_R4.tolist(), made.runs.heads_RH, strict=True))
    at = 0
    for stretch, runs in zip(stretches, made.counts, strict=True):
        layout, begin = LAYOUTS[stretch.layer], at
        ends = list(run_ends(stretch.start, stretch.stop, size))
        assert len(ends) == runs
        for start, count in ends:
            (layer, first, n, offset), head = next(found)
            assert (layer, n, offset) == (stretch.layer, count, begin)
            assert first + made.first_block * block == start
            run = content[begin : begin + run_bytes(layout, count)]
            want = digests.of(layer, start, count, run.numpy().tobytes())
            assert digest_of(head, run) == want
            begin += len(run)
        at += stretch_bytes(layout, stretch)
    assert next(found, None) is None
    assert made.first_block == min(s.start for s in stretches) // block
    assert made.last_block == (max(s.stop for s in stretches) - 1) // block
