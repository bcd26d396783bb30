"""Doors reach ranks: over gRPC as by calls, whatever either side does, until the last event."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.comm.control.rpc import Trust, open_channel, open_server, proof_metadata
from moeserve.core import Counters, Event, FinishReason, Request, RequestId, SamplingParams
from moeserve.engine.blocks import BlockPool
from moeserve.engine.loop import Engine
from moeserve.engine.null import NullExecutor
from moeserve.engine.ranks import outgoing as outgoing_module
from moeserve.engine.ranks.door_requests import DoorRequests, Return
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.messages import write_submission
from moeserve.engine.ranks.outgoing import Outgoing
from moeserve.engine.ranks.rank_links import LinkTable, LocalLink, RankLink, RemoteLink, Unheard
from moeserve.engine.ranks.rank_server import MOST_NEWS, SERVICE, RankServer
from moeserve.engine.request_state import RankSink
from moeserve.engine.scheduler import Scheduler, SchedulerConfig
from moeserve.engine.sequence import NEW, History
from moeserve.errors import (
    ExhaustedError,
    InvalidRequestError,
    LateRankError,
    MoeserveError,
    PlacementError,
    UnavailableError,
)
from moeserve.pb import rank_pb2 as pb

WAIT_S = 20.0
VOCAB = 1000
RANK = 3
RUN = b"run"
STOP, ABORT = FinishReason.STOP, FinishReason.ABORT


def request(name: str, prompt: Sequence[int] = (1, 2, 3), **params: Any) -> Request:
    return Request(RequestId(name), tuple(prompt), SamplingParams(**params))


def token(name: str, value: int, finish: FinishReason | None = None) -> Event:
    return Event(RequestId(name), (value,), finish=finish)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not what():  # noqa: ASYNC110 - what is awaited here is told in many ways
            await asyncio.sleep(0.002)


class ScriptedEngine:
    """Takes requests in, and makes what the test says, on a thread of its own."""

    def __init__(self) -> None:
        self.sinks: dict[RequestId, RankSink] = {}
        self.taken: list[tuple[Request, History]] = []
        self.ended: list[tuple[str, FinishReason]] = []
        self.refusal: MoeserveError | None = None

    def submit(self, request: Request, sink: RankSink, history: History = NEW) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sinks[request.id] = sink
        self.taken.append((request, history))

    def abort(self, request_id: RequestId, reason: FinishReason = ABORT) -> None:
        self.ended.append((request_id, reason))

    async def make(self, *events: Event) -> None:
        """One step; all events are of one door."""
        sink = self.sinks[events[0].request_id]
        await asyncio.to_thread(sink.deliver, events)

    async def give_back(self, name: str, reached: int) -> None:
        request_id = RequestId(name)
        await asyncio.to_thread(self.sinks[request_id].give_back, request_id, reached)


@dataclass
class Listener:
    """Writes down what it hears, in order."""

    heard: list[Any] = field(default_factory=list)
    calls: int = 0
    uses: list[ExpertUse] = field(default_factory=list)

    def on_events(self, rank: int, events: Sequence[Event]) -> None:
        assert rank == RANK
        self.calls += 1
        self.heard += events

    def on_taken(self, rank: int, request_ids: Sequence[RequestId], round_: int) -> None:
        self.heard += [(request_id, round_) for request_id in request_ids]

    def on_returned(self, rank: int, returned: Return) -> None:
        self.heard.append(returned)

    def on_uses(self, uses: Sequence[ExpertUse]) -> None:
        self.uses += uses

    @property
    def taken(self) -> set[str]:
        return {one[0] for one in self.heard if isinstance(one, tuple) and len(one) == 2}

    def events(self, name: str) -> list[Event]:
        return [e for e in self.heard if isinstance(e, Event) and e.request_id == name]

    def tokens(self, name: str) -> list[int]:
        return [t for event in self.events(name) for t in event.token_ids]

    def last(self, name: str) -> Event | None:
        found = self.events(name)
        return found[-1] if found and found[-1].finish is not None else None


@dataclass
class Served:
    """A rank behind a real socket, and doors to it."""

    engine: Any
    service: RankServer
    server: grpc.aio.Server
    port: int
    alarm: MoeserveError | None = None
    links: list[RemoteLink] = field(default_factory=list)

    def channel(self) -> grpc.aio.Channel:
        return open_channel("127.0.0.1", self.port, Trust(), "")

    def link(self, listener: Listener) -> RemoteLink:
        metadata = proof_metadata(Trust(), RUN)
        link = RemoteLink(RANK, self.channel(), metadata, listener, lambda: self.alarm)
        self.links.append(link)
        return link

    async def ask(self, method: str, content: bytes, timeout_s: float = WAIT_S) -> bytes:
        """From outside, whatever it is."""
        async with self.channel() as channel:
            asked: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            metadata = proof_metadata(Trust(), RUN)
            reply: bytes = await asked(content, timeout=timeout_s, metadata=metadata)
            return reply

    @contextlib.asynccontextmanager
    async def attached(self) -> AsyncIterator[Any]:
        """A door's stream that the test writes and reads by itself."""
        async with self.channel() as channel:
            attach: Any = channel.stream_stream(f"/{SERVICE}/Attach")
            yield attach(metadata=proof_metadata(Trust(), RUN), timeout=WAIT_S)


def no_counts() -> pb.CountedReply:
    return pb.CountedReply()


def no_replan(content: bytes) -> Future[bytes]:
    if content == b"never":
        return Future()
    raise PlacementError("no plan is changed here")


@contextlib.asynccontextmanager
async def serving(
    engine: Any = None, uses: Sequence[ExpertUse] = (), beat_s: float | None = None
) -> AsyncIterator[Served]:
    left = list(uses)

    def take_uses() -> Sequence[ExpertUse]:
        found, left[:] = list(left), []
        return found

    engine = engine or ScriptedEngine()
    service = RankServer(
        engine,
        lambda: 7,
        no_counts,
        no_replan,
        vocab_size=VOCAB,
        take_uses=take_uses,
        beat_s=beat_s,
    )
    server, port = open_server("127.0.0.1", Trust(), RUN, [service.handlers()])
    await server.start()
    served = Served(engine, service, server, port)
    try:
        yield served
    finally:
        for link in served.links:
            await link.close()
        assert await service.wait_vacant(WAIT_S)
        await server.stop(None)


def submission(name: str, prompt: Sequence[int] = (1, 2)) -> pb.Submission:
    out = pb.Submission()
    write_submission(out, request(name, prompt), NEW, 0.0)
    return out


def words_to_rank(*names: str, end: Sequence[tuple[str, str]] = ()) -> bytes:
    ends = [pb.Ending(id=name, reason=reason) for name, reason in end]
    return pb.ToRank(submit=map(submission, names), end=ends).SerializeToString()


# --- what is told, and in which order


async def test_requests_go_out_and_tokens_come_back_in_order() -> None:
    async with serving(uses=[ExpertUse("domain a", 4, (1, 3))]) as served:
        door = Listener()
        link = served.link(door)
        names = [f"é{i}" for i in range(50)]
        for name in names:
            link.submit(request(name), History((4, 5), 2, True))
        await until(lambda: door.taken == set(names))
        assert all(one[1] == 7 for one in door.heard), "the round that shows them"
        assert [r.id for r, _ in served.engine.taken] == names
        assert {h for _, h in served.engine.taken} == {History((4, 5), 2, True)}
        for step in range(20):
            last = STOP if step == 19 else None
            await served.engine.make(*(token(name, step, last) for name in names))
        await until(lambda: all(door.last(name) for name in names))
        assert all(door.tokens(name) == list(range(20)) for name in names)
        assert door.calls <= 20, "a message has the news of all requests of a step"
        assert door.uses == [ExpertUse("domain a", 4, (1, 3))]
        assert served.engine.ended == []


async def test_news_gather_while_the_stream_is_slow() -> None:
    steps, names = 1500, [f"request {i} of a door that is slow to read" for i in range(16)]
    async with serving() as served, served.attached() as call:
        await call.write(words_to_rank(*names))
        await until(lambda: len(served.engine.taken) == len(names))
        for step in range(steps):
            await served.engine.make(*(token(name, step) for name in names))
        found: dict[str, list[int]] = {name: [] for name in names}
        messages = 0
        while any(len(tokens) < steps for tokens in found.values()):
            reply = pb.FromRank.FromString(await call.read())
            messages += 1
            assert len(reply.news) <= MOST_NEWS
            for news in reply.news:
                found[news.id] += news.tokens
        assert all(tokens == list(range(steps)) for tokens in found.values())
        assert messages < steps
        call.cancel()


async def test_what_is_given_back_comes_after_all_that_it_made() -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        for name in ("a", "b"):
            link.submit(request(name), NEW)
        await until(lambda: door.taken == {"a", "b"})
        await served.engine.make(token("a", 1), token("b", 1))
        await served.engine.give_back("a", 4)
        await served.engine.make(token("b", 2, STOP))
        await until(lambda: door.last("b") is not None and Return(RequestId("a"), 4) in door.heard)
        assert door.heard.index(Return(RequestId("a"), 4)) > door.heard.index(token("a", 1))
        link.submit(request("a"), History((1,), 4, True))
        await until(lambda: len(served.engine.taken) == 3)
        await served.engine.make(token("a", 9, STOP))
        await until(lambda: door.last("a") is not None)
        assert door.tokens("a") == [1, 9]


async def test_whom_the_engine_refuses_is_told_why() -> None:
    async with serving() as served:
        door = Listener()
        for link in (served.link(door), local(served.engine, door)):
            for error, why in (
                (ExhaustedError("64 requests are waiting"), FinishReason.UNAVAILABLE),
                (ExhaustedError("too long", param="max_tokens"), FinishReason.ERROR),
                (InvalidRequestError("no prompt", param="prompt"), FinishReason.ERROR),
                (UnavailableError("the server is draining"), FinishReason.UNAVAILABLE),
            ):
                door.heard.clear()
                served.engine.refusal = error
                link.submit(request("a"), NEW)
                assert door.heard == [], "never from within"
                await until(lambda: door.last("a") is not None)
                assert door.heard == [Event(RequestId("a"), finish=why, error=error.message)]
        assert served.engine.ended == []


def local(engine: Any, listener: Listener) -> LocalLink:
    return LocalLink(RANK, engine, lambda: 7, listener)


async def test_the_own_rank_tells_the_same_in_the_same_order() -> None:
    engine, door = ScriptedEngine(), Listener()
    uses = [[ExpertUse("kind", 1, (1,))]]
    link = LocalLink(RANK, engine, lambda: 7, door, lambda: uses.pop() if uses else ())
    link.submit(request("a"), History((4,), 1, True))
    link.submit(request("b"), NEW)
    assert door.heard == [("a", 7), ("b", 7)]
    await engine.make(token("a", 1), token("b", 1))
    await engine.give_back("a", 3)
    await engine.make(token("b", 2, STOP))
    await until(lambda: door.last("b") is not None)
    returned = Return(RequestId("a"), 3)
    made = [token("a", 1), token("b", 1), returned, token("b", 2, STOP)]
    assert door.heard[2:] == made
    assert door.uses == [ExpertUse("kind", 1, (1,))]
    for name in ("a", "b", "unknown"):
        link.end(RequestId(name), STOP)
    assert engine.ended == [], "none of them is here any more"


# --- whose requests are whose


async def test_a_door_ends_its_own_requests_and_no_other_doors() -> None:
    async with serving() as served:
        mine, other = Listener(), Listener()
        links = [served.link(mine), served.link(other)]
        links[0].submit(request("a"), NEW)
        links[1].submit(request("b"), NEW)
        await until(lambda: mine.taken == {"a"} and other.taken == {"b"})
        async with served.attached() as call:
            await call.write(words_to_rank("c", end=[("a", "stop"), ("b", "abort")]))
            await until(lambda: len(served.engine.taken) == 3)
            assert served.engine.ended == []
            links[0].end(RequestId("b"), STOP)
            links[0].end(RequestId("a"), STOP)
            await until(lambda: served.engine.ended == [("a", STOP)])
            call.cancel()
        await until(lambda: served.engine.ended == [("a", STOP), ("c", ABORT)])


@pytest.mark.parametrize("how", ["cancelled", "finished", "closed", "link closed"])
async def test_a_door_that_goes_ends_exactly_what_still_runs(how: str) -> None:
    async with serving() as served:
        door = Listener()
        stays = served.link(door)
        stays.submit(request("other"), NEW)
        names = ["done", "back", "one", "two"]
        if how == "link closed":
            leaving, leaver = served.link(own := Listener()), None
            for name in names:
                leaving.submit(request(name), NEW)
        else:
            own, leaving = Listener(), None
            leaver = await served_stream(served, names)
        await until(lambda: len(served.engine.taken) == 5)
        await served.engine.make(token("done", 1, STOP), token("one", 1))
        await served.engine.give_back("back", 0)
        if leaving is not None:
            await until(lambda: any(isinstance(one, Return) for one in own.heard))
            await leaving.close()
            assert {e.request_id for e in own.heard if isinstance(e, Event) and e.error} == {
                "one",
                "two",
            }
        else:
            assert leaver is not None
            await leaver.leave(how)
        await until(lambda: len(served.engine.ended) == 2)
        assert sorted(served.engine.ended) == [("one", ABORT), ("two", ABORT)]
        await until(lambda: served.service.attached == 1)
        await served.engine.make(token("other", 5, STOP))
        await until(lambda: door.tokens("other") == [5])
        # What the engine makes of those that it has not ended yet reaches nobody, and hurts nobody.
        await served.engine.make(token("one", 2), token("two", 2, ABORT))
        assert len(served.engine.ended) == 2


@dataclass
class Leaver:
    """A door by hand, which has read that one request is done and another is back."""

    channel: grpc.aio.Channel
    call: Any

    async def leave(self, how: str) -> None:
        done = back = 0
        while not (done and back):
            reply = pb.FromRank.FromString(await self.call.read())
            done += sum(1 for news in reply.news if news.finish)
            back += len(reply.returned)
        if how == "cancelled":
            self.call.cancel()
        elif how == "finished":
            await self.call.done_writing()
            assert await self.call.read() is grpc.aio.EOF
        await self.channel.close()


async def served_stream(served: Served, names: Sequence[str]) -> Leaver:
    channel = served.channel()
    attach: Any = channel.stream_stream(f"/{SERVICE}/Attach")
    call = attach(metadata=proof_metadata(Trust(), RUN), timeout=WAIT_S)
    await call.write(words_to_rank(*names))
    return Leaver(channel, call)


# --- what happens when a rank goes


@pytest.mark.parametrize(
    "alarm", [None, LateRankError("rank 3 is gone: it was last heard doing: step 9", [3])]
)
async def test_a_server_that_stops_ends_the_requests_with_what_is_known(
    alarm: LateRankError | None,
) -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        for name in ("a", "b", "done"):
            link.submit(request(name), NEW)
        await until(lambda: door.taken == {"a", "b", "done"})
        await served.engine.make(token("a", 1), token("done", 1, STOP))
        await until(lambda: door.last("done") is not None)
        served.alarm = alarm
        await served.server.stop(None)
        await until(lambda: bool(door.last("a") and door.last("b")))
        for name in ("a", "b"):
            last = door.last(name)
            assert last is not None
            assert last.finish is FinishReason.UNAVAILABLE
            if alarm is not None:
                assert last.error == alarm.message
            else:
                assert last.error.startswith("rank 3 is not reached any more (")
                assert last.error.endswith("retry")
        assert door.tokens("a") == [1]
        assert len(door.events("done")) == 1
        # Another request finds out for itself.
        link.submit(request("c"), NEW)
        await until(lambda: door.last("c") is not None)
        assert [r.id for r, _ in served.engine.taken] == ["a", "b", "done"]
        with pytest.raises(UnavailableError, match=r"rank 3, Counted: .*refused"):
            await link.call("Counted", b"", WAIT_S)


class Deaf:
    """A rank that reads one message of a stream, and ends it when it is told to."""

    def __init__(self) -> None:
        self.streams: list[list[str]] = []
        self.end = asyncio.Event()

    def handlers(self) -> Any:
        methods: dict[str, Any] = {"Attach": grpc.stream_stream_rpc_method_handler(self._attach)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _attach(self, requests: AsyncIterator[bytes], context: Any) -> None:
        message = pb.ToRank.FromString(await anext(requests))
        self.streams.append([one.id for one in message.submit])
        await self.end.wait()
        self.end.clear()


async def test_what_was_not_sent_when_a_stream_broke_is_not_sent_by_the_next() -> None:
    rank, door = Deaf(), Listener()
    async with listening(rank.handlers()) as port:
        channel = open_channel("127.0.0.1", port, Trust(), "")
        alarm = LateRankError("rank 3 is gone", [3])
        link = RemoteLink(RANK, channel, proof_metadata(Trust(), RUN), door, lambda: alarm)
        link.submit(request("first"), NEW)
        await until(lambda: rank.streams == [["first"]])
        link.submit(request("late"), NEW)  # on a stream that is about to break
        rank.end.set()
        await until(lambda: bool(door.last("first") and door.last("late")))
        link.submit(request("new"), NEW)
        await until(lambda: rank.streams == [["first"], ["new"]])
        assert {e.error for e in door.heard} == {"rank 3 is gone"}
        await link.close()


async def test_a_rank_that_is_silent_loses_its_requests_and_is_asked_again() -> None:
    rank, door = Deaf(), Listener()
    async with listening(rank.handlers()) as port:
        channel = open_channel("127.0.0.1", port, Trust(), "")
        metadata = proof_metadata(Trust(), RUN)
        link = RemoteLink(RANK, channel, metadata, door, silent_s=0.2)
        for number, name in enumerate(("first", "second"), 1):
            link.submit(request(name), NEW)
            await until(lambda name=name: door.last(name) is not None)
            last = door.last(name)
            assert last is not None
            assert last.finish is FinishReason.UNAVAILABLE
            assert "has said nothing for 0.2 s" in last.error
            assert len(rank.streams) <= number
        await link.close()


async def test_a_rank_that_beats_is_not_silent() -> None:
    async with serving(beat_s=0.02) as served:
        door = Listener()
        link = RemoteLink(RANK, served.channel(), proof_metadata(Trust(), RUN), door, silent_s=0.5)
        served.links.append(link)
        link.submit(request("slow"), NEW)
        await until(lambda: link._heard >= 60)
        await served.engine.make(token("slow", 1, STOP))
        await until(lambda: door.last("slow") is not None)
        assert door.tokens("slow") == [1]


@contextlib.asynccontextmanager
async def listening(handlers: Any) -> AsyncIterator[int]:
    """A server of what is no ``RankServer``; its port."""
    server, port = open_server("127.0.0.1", Trust(), RUN, [handlers])
    await server.start()
    try:
        yield port
    finally:
        await server.stop(1.0)


async def test_a_link_that_is_closed_ends_and_refuses_requests() -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        link.submit(request("a"), NEW)
        await until(lambda: door.taken == {"a"})
        slow = asyncio.create_task(
            link.call("Replan", pb.Note(content=b"never").SerializeToString(), WAIT_S)
        )
        await asyncio.sleep(0.05)
        await link.close()
        await link.close()
        link.submit(request("b"), NEW)
        link.end(RequestId("b"), STOP)
        await until(lambda: door.last("b") is not None)
        for name in ("a", "b"):
            last = door.last(name)
            assert last is not None
            assert last.finish is FinishReason.UNAVAILABLE
            assert "this process leaves the run" in last.error
        with pytest.raises(UnavailableError, match=r"rank 3"):
            await slow
        with pytest.raises(UnavailableError, match=r"this process leaves the run"):
            await link.call("Counted", b"", WAIT_S)
        await until(lambda: served.engine.ended == [("a", ABORT)])


async def test_a_request_that_no_message_holds_ends_alone() -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        link.submit(request("sound"), NEW)
        link.submit(request("\ud800"), NEW)
        link.submit(request("also sound"), NEW)
        await until(lambda: door.taken == {"sound", "also sound"})
        last = door.last("\ud800")
        assert last is not None
        assert last.finish is FinishReason.ERROR
        assert "cannot be sent to rank 3" in last.error


@pytest.mark.parametrize("reply", [b"\xff\xff\xff", b"finish"], ids=["garbage", "unknown reason"])
async def test_a_rank_that_talks_nonsense_loses_its_requests_only(reply: bytes) -> None:
    async def nonsense(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            wrong = pb.FromRank(news=[pb.News(id="a", finish="because")])
            yield wrong.SerializeToString() if reply == b"finish" else reply

    methods: dict[str, Any] = {"Attach": grpc.stream_stream_rpc_method_handler(nonsense)}
    door = Listener()
    async with listening(grpc.method_handlers_generic_handler(SERVICE, methods)) as port:
        channel = open_channel("127.0.0.1", port, Trust(), "")
        link = RemoteLink(RANK, channel, proof_metadata(Trust(), RUN), door)
        link.submit(request("a"), NEW)
        await until(lambda: door.last("a") is not None)
        last = door.last("a")
        assert last is not None
        assert last.finish is FinishReason.UNAVAILABLE
        assert "it sent " in last.error
        await link.close()


async def test_news_of_requests_that_are_not_there_are_passed_over() -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        link.submit(request("a"), NEW)
        await until(lambda: door.taken == {"a"})
        await served.engine.make(token("a", 1), token("stranger", 1))
        sink = served.engine.sinks[RequestId("a")]
        sink.give_back(RequestId("stranger"), 0)
        await served.engine.make(token("a", 2, STOP))
        await until(lambda: door.last("a") is not None)
        assert [one.request_id for one in door.heard[1:]] == ["a", "a"]


# --- what is not believed


async def status(call: Any) -> grpc.StatusCode:
    """What a stream ends with, after all that came before."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = await call.code()
    return code


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff\xff\xff",
        b"\x0a\x7f",
        words_to_rank(end=[("good", "because")]),
        words_to_rank(end=[("", "")]),
    ],
    ids=["garbage", "cut off", "unknown reason", "no reason"],
)
async def test_bytes_that_mean_nothing_end_the_stream_they_come_on(content: bytes) -> None:
    async with serving() as served:
        door = Listener()
        link = served.link(door)
        link.submit(request("good"), NEW)
        await until(lambda: door.taken == {"good"})
        async with served.attached() as call:
            await call.write(words_to_rank("bad"))
            await until(lambda: len(served.engine.taken) == 2)
            await call.write(content)
            assert await status(call) is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: served.engine.ended == [("bad", ABORT)])
        await served.engine.make(token("good", 1, STOP))
        await until(lambda: door.tokens("good") == [1])


async def test_numbers_out_of_range_and_ids_in_use_end_one_request() -> None:
    wrong = {name: submission(name) for name in ("nan", "vocabulary", "biases", "time")}
    wrong["nan"].sampling.temperature = math.nan
    wrong["vocabulary"].prompt.append(VOCAB)
    wrong["biases"].sampling.biases.append(1.0)
    wrong["time"].timeout_s = -1
    async with serving() as served, served.attached() as call:
        await call.write(words_to_rank("good"))
        more = [submission("good"), *wrong.values()]
        ends = [pb.Ending(id="never seen", reason="stop")]
        await call.write(pb.ToRank(submit=more, end=ends).SerializeToString())
        found: dict[str, pb.News] = {}
        while len(found) < 5:
            found |= {n.id: n for n in pb.FromRank.FromString(await call.read()).news}
        assert {news.finish for news in found.values()} == {"error"}
        assert "is in use: choose another" in found["good"].error
        assert "temperature=nan" in found["nan"].error
        assert "token 1000: the model has 1000" in found["vocabulary"].error
        assert [r.id for r, _ in served.engine.taken] == ["good"]
        assert served.engine.ended == []
        await served.engine.make(token("good", 8, STOP))
        assert list(pb.FromRank.FromString(await call.read()).news[0].tokens) == [8]
        await call.write(words_to_rank("good"))
        await until(lambda: len(served.engine.taken) == 2)
        call.cancel()
    assert served.engine.ended == [("good", ABORT)], "the second one of that id, which runs"


async def test_notes_that_mean_nothing_are_refused_and_calls_end_in_time() -> None:
    async with serving() as served:
        for content, code in (
            (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b"", grpc.StatusCode.FAILED_PRECONDITION),
            (
                pb.Note(content=bytes(1 << 20)).SerializeToString(),
                grpc.StatusCode.FAILED_PRECONDITION,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.ask("Replan", content)
            assert caught.value.code() is code
        assert await served.ask("Counted", b"\xff\xff") == b"", "it asks for nothing"
        link = served.link(Listener())
        with pytest.raises(UnavailableError, match=r"rank 3, Replan: no answer in time"):
            await link.call("Replan", pb.Note(content=b"never").SerializeToString(), 0.1)
        with pytest.raises(UnavailableError, match=r"rank 3, Replan: no plan is changed here"):
            await link.call("Replan", b"", WAIT_S)


# --- the end of a run


async def test_a_server_waits_until_doors_have_left() -> None:
    async with serving() as served:
        assert await served.service.wait_vacant(WAIT_S), "nobody has come yet"
        door = Listener()
        link = served.link(door)
        link.submit(request("a"), NEW)
        await until(lambda: door.taken == {"a"})
        assert served.service.attached == 1
        assert not await served.service.wait_vacant(0.01)
        vacant = asyncio.create_task(served.service.wait_vacant(WAIT_S))
        await link.close()
        assert await vacant
        assert served.service.attached == 0


async def test_links_are_made_when_asked_for_and_not_after_the_end() -> None:
    async with serving() as served:
        made: list[int] = []

        def connect(rank: int, listener: Any) -> RemoteLink:
            made.append(rank)
            return served.link(listener)

        links = LinkTable(0, connect)
        assert await links.remote(RANK).call("Counted", b"", WAIT_S) == b""
        await links.close()
        assert (made, links.remote(RANK)) == ([RANK], links.remote(RANK))
        with pytest.raises(UnavailableError, match=r"rank 2: this process leaves the run"):
            links.remote(2)

        door, engine = Listener(), ScriptedEngine()
        links = LinkTable(RANK, connect)
        links.begin(engine, lambda: 1, door)
        links[RANK].submit(request("own"), NEW)
        links[2].submit(request("other"), NEW)
        await until(lambda: door.taken == {"own", "other"})
        assert [r.id for r, _ in engine.taken] == ["own"]
        await links.close()


# --- queues


async def test_news_from_threads_are_read_once_and_in_order() -> None:
    calls = 0
    found: list[Event | Return] = []

    def on_news() -> None:
        nonlocal calls
        calls += 1
        found.extend(requests.take(13))

    requests = DoorRequests(ScriptedEngine(), on_news)

    def deliver(name: str) -> None:
        for i in range(0, 3000, 3):
            requests.deliver([token(name, i), token(name, i + 1)])
            requests.deliver([token(name, i + 2)])
        requests.give_back(RequestId(name), 1)

    threads = [threading.Thread(target=deliver, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    await until(lambda: len(found) == 2 * 3001)
    for name in ("a", "b"):
        own = [one for one in found if one.request_id == name]
        assert own == [*(token(name, i) for i in range(3000)), Return(RequestId(name), 1)]
    assert calls <= 2 * 2001 + len(found) // 13 + 2
    for thread in threads:
        thread.join(WAIT_S)


def test_an_engine_may_outlive_the_loop() -> None:
    async def begin() -> DoorRequests:
        return DoorRequests(ScriptedEngine(), lambda: None)

    requests = asyncio.run(begin())
    requests.deliver([token("a", 1)])
    requests.give_back(RequestId("a"), 1)
    assert requests.take(9) == [token("a", 1), Return(RequestId("a"), 1)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["submit", "end", "send"]), st.integers(0, 3))))
def test_a_rank_reads_what_a_door_says_in_the_doors_order(ops: list[tuple[str, int]]) -> None:
    """Of each request: what a message submits is read before what it ends. A door says of an id in
    turn that it begins and, perhaps, that it ends."""
    alive: set[int] = set()
    said: list[tuple[str, str]] = []
    read: list[tuple[str, str]] = []

    async def run() -> None:
        outgoing = Outgoing()
        messages = outgoing.messages()

        async def send() -> None:
            while outgoing._messages:
                message = pb.ToRank.FromString(await anext(messages))
                assert len(message.submit) <= 2
                assert len(message.submit) < 2 or sum(len(s.prompt) for s in message.submit) <= 8
                read.extend(("submit", s.id) for s in message.submit)
                read.extend(("end", e.id) for e in message.end)

        for op, which in ops:
            if op == "send":
                await send()
            elif op == "submit":
                alive.add(which)
                said.append((op, str(which)))
                outgoing.submit(request(str(which), range(2 * which)), NEW, 0.0)
            elif which in alive:
                alive.remove(which)
                said.append((op, str(which)))
                outgoing.end(RequestId(str(which)), STOP)
        await send()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outgoing_module, "MOST_TOKENS", 8)
        patch.setattr(outgoing_module, "MOST_REQUESTS", 2)
        asyncio.run(run())
    for which in map(str, range(4)):
        words, seen = ([op for op, name in all_ if name == which] for all_ in (said, read))
        assert seen == words


# --- a real engine


@contextlib.contextmanager
def real_engine() -> Any:
    config = SchedulerConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16)
    counters = Counters()
    pool = BlockPool(64, 4, counters)
    with Engine(Scheduler(config, pool, counters), NullExecutor(64, 4, VOCAB)) as engine:
        yield engine


async def test_a_real_engine_says_the_same_over_grpc_and_by_calls() -> None:
    wanted = [
        request(f"r{i}", range(1, 4 + i), max_tokens=3 + i, seed=i, temperature=0.0)
        for i in range(12)
    ]

    async def tokens_by(link: RankLink, door: Listener) -> dict[str, list[int]]:
        for one in wanted:
            link.submit(one, NEW)
        await until(lambda: all(door.last(one.id) for one in wanted))
        assert {door.last(one.id).finish for one in wanted} == {FinishReason.LENGTH}  # type: ignore[union-attr]
        return {one.id: door.tokens(one.id) for one in wanted}

    with real_engine() as engine:
        async with serving(engine) as served:
            near, far = Listener(), Listener()
            by_call = await tokens_by(local(engine, near), near)
            assert await tokens_by(served.link(far), far) == by_call
            assert [len(tokens) for tokens in by_call.values()] == [3 + i for i in range(12)]
            # A door that vanishes leaves nothing behind.
            gone = served.link(Listener())
            for i in range(9):
                gone.submit(request(f"long {i}", max_tokens=50, ignore_eos=True), NEW)
            await gone.close()
            await until(lambda: engine.load().running == engine.load().waiting == 0)
            assert engine.load().free_blocks == engine.load().total_blocks


def test_who_has_no_door_hears_nothing() -> None:
    unheard = Unheard()
    unheard.on_events(1, [token("a", 1)])
    unheard.on_taken(1, [RequestId("a")], 1)
    unheard.on_returned(1, Return(RequestId("a"), 1))
    unheard.on_uses([])
