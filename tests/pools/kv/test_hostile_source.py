"""What a source sends is not believed: nothing wrong enters a cache, whatever is sent."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
import torch
from toy_house import VOCAB, Sink, ToyHouse

from moeserve.core import CacheScope, Request, RequestId, SamplingParams
from moeserve.engine.sequence import HeldKv, History, KvSource
from moeserve.errors import DataLossError, InvalidRequestError
from moeserve.pb import kv_pb2 as pb
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import RunDigests
from moeserve.pools.kv.exporter import KvExporter
from moeserve.pools.kv.frames import Side, seal, unseal
from moeserve.pools.kv.importer import KvImporter
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.receiver_call import FetchOrder, ReceiverCall, SourceLostError
from moeserve.pools.kv.runs import Stretch, fill_frames, plan_stretches, stretch_bytes

LENGTH, SIZE = 18, 4
ASK = Request(
    RequestId("a"), tuple(11 * i % VOCAB for i in range(LENGTH)), SamplingParams(2, ignore_eos=True)
)
LIMITS = FetchLimits(first_s=0.3, progress_s=0.3, queued_s=1.0)
REFUSED = (SourceLostError, InvalidRequestError, DataLossError)

Message = tuple[pb.FromSource, bytes]


@dataclass
class Script:
    """A source that says what the test wants, flips one bit of what it says if so, and sends again
    what it is asked for, unless it is ``deaf``."""

    messages: list[Message]
    again: Callable[[pb.Again], Message]
    flip: tuple[int, int] | None = None
    deaf: bool = False
    sent: int = 0
    heard: int = 0

    async def write(self, frame: bytes) -> None:
        head, _ = unseal(Side.RECEIVER, self.heard, frame)
        self.heard += 1
        message = pb.ToSource.FromString(head)
        if message.WhichOneof("what") == "again" and not self.deaf:
            self.messages.insert(0, self.again(message.again))

    async def read(self) -> Any:
        if not self.messages:
            await asyncio.sleep(10)
            return grpc.aio.EOF
        message, data = self.messages.pop(0)
        frame = bytearray(seal(Side.SOURCE, self.sent, message.SerializeToString(), data))
        if self.flip is not None and self.flip[0] == self.sent:
            bit = self.flip[1] % (8 * len(frame))
            frame[bit // 8] ^= 1 << bit % 8
        self.sent += 1
        return bytes(frame)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK


class Transfer:
    """A prompt that was computed in one house, and room for it in another."""

    def __init__(self) -> None:
        self.source, self.target = (
            ToyHouse(layers=2, block_size=SIZE),
            ToyHouse(layers=2, block_size=SIZE),
        )
        sink = Sink()
        one = replace(ASK, params=replace(ASK.params, max_tokens=1))
        self.source.submit(one, sink, History(keep=True))
        assert sink.ended.wait(20)
        self.kept = self.source.take_kept(ASK.id)
        assert self.kept is not None
        self.exporter = KvExporter(self.source, self.digests())
        self.counters = KvCounters()
        self.mover = Mover("test")
        self.true: dict[int, list[bytes]] = {}

    def digests(self, compute_id: str = "m") -> RunDigests:
        return RunDigests(compute_id, self.source.layouts, CacheScope(), ASK.prompt_ids)

    def spans(self, *stretches: Stretch, exporter: KvExporter | None = None) -> Message:
        assert self.kept is not None
        layouts = self.source.layouts
        size = sum(stretch_bytes(layouts[s.layer], s) for s in stretches)
        out = torch.zeros(size, dtype=torch.uint8)
        found = (exporter or self.exporter).fill(self.kept.blocks, stretches, out)
        spans = [
            pb.Span(layer=s.layer, start=s.start, stop=s.stop, digests=d)
            for s, d in zip(stretches, found, strict=True)
        ]
        return pb.FromSource(spans=pb.Spans(spans=spans)), out.numpy().tobytes()

    def again(self, again: pb.Again) -> Message:
        return self.spans(Stretch(again.layer, again.start, again.start + again.count))

    def messages(self, frame_bytes: int = 300) -> list[Message]:
        layouts = self.source.layouts
        stretches = plan_stretches([0] * len(layouts), LENGTH, SIZE, 2)
        frames = fill_frames(layouts, stretches, SIZE, frame_bytes)
        begun = pb.FromSource(begun=pb.Begun(run_size=SIZE))
        ended = pb.FromSource(ended=pb.Ended())
        return [(begun, b""), *(self.spans(*frame) for frame in frames), (ended, b"")]

    def bytes_of(self, house: ToyHouse, held: HeldKv, length: int = LENGTH) -> list[bytes]:
        """Of each layer, position by position, so that junk behind the last does not count."""
        exporter = KvExporter(house, self.digests())
        found = []
        for layer, layout in enumerate(house.layouts):
            stretch = Stretch(layer, 0, length)
            out = torch.zeros(stretch_bytes(layout, stretch), dtype=torch.uint8)
            if length:
                exporter.fill(held.blocks, [stretch], out)
            found.append(out.numpy().tobytes())
        return found

    async def receive(self, script: Script) -> tuple[KvImporter, Exception | None]:
        held = self.target.borrow(ASK.prompt_ids, ASK.scope)
        assert held is not None
        importer = KvImporter(self.target, held, LENGTH, self.digests(), self.counters)
        try:
            order = FetchOrder(
                KvSource("script:1"),
                ASK,
                History(),
                importer,
                lambda event: True,
                never_handed,
                never_made,
                lambda: None,
            )
            call = ReceiverCall(
                order, script, self.target.layouts, self.mover, self.counters, LIMITS, None
            )
            try:
                await call.run(pb.ToSource(wanted=pb.Wanted()))
            except REFUSED as error:
                return importer, error
            return importer, None
        finally:
            await self.mover.run(len, ())
            self.check(importer)
            self.target.give_back(held)

    def check(self, importer: KvImporter) -> None:
        """Everything that is said to be computed is the true bytes."""
        computed = importer.computed
        assert self.kept is not None
        if computed not in self.true:
            self.true[computed] = self.bytes_of(self.source, self.kept, computed)
        want = self.true[computed]
        assert self.bytes_of(self.target, importer.held, computed) == want

    def close(self) -> None:
        assert self.kept is not None
        self.source.give_back(self.kept)
        self.mover.close()
        for house in (self.source, self.target):
            house.close()
            assert house.references == 0


async def never_made(outputs: tuple[int, ...]) -> bool:
    raise AssertionError("nothing runs there")


async def never_handed(outputs: tuple[int, ...], computed: int) -> bool:
    raise AssertionError("nothing runs there")


@contextmanager
def transfer() -> Iterator[Transfer]:
    made = Transfer()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.long
async def test_a_thousand_flipped_bits_change_nothing() -> None:
    """Anywhere in any message: each is found, unless it is in the gaps between spans."""
    draw = random.Random(5)
    with transfer() as t:
        clean = t.messages()
        found = gaps = asked = 0
        for _ in range(1000):
            before = t.counters.bad_digests
            frame, bit = draw.randrange(len(clean)), draw.randrange(1 << 20)
            importer, error = await t.receive(Script(list(clean), t.again, (frame, bit)))
            noticed = error is not None or t.counters.bad_digests > before
            assert error is not None or importer.complete
            found += noticed
            asked += error is None and noticed
            gaps += not noticed
        assert found + gaps == 1000
        assert asked > 100, "a run that was wrong once is asked for again"
        data = sum(len(d) for _, d in clean)
        assert gaps < 1000 * 0.5, (gaps, data)


async def test_a_run_that_stays_wrong_is_refused() -> None:
    with transfer() as t:
        messages = t.messages()
        spans, data = messages[1]
        messages[1] = spans, bytes([data[0] ^ 1]) + data[1:]
        wrong = (t.again(pb.Again(layer=0, start=0, count=SIZE))[0], bytes(len(data)))
        size = len(t.again(pb.Again(layer=0, start=0, count=SIZE))[1])
        script = Script(messages, lambda again: (wrong[0], bytes(size)))
        importer, error = await t.receive(script)
        assert isinstance(error, DataLossError)
        assert importer.computed == 0
        assert t.counters.bad_digests == 2
        assert t.counters.retries == 1
        script = Script(t.messages(), t.again, (1, 8 * 200), deaf=True)
        importer, error = await t.receive(script)
        assert error is not None, "it never sends again what was asked for"


def changed(t: Transfer) -> dict[str, list[Message]]:
    """What no sound source sends."""
    good, first = t.messages(), t.spans(Stretch(0, 0, 8))
    other = KvExporter(t.source, t.digests("another model"))
    begun, ended = good[0], good[-1]

    def edit(message: Message, **fields: Any) -> Message:
        copy = pb.FromSource()
        copy.CopyFrom(message[0])
        for name, value in fields.items():
            setattr(copy.spans.spans[0], name, value)
        return copy, message[1]

    def last(message: Message) -> pb.FromSource:
        copy = pb.FromSource()
        copy.CopyFrom(message[0])
        copy.spans.last = True
        return copy

    return {
        "twice": [begun, first, first],
        "out of order": [begun, t.spans(Stretch(0, 8, 12)), first],
        "overlapping": [begun, first, t.spans(Stretch(0, 4, 12))],
        "of another layer": [begun, edit(first, layer=1), t.spans(Stretch(1, 0, 8))],
        "of no layer": [begun, edit(first, layer=77)],
        "too many": [*good[:-1], t.spans(Stretch(0, 16, 18))],
        "beyond the end": [begun, edit(first, stop=1 << 40)],
        "backwards": [begun, edit(first, start=8, stop=0)],
        "short": [begun, (first[0], first[1][:-64])],
        "long": [begun, (first[0], first[1] + bytes(64))],
        "digests missing": [begun, edit(first, digests=b"")],
        "of another model": [begun, t.spans(Stretch(0, 0, 8), exporter=other)] * 2,
        "left out": [begun, first, ended],
        "ended twice": [*good[:2], ended],
        "begun twice": [begun, begun],
        "not begun": [first],
        "runs of no size": [(pb.FromSource(begun=pb.Begun(run_size=0)), b"")],
        "runs of another size": [
            (pb.FromSource(begun=pb.Begun(run_size=3)), b""),
            first,
        ],
        "a slot of no memory": [begun, (pb.FromSource(spans=pb.Spans(slot=0)), b"")],
        "made": [begun, (pb.FromSource(made=pb.Made(outputs=[1])), b"")],
        "handed": [begun, (pb.FromSource(handed=pb.Handed(outputs=[1], computed=18)), b"")],
        "last, and more is left": [begun, (last(first), first[1])],
        "a flow in no memory": [begun, (pb.FromSource(flow=pb.Flow()), b"")],
        "nothing": [begun, (pb.FromSource(), b"")],
        "silent": [begun, first],
        "silent from the start": [],
    }


async def test_runs_that_are_not_due_are_refused() -> None:
    with transfer() as t:
        for name, messages in changed(t).items():
            script = Script(list(messages), t.again)
            importer, error = await t.receive(script)
            assert error is not None, name
            assert importer.computed < LENGTH or name == "too many"
        importer, error = await t.receive(Script(t.messages(), t.again))
        assert error is None
        assert importer.complete
