"""Where a source's KV comes from: a request that it prefills for another member, or one that runs.

A supply owns what it takes from the house, and lets go of it in ``close``, whatever has come of
it until then and still comes. Blocking calls of the house are made where the caller makes them.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from moeserve.core import Event, FinishReason, Request, RequestId
from moeserve.engine.sequence import HeldKv, History, StepKv
from moeserve.errors import DataLossError, NotFoundError, UnavailableError
from moeserve.pools.kv.house import KvHouse

ENDED_WELL = (FinishReason.STOP, FinishReason.LENGTH)


class KvSupply(Protocol):
    """One sequence of this rank. ``begin``, ``look``, ``rest`` and ``close`` are for one thread,
    which may not be the event loop's."""

    def begin(self) -> None:
        """Raises why there is nothing to have here."""
        ...

    def look(self) -> HeldKv | None:
        """References to what is computed so far, which the caller gives back."""
        ...

    def look_within(self) -> StepKv | None:
        """The same, of what a step that runs now computes."""
        ...

    def take_news(self) -> list[Event]:
        """What the engine has made for whoever fetches."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing more is computed here: ``rest`` has it all."""
        ...

    def rest(self) -> tuple[HeldKv, tuple[int, ...] | None]:
        """All that is computed, which the supply keeps until it is closed; and the tokens that the
        request has made, where whoever fetches does not know them."""
        ...

    def close(self) -> None: ...


class PrefillSupply:
    """Computes the KV of all tokens of a request, and the one token that follows.

    The request goes under another name, for one of the same name may be here already. ``tell`` is
    called on the engine's thread when there is news.
    """

    def __init__(
        self, house: KvHouse, request: Request, history: History, tell: Callable[[], None]
    ) -> None:
        made = len(history.output_ids)
        params = replace(request.params, max_tokens=made + 1)
        if made:  # the log-probabilities of the prompt came before its first token
            params = replace(params, prompt_logprobs=None)
        name = RequestId(f"{request.id}/kv/{secrets.token_hex(6)}")
        self._house = house
        self._request = replace(request, id=name, params=params)
        self._history = replace(history, sources=(), kv=None, keep=True)
        self._tell = tell
        self._lock = threading.Lock()  # of all below
        self._news: deque[Event] = deque()
        self._last: Event | None = None
        self._returned = False
        self._closed = False
        self._kept: HeldKv | None = None

    def begin(self) -> None:
        self._house.submit(self._request, self, self._history)

    def deliver(self, events: Sequence[Event], /) -> None:
        """As an ``EventSink``: on the engine's thread."""
        with self._lock:
            self._news.extend(events)
            if events[-1].finish is not None:
                self._last = events[-1]
            gone = self._closed and self._last is not None
        if gone:
            self._release()
        self._tell()

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        """As a ``RankSink``: the rank does not want it after all."""
        self._returned = True
        self._tell()

    def take_news(self) -> list[Event]:
        found = []
        while self._news:
            found.append(self._news.popleft())
        return found

    def look(self) -> HeldKv | None:
        return None if self._last is not None else self._house.look(self._request.id)

    def look_within(self) -> StepKv | None:
        return None if self._last is not None else self._house.look_within(self._request.id)

    @property
    def over(self) -> bool:
        """Raises where the engine ended it otherwise."""
        if self._returned:
            raise UnavailableError("the rank gave the request back: retry elsewhere")
        last = self._last
        if last is not None and last.finish not in ENDED_WELL:
            raise UnavailableError(f"the prompt was not computed ({last.finish}): {last.error}")
        return last is not None

    def rest(self) -> tuple[HeldKv, None]:
        if self._kept is None:
            self._kept = self._house.take_kept(self._request.id)
        if self._kept is None:
            raise UnavailableError("the KV of the prompt is gone: retry elsewhere")
        return self._kept, None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running = self._last is None and not self._returned
        if running:
            self._house.abort(self._request.id)
        else:
            self._release()

    def _release(self) -> None:
        """It has ended, so nothing is kept after this."""
        kept, self._kept = self._kept or self._house.take_kept(self._request.id), None
        if kept is not None:
            self._house.give_back(kept)


class RunningSupply:
    """A request that runs here, and goes on until it is to ``stop`` and its ``rest`` is taken out.
    Whoever fetches knows of the tokens ``known``. ``tell`` is called on the engine's thread when
    the rest is ``out`` that was to leave between two steps."""

    def __init__(
        self,
        house: KvHouse,
        request_id: RequestId,
        known: tuple[int, ...],
        tell: Callable[[], None],
    ) -> None:
        self._house = house
        self._id = request_id
        self.known = known
        self._tell = tell
        self._stopped = False
        self._lock = threading.Lock()  # of all below
        self._unlisten: Callable[[], None] | None = None
        self._closed = self._out = False
        self._detached: HeldKv | None = None
        self._outputs: tuple[int, ...] = ()

    def begin(self) -> None:
        held = self.look()
        if held is None:
            raise NotFoundError(f"request {self._id!r} does not run here")
        self._house.give_back(held)

    def stop(self) -> None:
        self._stopped = True

    def take_news(self) -> list[Event]:
        return []

    def look(self) -> HeldKv | None:
        return self._house.look(self._id)

    def look_within(self) -> None:
        """It decodes: its steps are over soon."""

    @property
    def over(self) -> bool:
        return self._stopped

    def made(self) -> tuple[int, ...]:
        """The tokens that it has made beside those that are known."""
        outputs = self._house.made(self._id)
        if outputs is None:
            raise NotFoundError(f"request {self._id!r} does not run here any more")
        return self._new(outputs)

    @property
    def out(self) -> bool:
        """Whether ``rest`` has nothing to wait for."""
        return self._out

    def leave(self) -> None:
        """It is taken out when the step that runs is over, of which nothing is lost then."""
        self._unlisten = self._house.between_steps(self._leave_now)

    def _leave_now(self) -> None:
        """Once; on the engine's thread."""
        with self._lock:
            if self._closed or self._out:
                return
            self._take_out()
        self._tell()

    def _take_out(self) -> None:
        found = self._house.detach(self._id)
        if found is not None:
            self._detached, self._outputs = found
        self._out = True

    def rest(self) -> tuple[HeldKv, tuple[int, ...]]:
        with self._lock:
            if not self._out:
                self._take_out()
            held, outputs = self._detached, self._outputs
        if held is None:
            raise NotFoundError(f"request {self._id!r} does not run here any more")
        self._new(outputs)
        return held, outputs

    def _new(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        if outputs[: len(self.known)] != self.known:
            raise DataLossError(f"request {self._id!r} has made other tokens here than was said")
        return outputs[len(self.known) :]

    def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
        with self._lock:
            self._closed = True
            held, self._detached = self._detached, None
        if held is not None:
            self._house.give_back(held)
