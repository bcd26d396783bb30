"""The step loop: one thread that owns scheduler and executor and feeds every stream.

``submit`` refuses or queues; from then on the request's sink receives ``Event``s, on the engine's
thread, until one with ``finish``, which always comes: with an error if a step fails, if the
request is aborted or late, or if the engine stops. A sink must not block. A failing step ends the
requests that were in it, and the engine goes on; where the executor says that it is unavailable,
all requests end so, and the engine with them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
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
    TokenOut,
)
from moeserve.engine.drive import Schedules, StepOutcome, run_step
from moeserve.engine.executor import Executor
from moeserve.engine.request_state import RequestState, Sink
from moeserve.engine.scheduler import refuse_duplicate
from moeserve.engine.text import Decodes, TextStream
from moeserve.errors import TokenizerError, UnavailableError

IDLE_S = 1.0
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

    def on_first_token(self, timing: Timing) -> None: ...

    def on_token(self, seconds: float) -> None:
        """A further token, so long after the one before it."""
        ...

    def on_finish(self, reason: FinishReason, timing: Timing) -> None: ...


class Unobserved:
    """An observer for an engine that nobody watches."""

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...

    def on_first_token(self, timing: Timing) -> None: ...

    def on_token(self, seconds: float) -> None: ...

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
    """``start`` or ``with`` it; ``tokenizer`` None serves token ids without text.

    ``idle`` is called about once a second while there is nothing to run; as from a step, an
    UnavailableError ends the engine.
    """

    def __init__(
        self,
        scheduler: Schedules,
        executor: Executor,
        tokenizer: Decodes | None = None,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._tokenizer = tokenizer
        self._observer = observer or Unobserved()
        self._clock = clock
        self._on_idle = idle
        self._stop_reason = "the server stopped: retry elsewhere"
        self._log = logging.getLogger("moeserve.engine")
        self._lock = EngineLock()  # of scheduler, streams and accepting
        self._streams: dict[RequestId, RequestState] = {}
        self._accepting = True
        self._cancelled: deque[RequestState] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
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

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request from any thread, or raise why it cannot be served."""
        if self._tokenizer is None and request.params.stop:
            raise TokenizerError(
                "this model has no tokenizer, which stop strings need: use stop_token_ids "
                "instead of stop",
                param="stop",
            )
        text = None if self._tokenizer is None else TextStream(self._tokenizer, request)
        stream = RequestState(request, sink, text, submitted=self._clock())
        with self._lock:
            if not self._accepting:
                raise UnavailableError("the server is draining or stopped: retry elsewhere")
            # The scheduler lets go of a request before its stream has had its last event.
            refuse_duplicate(request, request.id in self._streams)
            self._scheduler.add(request)
            self._streams[request.id] = stream
            self._idle.clear()
        self._wake.set()

    def abort(self, request_id: RequestId) -> None:
        """End a request before the next step, from any thread; ended ones are left alone."""
        stream = self._streams.get(request_id)  # without the lock: one look at a dict is atomic
        if stream is not None:
            self._cancelled.append(stream)
            self._wake.set()

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

    def drain(self, timeout: float) -> bool:
        """Accept nothing new and wait for what runs; False if that took longer."""
        with self._lock:
            self._accepting = False
        return self._idle.wait(timeout)

    def stop(self, timeout: float = 30.0) -> bool:
        """End every stream and the thread; False if a step still ran after ``timeout``."""
        with self._lock:
            self._accepting = False
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._end_all()
        if self._thread.is_alive():
            self._log.error("the engine's step did not end within %.0f s", timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self._step():
                    self._on_idle()
                    self._wake.wait(IDLE_S)
                    self._wake.clear()
        except UnavailableError as error:
            self._stop_reason = error.message
            self._log.critical("the engine stopped: %s", error.message)
        except Exception:  # noqa: BLE001 - the thread's last stop: log it, then end every stream
            self._log.critical("the engine stopped", exc_info=True)
        finally:
            with self._lock:
                self._accepting = False
            self._end_all()

    def _step(self) -> bool:
        """One turn; False if there was nothing to do."""
        while self._cancelled:
            stream = self._cancelled.popleft()
            if self._streams.get(stream.request.id) is stream:
                self._end(stream.request.id, FinishReason.ABORT, "the request was cancelled")
        outcome = run_step(
            self._scheduler, self._executor, self._clock, lock=self._lock, on_plan=self._start_step
        )
        if outcome is None:
            return False
        try:
            self._finish_step(outcome)
        except Exception:  # noqa: BLE001 - a bug of ours in here ends this step's requests only
            self._log.exception("a step of %d tokens failed", outcome.plan.num_tokens)
            for chunk in outcome.plan.chunks:
                self._fail(chunk.request.id)
        return True

    def _start_step(self, plan: StepPlan, began: float) -> None:
        """Before the executor has its turn."""
        for request_id in plan.expired:
            self._close(request_id, FinishReason.DEADLINE, "the deadline passed")
        for chunk in plan.chunks:
            stream = self._streams.get(chunk.request.id)
            if stream is not None and stream.scheduled is None:
                stream.scheduled, stream.cached = began, chunk.start

    def _finish_step(self, outcome: StepOutcome) -> None:
        """Events for everyone whose request was in the step."""
        plan = outcome.plan
        if outcome.error is not None:
            self._log.error("a step of %d tokens failed", plan.num_tokens, exc_info=outcome.error)
        for request_id, problem in outcome.failed:
            if outcome.error is None:
                self._log.error("%s", problem)
            self._fail(request_id)
        if outcome.error is not None or not plan.chunks:
            return
        now = self._clock()
        self._observer.on_step(plan, now - outcome.began)
        for out in outcome.outs:
            stream = self._streams.get(out.request_id)
            if stream is not None:
                self._deliver(stream, out, now)

    def _deliver(self, stream: RequestState, out: TokenOut, now: float) -> None:
        stream.made += 1
        if stream.first_token is None:
            stream.first_token = now
            self._observer.on_first_token(stream.timing(now))
        else:
            self._observer.on_token(now - stream.last_token)
        stream.last_token = now
        text, finish = "", out.finish
        if stream.text is not None:
            try:
                piece = stream.text.push(out.token_id, out.finish)
            except Exception:  # noqa: BLE001 - a tokenizer that cannot decode ends one request
                self._log.exception("request %s: token %d", out.request_id, out.token_id)
                self._fail(out.request_id)
                return
            text = piece.text
            if piece.stopped:
                finish = FinishReason.STOP
        logprobs = () if out.logprobs is None else (out.logprobs,)
        event = stream.event(text, (out.token_id,), logprobs, finish)
        if finish is not None:
            with self._lock:
                self._scheduler.abort(out.request_id, finish)  # still runs if a stop string hit
            self._forget(out.request_id, finish)
        self._emit(stream, event)

    def _fail(self, request_id: RequestId) -> None:
        self._end(request_id, FinishReason.ERROR, "internal error: the server's log has the cause")

    def _end(self, request_id: RequestId, reason: FinishReason, error: str) -> None:
        """End a request in scheduler and stream."""
        with self._lock:
            self._scheduler.abort(request_id, reason)
        self._close(request_id, reason, error)

    def _close(self, request_id: RequestId, reason: FinishReason, error: str) -> None:
        """Send the last event of a stream whose request the scheduler no longer has."""
        stream = self._forget(request_id, reason)
        if stream is not None:
            text = "" if stream.text is None else stream.text.flush()
            self._emit(stream, stream.event(text, finish=reason, error=error))

    def _forget(self, request_id: RequestId, reason: FinishReason) -> RequestState | None:
        """Whoever takes the stream out sends its last event: there is exactly one."""
        with self._lock:
            stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._observer.on_finish(reason, stream.timing(self._clock()))
        return stream

    def _emit(self, stream: RequestState, event: Event) -> None:
        try:
            stream.sink(event)
        except Exception:  # noqa: BLE001 - a sink that breaks has lost its client
            self._log.exception("request %s: its sink failed", event.request_id)
            self._cancelled.append(stream)
        if event.finish is not None:
            with self._lock:
                if not self._streams:
                    self._idle.set()

    def _end_all(self) -> None:
        with self._lock:
            request_ids = list(self._streams)
        for request_id in request_ids:
            self._end(request_id, FinishReason.UNAVAILABLE, self._stop_reason)
