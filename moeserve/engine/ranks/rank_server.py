"""This rank as other processes reach it (``rank.proto``): doors give it requests and get their
tokens back, rank 0 prepares changes of plan, and whoever shows figures asks what it has counted.

A door has one stream, ``Attach``, for as long as it lives, so that call has no deadline: gRPC's
keepalive finds a door that is dead or cut off (``comm.control.rpc``). When the stream ends, for
whatever reason, so do the door's requests here. What is new for a door after a step is one message;
while the stream is busy, news gather to the next.

What a caller sends is not believed: a request whose numbers a step could not compute with ends with
an event that says so; bytes that are no message, or an ending that names no reason, end the call
with INVALID_ARGUMENT. Other callers notice nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from moeserve.core import FinishReason, RequestId
from moeserve.engine.ranks.door_requests import DoorRequests, RankEngine, Return
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.ranks.messages import (
    parse,
    read_ending,
    read_submission,
    write_news,
    write_uses,
)
from moeserve.errors import InvalidRequestError, MoeserveError
from moeserve.pb import rank_pb2 as pb

SERVICE = "moeserve.rank.RankService"
# News of one message at most: with many log-probabilities each, it stays far below
# ``rpc.MOST_BYTES``.
MOST_NEWS = 1 << 14
# What preparing a layer may take, which reads it from a disk.
ANSWER_S = 600.0

Context = grpc.aio.ServicerContext[Any, Any]


class AttachedDoor:
    """What one door's stream brings and takes. On the event loop's thread."""

    def __init__(
        self,
        engine: RankEngine,
        next_round: Callable[[], int],
        take_uses: Callable[[], Sequence[ExpertUse]],
        vocab_size: int,
        clock: Callable[[], float],
    ) -> None:
        self._next_round = next_round
        self._take_uses = take_uses
        self._vocab_size = vocab_size
        self._clock = clock
        self._ready = asyncio.Event()
        self._reply = pb.FromRank()
        self._over = False
        self._requests = DoorRequests(engine, self._ready.set)

    def read(self, content: bytes) -> None:
        """What the door wants; InvalidRequestError where it cannot be understood."""
        message = parse(pb.ToRank, content)
        for submission in message.submit:
            self._submit(submission)
        for ending in message.end:
            self._requests.end(*read_ending(ending))

    def finish(self) -> None:
        """The door sends nothing more."""
        self._over = True
        self._ready.set()

    async def wait(self, beat_s: float | None = None) -> bool:
        """Until there is something to ``write``, or for ``beat_s``; False when the door has
        finished."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(beat_s):
                await self._ready.wait()
        return not self._over

    def write(self) -> bytes:
        """All that is new."""
        self._ready.clear()
        reply, self._reply = self._reply, pb.FromRank()
        for news in self._requests.take(MOST_NEWS):
            if isinstance(news, Return):
                reply.returned.add(id=news.request_id, reached=news.reached)
            else:
                write_news(reply.news.add(), news)
        reply.uses.extend(write_uses(self._take_uses()))
        return reply.SerializeToString()

    def close(self) -> None:
        """The door is gone: end what it has here."""
        self._requests.close()

    def _submit(self, submission: pb.Submission) -> None:
        try:
            request, history = read_submission(submission, self._clock(), self._vocab_size)
        except InvalidRequestError as error:
            self._requests.refuse(RequestId(submission.id), error.message, FinishReason.ERROR)
            return
        if self._requests.submit(request, history):
            self._reply.taken.append(request.id)
            self._reply.round = self._next_round()
            self._ready.set()


class RankServer:
    """Answers calls of ``rank.proto`` on the event loop.

    ``next_round`` is the first round whose records show what the engine takes in from now on;
    ``counted`` makes the reply of ``Counted``, ``replan`` answers a note of a plan change, within
    ``ANSWER_S``. Token ids are below ``vocab_size``. A door hears something every ``beat_s``, also
    where nothing is new; None: only what is new.
    """

    def __init__(
        self,
        engine: RankEngine,
        next_round: Callable[[], int],
        counted: Callable[[], pb.CountedReply],
        replan: Callable[[bytes], Any],
        *,
        vocab_size: int,
        take_uses: Callable[[], Sequence[ExpertUse]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        beat_s: float | None = None,
    ) -> None:
        self._beat_s = beat_s
        self._engine = engine
        self._next_round = next_round
        self._counted = counted
        self._replan = replan
        self._vocab_size = vocab_size
        self._take_uses = take_uses
        self._clock = clock
        self._attached = 0
        self._vacant = asyncio.Event()
        self._vacant.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Attach": grpc.stream_stream_rpc_method_handler(self._attach),
                "Counted": grpc.unary_unary_rpc_method_handler(self._count),
                "Replan": grpc.unary_unary_rpc_method_handler(self._note),
            },
        )

    @property
    def attached(self) -> int:
        """Doors that have a stream here."""
        return self._attached

    async def wait_vacant(self, timeout_s: float) -> bool:
        """Until no door has a stream here; False if that takes longer. A server that stops earlier
        breaks their streams."""
        try:
            await asyncio.wait_for(self._vacant.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def _attach(self, requests: AsyncIterator[bytes], context: Context) -> None:
        door = AttachedDoor(
            self._engine, self._next_round, self._take_uses, self._vocab_size, self._clock
        )
        self._attached += 1
        self._vacant.clear()
        reading = asyncio.create_task(_read_all(door, requests))
        try:
            while await door.wait(self._beat_s):
                await context.write(door.write())
            await reading
        except InvalidRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        finally:
            reading.cancel()
            door.close()
            self._attached -= 1
            if not self._attached:
                self._vacant.set()

    async def _count(self, request: bytes, context: Context) -> bytes:
        return self._counted().SerializeToString()

    async def _note(self, request: bytes, context: Context) -> bytes:
        try:
            answer = self._replan(parse(pb.Note, request).content)
            content = await asyncio.wait_for(asyncio.wrap_future(answer), ANSWER_S)
        except InvalidRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        except MoeserveError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        return pb.Note(content=content).SerializeToString()


async def _read_all(door: AttachedDoor, requests: AsyncIterator[bytes]) -> None:
    try:
        async for message in requests:
            door.read(message)
    finally:
        door.finish()
