"""A rank's KV with the cache pool behind it: what others have computed is fetched before a request
is computed here, and what is computed here is put there.

``PooledHouse`` stands before a rank's ``KvHouse`` and is one, so those who move KV and those who
submit requests use it instead. A request whose KV does not come with it waits outside the engine
while its prefix comes from the pool into borrowed blocks, and is then submitted with these. If the
pool has nothing, is slow, or wrong, or there is no room, it is submitted as it came: the pool costs
it at most ``fetch_s``, and never a token. Requests whose prompt is to be scored are computed whole.

When a request has its first token, the full pages of its prompt that the pool lacks are exported,
on a thread, from the rank's prefix cache, and put behind the requests. All but ``submit``'s waiting
is for any thread; the pool is of the event loop's, which runs when this is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from moeserve.core import BlockId, CacheScope, Event, FinishReason, Request, RequestId
from moeserve.engine.bounds import refuse_duplicate
from moeserve.engine.request_state import EventSink, RankSink, reason_refused
from moeserve.engine.sequence import HeldKv, History, StepKv
from moeserve.errors import DataLossError, MoeserveError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.ops import KvRuns
from moeserve.pools.cache.page_kv import page_kv_of
from moeserve.pools.cache.pages import StoredRun
from moeserve.pools.cache.pool import FETCH_S, PagePool
from moeserve.pools.cache.prefix_arrival import (
    LentBlocks,
    PrefixArrival,
    WatchedRankSink,
    WatchedSink,
)
from moeserve.pools.kv.house import KvHouse

log = logging.getLogger(__name__)

# Requests that wait for the pool at once; further ones are computed. Prompts that wait to be put.
MOST_ARRIVING = 256
MOST_LEAVING = 256

T = TypeVar("T")


@dataclass(slots=True)
class PooledCounts:
    """Requests that looked into the pool, tokens that came of it, and pages that were put;
    ``crowded`` did not look or were not put, for too many did or there was no room."""

    looked: int = 0
    fetched_tokens: int = 0
    put_pages: int = 0
    wrong: int = 0
    crowded: int = 0


class PooledHouse:
    """A ``KvHouse``. Close it before the house and the pool. ``prefill_rate`` is what this rank
    has lately computed, in tokens per second; 0 where that is not known."""

    def __init__(
        self,
        house: KvHouse,
        pool: PagePool,
        *,
        fetch_s: float = FETCH_S,
        prefill_rate: Callable[[], float] = float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._house = house
        self.counts = PooledCounts()
        self._pool = pool
        self._page_kv = page_kv_of(house, pool.terms.page_tokens)
        self._fetch_s = fetch_s
        self._prefill_rate = prefill_rate
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._mover = ThreadPoolExecutor(1, "moeserve-cache-pool")
        self._lock = threading.Lock()  # of the four below
        self._arriving: dict[RequestId, PrefixArrival] = {}
        self._watched: dict[RequestId, Request] = {}
        self._sinks: WeakValueDictionary[int, WatchedSink] = WeakValueDictionary()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()  # of the loop's thread
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def arriving(self) -> int:
        """Requests that the engine does not have yet."""
        return len(self._arriving)

    # --- as the house

    @property
    def layouts(self) -> tuple[KvBlockLayout, ...]:
        return self._house.layouts

    @property
    def block_size(self) -> int:
        return self._house.block_size

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        return self._house.borrow(token_ids, scope)

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        self._house.publish(held, token_ids, scope)

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        self._house.give_back(held, forget=forget)

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        self._house.export_kv(layer, blocks, out_NX)

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        self._house.import_kv(layer, blocks, data_NX)

    def export_runs(self, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
        return self._house.export_runs(blocks, runs, out_X)

    def import_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
    ) -> Tensor:
        return self._house.import_runs(blocks, runs, digests_RD, data_X)

    def look(self, request_id: RequestId) -> HeldKv | None:
        return self._house.look(request_id)

    def look_within(self, request_id: RequestId) -> StepKv | None:
        return self._house.look_within(request_id)

    def layers_done(self, step: int) -> int:
        return self._house.layers_done(step)

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        return self._house.take_kept(request_id)

    def made(self, request_id: RequestId) -> tuple[int, ...] | None:
        return self._house.made(request_id)

    def detach(self, request_id: RequestId) -> tuple[HeldKv, tuple[int, ...]] | None:
        return self._house.detach(request_id)

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        return self._house.on_step(tell)

    def between_steps(self, tell: Callable[[], None]) -> Callable[[], None]:
        return self._house.between_steps(tell)

    def submit(self, request: Request, sink: EventSink, history: History) -> None:
        """As the house's; of one that looks into the pool first, what the engine says of it comes
        as an event."""
        length = len(request.prompt_ids) + len(history.output_ids)
        scored = request.params.prompt_logprobs is not None and not history.output_ids
        if self._page_kv is None or length <= self._pool.terms.page_tokens:
            self._house.submit(request, sink, history)
            return
        watched = self._watch(request, sink)
        try:
            if history.kv is not None or scored or not self._begin(request, watched, history):
                self._house.submit(request, watched, history)
        except MoeserveError:
            self._forget(request.id)
            raise

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        with self._lock:
            one = self._arriving.get(request_id)
        if one is None:
            self._house.abort(request_id, reason)
        else:
            self._on_loop(lambda: self._end(one, reason))

    async def close(self) -> None:
        """Requests that the engine does not have yet end; what is being put is dropped."""
        with self._lock:
            self._closed = True
        await asyncio.sleep(0)  # what other threads have asked the loop for has begun now
        for one in tuple(self._arriving.values()):
            one.cancel(FinishReason.UNAVAILABLE)
        for task in tuple(self._leaving):
            task.cancel()
        if tasks := self._tasks | self._leaving:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self._mover.shutdown)

    # --- arriving

    def _begin(self, request: Request, sink: EventSink, history: History) -> bool:
        with self._lock:
            refuse_duplicate(request, request.id in self._arriving)
            if not len(self._pool.members):
                return False
            if self._closed or len(self._arriving) >= MOST_ARRIVING:
                self.counts.crowded += 1
                return False
            one = PrefixArrival(request, sink, history)
            self._arriving[request.id] = one
        self.counts.looked += 1
        self._on_loop(lambda: self._start(one))
        return True

    def _start(self, one: PrefixArrival) -> None:
        one.task = self._loop.create_task(self._arrive(one))
        self._tasks.add(one.task)
        one.task.add_done_callback(self._done)

    def _end(self, one: PrefixArrival, reason: FinishReason) -> None:
        """The engine may have got it meanwhile."""
        if one.handed_over:
            self._house.abort(one.request.id, reason)
        else:
            one.cancel(reason)

    async def _arrive(self, one: PrefixArrival) -> None:
        tokens = one.request.prompt_ids + one.history.output_ids
        one.begun = True
        try:
            if one.ended is not None:
                raise asyncio.CancelledError
            with contextlib.suppress(TimeoutError):
                await self._fetch(one, tokens)
            self._hand_over(one, tokens)
        except asyncio.CancelledError:
            why = one.ended or FinishReason.UNAVAILABLE
            stopped = why is FinishReason.UNAVAILABLE
            text = "the server stopped: retry elsewhere" if stopped else "it was cancelled"
            one.end(why, "" if why is FinishReason.STOP else text)
        except Exception:  # a bug of ours ends this request alone
            log.exception("request %s does not arrive", one.request.id)
            one.end(FinishReason.ERROR, "internal error: the server's log has the cause")
        finally:
            with self._lock:
                del self._arriving[one.request.id]
            self._mover.submit(self._release, one.lent)  # behind what borrows, and writes to it

    def _borrow(self, lent: LentBlocks, tokens: tuple[int, ...], scope: CacheScope) -> None:
        held = self._house.borrow(tokens, scope)
        if held is None:
            self.counts.crowded += 1
        else:
            lent.held, lent.computed = held, held.computed

    def _release(self, lent: LentBlocks) -> None:
        held, lent.held = lent.held, None
        if held is not None:
            self._house.give_back(held)

    async def _fetch(self, one: PrefixArrival, tokens: tuple[int, ...]) -> None:
        """What the pool has and this rank lacks. Blocks are borrowed where there is something."""
        pool, scope = self._pool, one.request.scope
        left = self._fetch_s
        if one.request.deadline is not None:
            left = min(left, one.request.deadline - self._clock())
        async with asyncio.timeout(left):
            deadline = time.monotonic() + left
            hit = await pool.find(tokens, scope, 0, left)
            if not hit.tokens:
                return
            await self._run(self._borrow, one.lent, tokens, scope)
            hit = hit.beyond(one.lent.computed, pool.terms.page_tokens)
            gain = min(hit.tokens, len(tokens) - 1 - one.lent.computed)
            if one.lent.held is None or gain < self._house.block_size:
                return
            if (rate := self._prefill_rate()) > 0:
                pool.policy.computed(1 << 20, (1 << 20) / rate)
            if pool.policy.choose_fetch(gain, hit.nbytes):
                async with aclosing(pool.fetch_hit(hit, deadline)) as runs:
                    await self._import(one, one.lent.held, tokens, runs)

    async def _import(
        self,
        one: PrefixArrival,
        held: HeldKv,
        tokens: tuple[int, ...],
        runs: AsyncIterator[StoredRun],
    ) -> None:
        """Pages from the first one on that is not here whole; what is computed grows by each."""
        size, scope = self._pool.terms.page_tokens, one.request.scope
        keys, layers = self._pool.keys(tokens, scope), len(self._house.layouts)
        at, came, page_kv = one.lent.computed // size, 0, self._page_kv
        assert page_kv is not None, "nothing is fetched"
        async for run in runs:
            if (run.layer, run.start, run.count) != (came, at * size, size):
                self._reject(tokens, scope, at * size)
                return
            first = max(at * size, one.lent.computed) // self._house.block_size
            blocks = held.blocks[first : (at + 1) * page_kv.blocks_per_page]
            try:
                await self._run(page_kv.import_run, run, keys[at], blocks)
            except DataLossError as error:
                log.warning("cache pool: %s", error)
                self._reject(tokens, scope, at * size)
                return
            came += 1
            if came == layers:
                came, at = 0, at + 1
                one.fetched += at * size - one.lent.computed
                one.lent.computed = at * size

    def _reject(self, tokens: tuple[int, ...], scope: CacheScope, position: int) -> None:
        self.counts.wrong += 1
        self._pool.reject(tokens, scope, position)

    def _hand_over(self, one: PrefixArrival, tokens: tuple[int, ...]) -> None:
        """The engine gets the request, with what has come."""
        history, computed = one.history, min(one.lent.computed, len(tokens) - 1)
        given: HeldKv | None = None
        if one.lent.held is not None and one.fetched:
            count = -(-computed // self._house.block_size)
            given = HeldKv(one.lent.held.blocks[:count], computed)
            reached = max(history.reached, computed)
            history = replace(history, kv=given, reached=reached)
        try:
            if given is not None:
                self._house.publish(given, tokens[:computed], one.request.scope)
            self._house.submit(one.request, one.sink, history)
        except MoeserveError as error:
            one.end(reason_refused(error), error.message)
            return
        one.handed_over = True
        if given is not None and one.lent.held is not None:  # these are the request's now
            self.counts.fetched_tokens += one.fetched
            one.lent.held = HeldKv(one.lent.held.blocks[len(given.blocks) :], 0)

    # --- leaving

    def _watch(self, request: Request, sink: EventSink) -> EventSink:
        """A sink that also tells of the request's first token; one for all requests of a sink, for
        an engine delivers to each sink once a step."""
        with self._lock:
            self._watched[request.id] = request
            found = self._sinks.get(id(sink))
            if found is None:
                if isinstance(sink, RankSink):
                    found = WatchedRankSink(sink, self._on_events, self._forget)
                else:
                    found = WatchedSink(sink, self._on_events)
                self._sinks[id(sink)] = found
            return found

    def _forget(self, request_id: RequestId) -> Request | None:
        with self._lock:
            return self._watched.pop(request_id, None)

    def _on_events(self, events: Sequence[Event]) -> None:
        if not self._watched:
            return
        for event in events:
            if event.token_ids or event.finish is not None:
                request = self._forget(event.request_id)
                if request is not None and event.token_ids:
                    self._on_loop(partial(self._leave, request))

    def _leave(self, request: Request) -> None:
        if self._closed or len(self._leaving) >= MOST_LEAVING:
            self.counts.crowded += 1
            return
        task = self._loop.create_task(self._put(request))
        self._leaving.add(task)
        task.add_done_callback(self._done)

    async def _put(self, request: Request) -> None:
        """The full pages of the prompt that the pool lacks."""
        tokens, scope = request.prompt_ids, request.scope
        size, layers = self._pool.terms.page_tokens, len(self._house.layouts)
        first = await self._pool.kept(tokens, scope) // size
        if first >= len(tokens) // size:
            return
        page_kv = self._page_kv
        assert page_kv is not None, "nothing is watched"
        lent, runs = LentBlocks(), list[StoredRun]()
        try:
            # What the prefix cache here has, and one token, for which a block must be free.
            whole = (*tokens[: len(tokens) // size * size], 0)
            await self._run(self._borrow, lent, whole, scope)
            if lent.held is not None:
                keys, most = self._pool.keys(tokens, scope), self._pool.terms.put_bytes
                last = min(lent.computed // size, first + most // page_kv.page_bytes)
                for page in range(first, last):
                    blocks = page_kv.blocks_of(page, lent.held.blocks)
                    runs += await self._run(page_kv.export, page, keys[page], blocks)
        finally:
            self._mover.submit(self._release, lent)
        if runs:
            self.counts.put_pages += len(runs) // layers
            self._pool.put(tokens, scope, runs)

    # --- threads

    async def _run(self, job: Callable[..., T], *args: Any) -> T:
        """On the mover's thread, to its end, also where whoever waits is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self._mover.submit(job, *args)))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the cache pool failed", exc_info=error)

    def _on_loop(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(call)
