"""The step loop: one thread that owns scheduler and executor and feeds every stream.

``submit`` refuses or queues; from then on the request's sink receives ``Event``s, on the engine's
thread, until one with ``finish``, which always comes: with an error if a step fails, if the
request is aborted or late, or if the engine stops. A sink that many requests share is called once
a step, with the events of all of them. Tokens leave as ids: the loop knows no text, and no stop
strings; whoever finds one aborts the request with ``FinishReason.STOP``. A failing step ends the
requests that were in it, and the engine goes on; where the executor says that it is unavailable,
all requests end so, and the engine with them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from moeserve.core import (
    Counters,
    Event,
    FinishReason,
    Request,
    RequestId,
    StepPlan,
    Timing,
)
from moeserve.engine.ahead import MakesSteps, steps_of
from moeserve.engine.bounds import refuse_duplicate
from moeserve.engine.drive import Schedules, StepOutcome
from moeserve.engine.executor import Executor
from moeserve.engine.pace import Alone, Pace
from moeserve.engine.request_state import EventSink, Outbox, RankSink, RequestState
from moeserve.engine.sequence import NEW, History, SequenceState
from moeserve.errors import UnavailableError

IDLE_S = 1.0
# Who waits for blocks that are lent finds out at the latest after this if they come back, or if a
# deadline has come.
NO_ROOM_S = 0.02
LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot. Free blocks are those nobody holds; some of them may still be cached."""

    running: int
    waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_size: int
    accepting: bool


class EngineObserver(Protocol):
    """What metrics are made of. Called on the engine's thread."""

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        """How many tokens came how many seconds after the one before them; first tokens are not
        among them."""
        ...

    def on_first_token(self, timing: Timing) -> None: ...

    def on_finish(self, reason: FinishReason, timing: Timing) -> None: ...


class ServingEngine(Protocol):
    """What doors submit to: an ``Engine``, or all ranks' as one (``ranks.instance``)."""

    @property
    def counters(self) -> Counters: ...

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request, sink: EventSink) -> None: ...

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None: ...

    def load(self) -> EngineLoad: ...

    def stop(self, timeout: float = 30.0) -> bool: ...


class Unobserved:
    """An observer for an engine that nobody watches."""

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...

    def on_gaps(self, gaps: Mapping[float, int]) -> None: ...

    def on_first_token(self, timing: Timing) -> None: ...

    def on_finish(self, reason: FinishReason, timing: Timing) -> None: ...


class EngineLock:
    """Whoever holds it is the only one to touch the scheduler and the table of streams. Reentrant.

    The engine's thread holds it to plan a step and to apply its result, never while the executor
    runs or a sink is called: so it is free within moments, and holding it does not mean that no
    step is running. UnavailableError after ``LOCK_S``.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()

    def __enter__(self) -> None:
        if not self._mutex.acquire(timeout=LOCK_S):
            raise UnavailableError(f"the engine has not answered for {LOCK_S:.0f} s")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mutex.release()


class Engine:
    """``start`` or ``with`` it. Where the executor can be started, a step is planned while the one
    before runs (``ahead``). Among several ranks ``pace`` says when a step is due that this
    engine has no request for, and ``lock`` is shared with whoever else looks at the scheduler.
    ``steps`` makes the steps otherwise than one after the other.
    ``on_end`` is called once, on the engine's thread when it ends, with the reason; ``after_step``
    between two steps, when the events of the one before have been sent.
    """

    def __init__(
        self,
        scheduler: Schedules,
        executor: Executor,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
        lock: EngineLock | None = None,
        steps: MakesSteps | None = None,
    ) -> None:
        self.on_end: Callable[[str], None] = lambda reason: None
        self.after_step: Callable[[], None] = lambda: None
        self._scheduler = scheduler
        self._observer = observer or Unobserved()
        self._clock = clock
        self._pace = pace or Alone()
        self._stop_reason = "the server stopped: retry elsewhere"
        self._log = logging.getLogger("moeserve.engine")
        self._lock = lock or EngineLock()  # of scheduler, streams and accepting
        self._steps = steps or steps_of(scheduler, executor, clock, self._lock, self._pace)
        self._streams: dict[RequestId, RequestState] = {}
        self._accepting = True
        self._cancelled: deque[tuple[RequestState, FinishReason]] = deque()
        self._detached: deque[tuple[RequestState, int]] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="moeserve-engine", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    @property
    def alive(self) -> bool:
        """Whether requests make progress."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, sink: EventSink, history: History = NEW) -> None:
        """Queue a request from any thread, or raise why it cannot be served."""
        stream = RequestState(request, sink, submitted=self._clock(), came_cached=history.cached)
        with self._lock:
            if not self._accepting:
                raise UnavailableError("the server is stopping or stopped: retry elsewhere")
            # The scheduler lets go of a request before its stream has had its last event.
            refuse_duplicate(request, request.id in self._streams)
            self._scheduler.add(request, history)
            self._streams[request.id] = stream
        self._pace.wake()

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request before the next step, from any thread; ended ones are left alone.

        ``reason`` is what its last event and the counters say: STOP where its client's text is
        complete, ERROR where it cannot be made.
        """
        stream = self._streams.get(request_id)  # without the lock: one look at a dict is atomic
        if stream is not None:
            self._cancelled.append((stream, reason))
            self._pace.wake()

    def count_end(self, reason: FinishReason) -> None:
        """A request has ended that no scheduler ever had; from any thread."""
        with self._lock:
            finished = self._scheduler.counters.finished
            finished[reason] = finished.get(reason, 0) + 1

    def wake(self) -> None:
        """Look again whether there is something to do, from any thread."""
        self._pace.wake()

    def give_back(self, count: int) -> None:
        """Let so many waiting requests go, those that wait longest first, to whoever submitted
        them. On the engine's thread, while a step is agreed on."""
        with self._lock:
            waiting = self._scheduler.withdraw(count)
            streams = [self._streams.pop(seq.request.id) for seq in waiting]
        for seq, stream in zip(waiting, streams, strict=True):
            assert isinstance(stream.sink, RankSink), "only ranks give requests back"
            stream.sink.give_back(seq.request.id, seq.reached)

    def detach(self, request_id: RequestId) -> SequenceState | None:
        """Take a request out, from any thread; its blocks are the caller's then. Its sink is told
        that it is given back, on the engine's thread, after the events of all tokens that it has;
        what a step under way makes for it is lost. None if it is not here, or its sink is no
        ``RankSink``."""
        with self._lock:
            stream = self._streams.get(request_id)
            if stream is None or not isinstance(stream.sink, RankSink):
                return None
            seq = self._scheduler.detach(request_id)
            if seq is not None:
                self._detached.append((stream, seq.reached))
        self._pace.wake()
        return seq

    def load(self) -> EngineLoad:
        with self._lock:
            blocks = self._scheduler.blocks
            return EngineLoad(
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                total_blocks=blocks.total,
                free_blocks=blocks.free,
                cached_blocks=blocks.cached,
                block_size=blocks.size,
                accepting=self._accepting,
            )

    def stop(self, timeout: float = 30.0) -> bool:
        """End every stream and the thread; False if a step still ran after ``timeout``."""
        self._stopping.set()
        with self._lock:
            # Ranks that others still need go on until all leave.
            self._accepting &= not self._pace.leave()
        self._pace.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._end_all()
        if self._thread.is_alive():
            self._log.error("the engine's step did not end within %.0f s", timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            while not (self._stopping.is_set() and self._pace.leave()):
                if not self._step():
                    self._pace.rest(NO_ROOM_S if self._scheduler.has_work else IDLE_S)
        except UnavailableError as error:
            self._stop_reason = error.message
            self._log.critical("the engine stopped: %s", error.message)
        except Exception:  # noqa: BLE001 - the thread's last stop: log it, then end every stream
            self._log.critical("the engine stopped", exc_info=True)
        finally:
            with self._lock:
                self._accepting = False
            self._end_all()
            self.on_end(self._stop_reason)

    def _step(self) -> bool:
        """One turn; False if there was nothing to do."""
        outbox = Outbox()
        self._return_detached()
        try:
            while self._cancelled:
                stream, reason = self._cancelled.popleft()
                if self._streams.get(stream.request.id) is stream:
                    why = "" if reason is FinishReason.STOP else "the request was cancelled"
                    self._end(outbox, stream.request.id, reason, why)
            outcome = self._steps.run(lambda plan, began: self._start_step(outbox, plan, began))
            if outcome is None:
                return False
            try:
                self._finish_step(outbox, outcome)
            except Exception:  # noqa: BLE001 - a bug of ours in here ends this step's requests only
                self._log.exception("a step of %d tokens failed", outcome.plan.num_tokens)
                for chunk in outcome.plan.chunks:
                    self._fail(outbox, chunk.request.id)
        finally:
            self._send(outbox)
        self.after_step()
        return bool(outcome.plan.chunks or outcome.plan.expired) or self._pace.due

    def _return_detached(self) -> None:
        while self._detached:
            stream, reached = self._detached.popleft()
            with self._lock:
                found = self._streams.pop(stream.request.id, None)
            if found is not None:
                assert isinstance(stream.sink, RankSink), "looked at before"
                try:
                    stream.sink.give_back(stream.request.id, reached)
                except Exception:  # noqa: BLE001 - a sink that breaks has lost its client
                    self._log.exception("a sink failed that was given %s back", stream.request.id)

    def _start_step(self, outbox: Outbox, plan: StepPlan, began: float) -> None:
        """Before the executor has its turn."""
        for request_id in plan.expired:
            self._close(outbox, request_id, FinishReason.DEADLINE, "the deadline passed")
        if not outbox.empty:
            self._send(outbox)  # not after the step: it may be long
        for chunk in plan.chunks:
            stream = self._streams.get(chunk.request.id)
            if stream is not None and stream.scheduled is None:
                stream.start(began, chunk.start)

    def _finish_step(self, outbox: Outbox, outcome: StepOutcome) -> None:
        """Events for everyone whose request was in the step."""
        plan = outcome.plan
        if outcome.error is not None:
            self._log.error("a step of %d tokens failed", plan.num_tokens, exc_info=outcome.error)
        for request_id, problem in outcome.failed:
            if request_id in outcome.told:
                self._end(outbox, request_id, FinishReason.INVALID, problem)
                continue
            if outcome.error is None:
                self._log.error("%s", problem)
            self._fail(outbox, request_id)
        if outcome.error is None and plan.chunks:
            self._take_tokens(outbox, outcome, self._clock())

    def _take_tokens(self, outbox: Outbox, outcome: StepOutcome, now: float) -> None:
        """What the step made, to observer and sinks."""
        new = tuple.__new__
        first: list[RequestState] = []
        last: list[tuple[RequestState, Event]] = []
        before: dict[float, int] = {}  # when the token before it came, and how often
        for scored in outcome.scored:
            if (stream := self._streams.get(scored.request_id)) is not None:
                event = Event(scored.request_id, prompt_logprobs=scored.logprobs)
                outbox.add(stream.sink, event)
        for out in outcome.outs:
            stream = self._streams.get(out.request_id)
            if stream is None:
                continue
            stream.made += 1
            queue_s = 0.0
            if stream.first_token is None:
                stream.first_token, queue_s = now, stream.queue_s
                first.append(stream)
            else:
                before[stream.last_token] = before.get(stream.last_token, 0) + 1
            stream.last_token = now
            ids, logprobs = (out.token_id,), () if out.logprobs is None else (out.logprobs,)
            event = new(
                Event,
                (out.request_id, ids, logprobs, out.finish, "", stream.cached, queue_s, ()),
            )
            if out.finish is None:
                outbox.add(stream.sink, event)
            else:
                last.append((stream, event))
        self._observer.on_step(outcome.plan, now - outcome.began)
        if before:
            self._observer.on_gaps({now - then: count for then, count in before.items()})
        for stream in first:
            self._observer.on_first_token(stream.timing(now))
        for stream, event in last:
            assert event.finish is not None
            if self._forget(event.request_id, event.finish) is not None:
                outbox.add(stream.sink, event)

    def _fail(self, outbox: Outbox, request_id: RequestId) -> None:
        self._end(
            outbox,
            request_id,
            FinishReason.ERROR,
            "internal error: the server's log has the cause",
        )

    def _end(self, outbox: Outbox, request_id: RequestId, reason: FinishReason, error: str) -> None:
        """End a request in scheduler and stream."""
        with self._lock:
            self._scheduler.abort(request_id, reason)
        self._close(outbox, request_id, reason, error)

    def _close(
        self, outbox: Outbox, request_id: RequestId, reason: FinishReason, error: str
    ) -> None:
        """The last event of a stream whose request the scheduler no longer has."""
        stream = self._forget(request_id, reason)
        if stream is not None:
            outbox.add(stream.sink, stream.end(reason, error))

    def _forget(self, request_id: RequestId, reason: FinishReason) -> RequestState | None:
        """Whoever takes the stream out sends its last event: there is exactly one."""
        with self._lock:
            stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._observer.on_finish(reason, stream.timing(self._clock()))
        return stream

    def _send(self, outbox: Outbox) -> None:
        for error, events in outbox.send():
            self._log.error("a sink of %d events failed", len(events), exc_info=error)
            for event in events:
                self.abort(event.request_id)

    def _end_all(self) -> None:
        self._return_detached()
        outbox = Outbox()
        with self._lock:
            request_ids = list(self._streams)
        for request_id in request_ids:
            self._end(outbox, request_id, FinishReason.UNAVAILABLE, self._stop_reason)
        self._send(outbox)
