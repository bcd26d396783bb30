"""Many frames through shared memory, without a message for each: whole, changed, late, never."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_house import alone
from toy_peer import SHARED, Peer, ended, peer, request

from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import DIGEST_BYTES
from moeserve.kernels.ops import KvShape
from moeserve.pools.kv import flow
from moeserve.pools.kv.flow import FlowSource, flow_bytes
from moeserve.pools.kv.memory import MemoryOutlet
from moeserve.pools.kv.runs import count_runs, fill_frames, plan_stretches, stretch_bytes


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many frames each one was."""
    found, send = [], FlowSource.send

    async def counted(
        self: FlowSource, blocks: object, frames: list[object], *, last: bool
    ) -> None:
        found.append(len(frames))
        await send(self, blocks, frames, last=last)  # type: ignore[arg-type]

    monkeypatch.setattr(FlowSource, "send", counted)
    return found


def on_fill(monkeypatch: pytest.MonkeyPatch, harm: Callable[[MemoryOutlet, int], None]) -> None:
    """``harm`` has its way with a slot before it is said to be filled."""
    fill = MemoryOutlet.fill

    def harmed(self: MemoryOutlet, frames: int) -> None:
        harm(self, frames)
        fill(self, frames)

    monkeypatch.setattr(MemoryOutlet, "fill", harmed)


async def fetch(a: Peer, b: Peer, name: str) -> None:
    """A prompt that ``a`` has computed before, so that all of it leaves at once."""
    for at in (a, b):
        ask = request(name, 61)
        sink = at.ask(ask, *([a.source] if at is b else []))
        await ended(sink)
        assert sink.tokens == alone(ask).tokens


async def test_frames_flow_and_slots_are_used_again(flows: list[int]) -> None:
    async with peer(limits=SHARED, chunk=64) as a, peer(limits=SHARED, block_size=6) as b:
        for n in range(3):
            await fetch(a, b, f"r{n}")
        assert len(flows) >= 3
        assert max(flows) > SHARED.slots
        assert b.counters.fetched == 3 * 61
        assert b.counters.bad_digests == b.counters.retries == 0
        assert b.counters.runs == a.counters.sent_runs
        await a.vacant()
        await b.vacant()


@pytest.mark.long
async def test_what_changes_in_memory_is_found_and_sent_again(
    monkeypatch: pytest.MonkeyPatch, flows: list[int]
) -> None:
    """A bit of the data's first run, or of the digests at the end."""
    draw, flipped = random.Random(7), [0]

    def flip(outlet: MemoryOutlet, frames: int) -> None:
        slot_X = outlet.slot_of(frames - 1)
        at = draw.choice([draw.randrange(96), len(slot_X) - 1 - draw.randrange(DIGEST_BYTES)])
        slot_X[at] ^= 1 << draw.randrange(8)
        flipped[0] += 1

    on_fill(monkeypatch, flip)
    async with peer(limits=SHARED, chunk=64) as a, peer(limits=SHARED) as b:
        for n in range(30):
            await fetch(a, b, f"r{n}")
        assert flipped[0] >= sum(flows) > 60
        assert b.counters.bad_digests == b.counters.retries == flipped[0]
        assert b.counters.sources_lost == {}
        await a.vacant()
        await b.vacant()


async def test_frames_that_are_never_filled_are_computed(
    monkeypatch: pytest.MonkeyPatch, flows: list[int]
) -> None:
    """In time, and with what had come."""
    monkeypatch.setattr(MemoryOutlet, "fill", lambda self, frames: None)
    limits = replace(SHARED, progress_s=0.5)
    async with peer(limits=limits, chunk=64) as a, peer(limits=limits) as b:
        await fetch(a, b, "r")
        assert flows
        assert b.counters.sources_lost == {"late": 1}
        assert b.counters.fetched + b.counters.recomputed == 61
        await b.vacant()
        await a.vacant()


async def test_frames_that_are_never_freed_end_the_call(
    monkeypatch: pytest.MonkeyPatch, flows: list[int]
) -> None:
    """A source holds nothing for whoever reads nothing."""
    monkeypatch.setattr(MemoryOutlet, "freed_frames", lambda self: 0)
    limits = replace(SHARED, stalled_s=0.5)
    async with peer(limits=limits, chunk=64) as a, peer(limits=limits) as b:
        await fetch(a, b, "r")
        assert flows
        assert sum(b.counters.sources_lost.values()) == 1
        await a.vacant()
        await b.vacant()


def test_a_word_that_does_not_move_is_not_waited_for_long() -> None:
    looks = [0]

    def word() -> int:
        looks[0] += 1
        return 3 if looks[0] > flow.EAGER + 2 else 2

    assert flow.reaches(word, 2)
    assert flow.reaches(word, 3)
    assert not flow.reaches(word, 4)


@given(st.data())
def test_digests_have_room_in_the_slots(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([4, 16, 64]))
    shapes = [
        KvShape(1, size, heads, width, width, torch.bfloat16)
        for heads, width in data.draw(
            st.lists(st.tuples(st.integers(1, 4), st.integers(8, 128)), min_size=1, max_size=4)
        )
    ]
    layouts = [KvBlockLayout.of(shape) for shape in shapes]
    slot = data.draw(st.integers(max(x.nbytes for x in layouts) + 64, 1 << 18))
    most = flow_bytes(layouts, slot)
    assert max(x.nbytes for x in layouts) <= most <= slot
    if most == slot:
        return  # too small to flow
    start, length = 0, data.draw(st.integers(1, 400))
    stretches = plan_stretches([start] * len(layouts), length, size, 16)
    for frame in fill_frames(layouts, stretches, size, most):
        nbytes = sum(stretch_bytes(layouts[s.layer], s) for s in frame)
        assert nbytes + DIGEST_BYTES * sum(count_runs(s, size) for s in frame) <= slot
