"""One request on its way to the engine: room for its KV, then its sources, then the engine.

On the event loop's thread. What is borrowed is recorded on the mover's thread, where it is also
given back: an arrival that is cancelled at any point leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from moeserve.core import BlockId, CacheScope, Event, FinishReason, Logprobs, Request
from moeserve.engine.request_state import RankSink, reason_refused
from moeserve.engine.sequence import HeldKv, History
from moeserve.errors import InvalidRequestError, MoeserveError
from moeserve.observe.spans import RequestSpans
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.digests import RunDigests
from moeserve.pools.kv.fetch import Fetcher
from moeserve.pools.kv.house import KvHouse
from moeserve.pools.kv.importer import KvImporter
from moeserve.pools.kv.limits import FetchLimits
from moeserve.pools.kv.mover import Mover
from moeserve.pools.kv.receiver_call import FetchOrder, SourceLostError
from moeserve.pools.members import ServedTerms

log = logging.getLogger(__name__)

# How often room is looked for where no step ends meanwhile.
LOOK_S = 0.05


@dataclass(slots=True)
class ArrivalRoom:
    """What all arrivals of a rank share."""

    house: KvHouse
    terms: ServedTerms
    fetcher: Fetcher
    mover: Mover
    counters: KvCounters
    limits: FetchLimits
    clock: Callable[[], float]
    spans: RequestSpans | None = None
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)  # first come, first served

    @asynccontextmanager
    async def steps(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set after each step of the engine."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(event.set)

        stop = self.house.on_step(tell)
        try:
            yield event
        finally:
            stop()


class Arrival:
    """``run`` it once. It ends with the engine having the request, or with its last event."""

    def __init__(
        self, room: ArrivalRoom, request: Request, sink: RankSink, history: History
    ) -> None:
        self.request = request
        self._room = room
        self._house = room.house
        self._sink = sink
        self._history = history
        self._tokens = request.prompt_ids + history.output_ids
        self._began = room.clock()
        self._made: tuple[int, ...] = ()  # at a source, which prefilled
        self._followed: tuple[int, ...] = ()  # outputs, of a source that still runs it
        self._handed: tuple[int, ...] = ()  # all outputs, of a source that ran it
        self._scores: tuple[Logprobs, ...] = ()
        self._held: list[HeldKv] = []  # of the mover's thread, while it has jobs of this
        self._importer: KvImporter | None = None
        self._have = self._cached = 0  # of its tokens, in a cache here, or at the source as well
        self._why = FinishReason.UNAVAILABLE, "the server stopped: retry elsewhere"
        self._over = False

    def end_with(self, reason: FinishReason) -> bool:
        """It is to end for this reason: False if it has ended, or the engine has it. The task is
        then cancelled."""
        if reason is not FinishReason.UNAVAILABLE:
            self._why = reason, "" if reason is FinishReason.STOP else "the request was cancelled"
        return not self._over

    async def run(self) -> None:
        deadline = self.request.deadline
        left = None if deadline is None else max(0.0, deadline - self._room.clock())
        try:
            async with asyncio.timeout(left):
                if await self._borrow():
                    await self._fetch()
            if not self._over:
                self._hand_over()
        except TimeoutError:
            self._end(FinishReason.DEADLINE, "the deadline passed")
        except asyncio.CancelledError:
            self._end(*self._why)
        except Exception:  # a bug of ours ends this request alone
            log.exception("request %s does not arrive", self.request.id)
            self._end(FinishReason.ERROR, "internal error: the server's log has the cause")
        finally:
            self._room.counters.add("waited_s", self._room.clock() - self._began)
            self._room.mover.later(self._release)

    # --- room

    async def _borrow(self) -> bool:
        """Whether there is room for its KV; in turn, and not for ever."""
        room = self._room
        try:
            async with asyncio.timeout(room.limits.room_s), room.queue, room.steps() as step:
                while (held := await room.mover.run(self._try_to_borrow)) is None:
                    step.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(step.wait(), LOOK_S)
        except TimeoutError:
            log.warning("no room for the KV of request %s: it waits for its turn", self.request.id)
            return False
        digests = RunDigests(
            room.terms.compute_id, self._house.layouts, self.request.scope, self._tokens
        )
        self._have = self._cached = held.computed
        self._importer = KvImporter(self._house, held, len(self._tokens), digests, room.counters)
        return True

    def _try_to_borrow(self) -> HeldKv | None:
        return self._record(self._house.borrow(self._tokens, self.request.scope))

    def _borrow_more(self, blocks: int) -> HeldKv | None:
        """So many blocks that nobody shares: no scope is like this one."""
        scope = CacheScope(salt=secrets.token_hex(16))
        return self._record(self._house.borrow([0] * (blocks * self._house.block_size), scope))

    def _record(self, held: HeldKv | None) -> HeldKv | None:
        if held is not None:
            self._held.append(held)
            self._room.counters.add("borrowed", len(held.blocks))
        return held

    def _release(self) -> None:
        held, self._held = self._held, []
        for one in held:
            self._room.counters.add("borrowed", -len(one.blocks))
            self._house.give_back(one)

    # --- sources

    def _tell_taken(self, address: str, began: float, nbytes: int, runs: int) -> None:
        """So much has come from one of them since ``began``."""
        room = self._room
        room.counters.add_from(address, nbytes, runs)
        if room.spans is not None:
            took = room.clock() - began
            room.spans.add(
                self.request.trace, "kv_transfer", took, 0.0,
                source=address, bytes=nbytes, runs=runs, request_id=self.request.id,
            )  # fmt: skip

    async def _fetch(self) -> None:
        """From the first source that has all; a token that one has made ends it in any case, for
        another source would have to make more."""
        room, importer = self._room, self._importer
        assert importer is not None
        for source in self._history.sources:
            on_event = self._refuse_event if source.running else self._on_event
            order = FetchOrder(
                source,
                self.request,
                self._history,
                importer,
                on_event,
                self._on_handed,
                self._on_made,
                self._on_whole,
            )
            began, nbytes, runs = room.clock(), importer.taken_bytes, importer.taken_runs
            try:
                await room.fetcher.fetch(order)
                return
            except SourceLostError as error:
                room.counters.add_to("sources_lost", error.kind)
                log.warning("request %s: %s", self.request.id, error.message)
            finally:
                await room.mover.run(self._idle)  # what the source sent is imported, or not
                taken = importer.taken_bytes - nbytes, importer.taken_runs - runs
                self._tell_taken(source.address, began, *taken)
            if self._over or self._made or self._followed or self._handed:
                return
            self._scores = ()

    def _idle(self) -> None:
        """A job behind those of a source."""

    def _refuse_event(self, event: Event) -> bool:
        raise InvalidRequestError(f"news of {event.request_id!r}, which it was to hand over")

    def _on_event(self, event: Event) -> bool:
        """What a source that prefills makes; False where it ends the request. The
        log-probabilities of a prompt are of use only when all are there."""
        params, outputs = self.request.params, self._history.output_ids
        self._scores += event.prompt_logprobs
        if not event.token_ids:
            return True
        scored = 0
        if params.prompt_logprobs is not None and not outputs:
            scored = len(self.request.prompt_ids) - 1
        token = event.token_ids[0]
        sound = (
            len(event.token_ids) == 1
            and not self._made
            and token < self._room.terms.vocab
            and len(event.logprobs) == (params.logprobs is not None)
            and len(self._scores) == scored
            and event.finish in (FinishReason.STOP, FinishReason.LENGTH)
        )
        if not sound:
            raise InvalidRequestError(f"news that do not fit the request: {event}"[:200])
        length = len(self._tokens) + 1
        longest = len(self.request.prompt_ids) + params.max_tokens
        ends = event.finish is FinishReason.STOP or length >= min(
            longest, self._room.terms.max_model_len
        )
        self._made = event.token_ids
        told = Event(
            self.request.id,
            event.token_ids,
            event.logprobs,
            event.finish if ends else None,
            cached_tokens=max(event.cached_tokens, self._have),
        )
        before = [Event(self.request.id, prompt_logprobs=self._scores)] if scored else []
        self._over, self._cached = ends, told.cached_tokens
        self._sink.deliver([*before, told])
        return not ends

    async def _on_handed(self, outputs: tuple[int, ...], computed: int) -> bool:
        """A source lets go of the request; False if there is no room for what it made."""
        importer, known = self._importer, self._history.output_ids + self._followed
        assert importer is not None
        total = len(self.request.prompt_ids) + len(outputs)
        sound = (
            not self._handed
            and outputs[: len(known)] == known
            and all(token < self._room.terms.vocab for token in outputs)
            and total <= self._room.terms.max_model_len
            and importer.most_arrived <= computed <= total
        )
        if not sound:
            raise InvalidRequestError(f"{len(outputs)} outputs, {computed} computed: not possible")
        self._handed = outputs
        return await self._extend(importer, outputs[len(known) :], computed)

    async def _on_made(self, outputs: tuple[int, ...]) -> bool:
        """A source goes on running the request, of which more is to come; False if there is no
        room for it."""
        importer = self._importer
        assert importer is not None
        total = len(self._tokens) + len(self._followed) + len(outputs)
        sound = (
            not self._handed
            and outputs
            and all(token < self._room.terms.vocab for token in outputs)
            and total <= self._room.terms.max_model_len
        )
        if not sound:
            raise InvalidRequestError(f"{len(outputs)} more outputs, {total} tokens: not possible")
        self._followed += outputs
        return await self._extend(importer, outputs, total)

    async def _extend(self, importer: KvImporter, outputs: tuple[int, ...], length: int) -> bool:
        """Room for so many positions in all."""
        more = -(-length // self._house.block_size) - len(importer.held.blocks)
        blocks: tuple[BlockId, ...] = ()
        if more > 0:
            held = await self._room.mover.run(self._borrow_more, more)
            if held is None:
                return False
            blocks = held.blocks
        importer.extend(blocks, outputs, length)
        return True

    # --- the engine

    def _on_whole(self) -> None:
        if not self._over:
            self._hand_over()

    def _hand_over(self) -> None:
        """The engine gets the request with all that has come. No job of this waits any more."""
        outputs, known = self._history.output_ids + self._made, len(self._history.output_ids)
        if self._handed and self.request.params.logprobs is None:
            outputs = self._handed
            if outputs[known:]:
                self._sink.deliver([Event(self.request.id, outputs[known:])])
        tokens = self.request.prompt_ids + outputs
        held = self._usable(len(tokens), bool(outputs))
        reached = max(self._history.reached, held.computed if held else 0)
        if self._made:
            reached = max(reached, len(self._tokens))
        moved = self._history.moved or bool(self._made or self._handed)
        cached = self._cached if held is not None or self._made else None
        history = History(outputs, reached, moved, kv=held, cached=cached)
        self._count(held)
        try:
            if held is not None:
                self._house.publish(held, tokens[: held.computed], self.request.scope)
            self._house.submit(self.request, self._sink, history)
        except MoeserveError as error:
            self._end(reason_refused(error), error.message)
            return
        self._over = True
        if held is not None:
            self._keep_surplus(held)

    def _usable(self, length: int, begun: bool) -> HeldKv | None:
        """Blocks with the KV of what came, up to the last token, which is to be computed; None
        where that is no more than was here. The log-probabilities of a prompt come with its
        computation, so it is computed whole unless they are there."""
        importer = self._importer
        if importer is None or (self.request.params.prompt_logprobs is not None and not begun):
            return None
        computed = min(importer.computed, length - 1)
        if computed <= self._have:
            return None
        count = -(-computed // self._house.block_size)
        return HeldKv(importer.held.blocks[:count], computed)

    def _count(self, held: HeldKv | None) -> None:
        computed = held.computed if held is not None else self._have
        wanted = self._importer.length if self._importer is not None else len(self._tokens)
        self._room.counters.add("fetched", computed - self._have)
        self._room.counters.add("recomputed", max(0, wanted - computed))

    def _keep_surplus(self, held: HeldKv) -> None:
        """The blocks of ``held`` are the request's now; the others are still given back."""
        assert self._importer is not None
        self._room.counters.add("borrowed", -len(held.blocks))
        self._held = [HeldKv(self._importer.held.blocks[len(held.blocks) :], 0)]

    def _end(self, reason: FinishReason, error: str) -> None:
        """The last event, unless there was one."""
        if not self._over:
            self._over = True
            self._sink.deliver([Event(self.request.id, finish=reason, error=error)])
