"""The masks of a step, made in a worker while the step's model runs.

``begin`` says which requests will want one, and returns; ``take`` waits for them. What a worker
knows of a request is how many of its tokens it has seen; where it is behind it gets the rest, and
where what it has seen is no longer the request's (a token was taken back, the id has another
request, the worker is new) it gets all again. Where the same requests come with one token more
each, as mostly, these alone go to it, through memory. So a request may come late, leave, return, or
have had tokens elsewhere: its masks are the same.

A request whose grammar ends the worker, or whose turn takes too long, fails alone: the worker is
made anew and the others are asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Request, RequestId
from moeserve.errors import DeadlineError, MoeserveError, TokenizerError, UnavailableError
from moeserve.grammar.layout import MOST_TOKENS, NOBODY
from moeserve.grammar.worker import GrammarWorker, Vocabulary, written

# For all masks of a step. The child's limits are of processor time, and much shorter.
ANSWER_S = 10.0
# So many workers in one step may be lost; then the rest of its requests with grammars fail too.
MOST_LOST = 4


class MaskWanted(NamedTuple):
    """A request with a grammar whose next token is chosen in this step, and its tokens so far."""

    request: Request
    output_ids: Sequence[int]


@dataclass(slots=True)
class _Known:
    """What the worker has of a request, under its key."""

    request: Request
    key: int
    seen: int = 0


@dataclass(slots=True)
class MaskCounts:
    """Since the start. ``lost`` workers were ended by a grammar; ``replayed`` tokens were shown to
    another worker. For ``short`` questions a token of each row was enough."""

    masks: int = 0
    workers: int = 0
    lost: int = 0
    failed: int = 0
    replayed: int = 0
    short: int = 0


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Which tokens may come (bit i of byte b is token 8 b + i), or why a request cannot go on: for
    its own grammar's sake, but for those of ``unserved``."""

    allowed: Mapping[RequestId, NDArray[np.uint8]] = field(default_factory=dict)
    failed: Mapping[RequestId, str] = field(default_factory=dict)
    unserved: Set[RequestId] = frozenset()


NONE = StepMasks()


class GrammarMasks:
    """Owns the worker of a model runner, made when the first grammar comes. Without a
    ``vocabulary`` no grammar can be followed."""

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.counts = MaskCounts()
        self._vocabulary = vocabulary
        self._worker: GrammarWorker | None = None
        self._known: dict[RequestId, _Known] = {}
        self._asked: list[MaskWanted] = []
        self._ended: list[int] = []
        self._rows: list[_Known] = []  # of the last answer, none where one of them failed
        self._next_key = 0
        self._problem = ""  # with what was asked last, where it could not be asked
        self._log = logging.getLogger("moeserve.grammar")

    def begin(self, wanted: Iterable[MaskWanted]) -> None:
        """Of what was asked before nothing is wanted any more."""
        if self._asked:
            self.take()  # a step that broke off: its answer is still to come
        self._asked = list(wanted)
        if self._asked:
            self._ask()

    def take(self) -> StepMasks:
        """What ``begin`` asked for; the masks hold until the next ``begin``."""
        if not self._asked:
            return NONE
        failed: dict[RequestId, str] = {}
        allowed: dict[RequestId, NDArray[np.uint8]] = {}
        unserved: set[RequestId] = set()
        lost = 0
        while self._asked:
            try:
                refused = self._answer()
            except (DeadlineError, UnavailableError) as error:
                lost += 1
                found = self._lose_worker(error, lost)
                failed |= found.failed
                unserved |= found.unserved
                if self._asked:
                    self._ask()
            else:
                assert self._worker is not None
                masks = self._worker.masks(len(self._asked))
                for (request, _), mask in zip(self._asked, masks, strict=True):
                    if refused and (reason := refused.get(self._known[request.id].key)):
                        failed[request.id] = f"the grammar cannot be followed: {reason}"
                    else:
                        allowed[request.id] = mask
                self._rows = [] if refused else [self._known[r.id] for r, _ in self._asked]
                self._asked = []
        self.counts.masks += len(allowed)
        self.counts.failed += len(failed)
        return StepMasks(allowed, failed, unserved)

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """Those that are not known are left out."""
        if self._known:
            for request_id in request_ids:
                if (known := self._known.pop(request_id, None)) is not None:
                    self._ended.append(known.key)

    def close(self) -> None:
        """Ends the worker; may be called again."""
        if self._worker is not None:
            self._worker.close()
        self._worker, self._known, self._ended, self._rows = None, {}, [], []

    def _ask(self) -> None:
        """Send what the worker needs for the rows that are asked."""
        self._problem = ""
        try:
            if self._worker is None:
                self._worker = self._new_worker()
            if (tokens := self._one_more_each()) is not None:
                self.counts.short += 1
                self._worker.ask_next(tokens)
            else:
                self._worker.ask(self._message())
        except MoeserveError as error:
            self._problem = error.message

    def _new_worker(self) -> GrammarWorker:
        if self._vocabulary is None:
            raise TokenizerError("the model has no tokenizer, or no token that ends an answer")
        self.counts.workers += 1
        return GrammarWorker(self._vocabulary)

    def _one_more_each(self) -> list[int] | None:
        """The new token of each row, where the rows are those of the last answer."""
        rows, asked = self._rows, self._asked
        if len(rows) != len(asked) or self._ended or len(asked) > MOST_TOKENS:
            return None
        tokens = []
        for known, (request, output_ids) in zip(rows, asked, strict=True):
            if known.request is not request or len(output_ids) != known.seen + 1:
                return None
            tokens.append(output_ids[-1])
        for known in rows:
            known.seen += 1
        return tokens

    def _message(self) -> dict[str, Any]:
        rows, begin, ended = [], [], self._ended
        self._ended = []
        for row, (request, output_ids) in enumerate(self._asked):
            known = self._known.get(request.id)
            if known is None or known.request is not request:
                if known is not None:
                    ended.append(known.key)
                self._next_key += 1
                known = self._known[request.id] = _Known(request, self._next_key)
                assert request.params.grammar is not None, request.id
                begin.append((known.key, written(request.params.grammar)))
            if known.seen > len(output_ids):
                known.seen = 0  # a token was taken back
            rows.append((row, known.key, known.seen, list(output_ids[known.seen :])))
            known.seen = len(output_ids)
        return {"do": "masks", "rows": rows, "begin": begin, "end": ended}

    def _answer(self) -> dict[int, str]:
        """The keys that have no mask, and why."""
        if self._problem or self._worker is None:
            raise UnavailableError(self._problem)
        return dict(self._worker.answer(ANSWER_S).get("failed", ()))

    def _lose_worker(self, error: MoeserveError, lost: int) -> StepMasks:
        """The worker is of no use any more: those whose fault it was fail, and are not asked again.
        Once in a step it may have been nobody's fault."""
        turn = NOBODY if self._worker is None else self._worker.turn
        self._log.warning("a grammar worker is lost: %s", error.message)
        known = self._known
        guilty = [
            w.request.id
            for w in self._asked
            if w.request.id in known and known[w.request.id].key == turn
        ]
        innocent = turn == NOBODY and self._worker is not None and lost == 1
        self.close()
        self.counts.lost += 1
        reason = "the grammar takes more time or memory than a grammar may: simplify it"
        failed = dict.fromkeys(guilty, reason)
        unserved: frozenset[RequestId] = frozenset()
        if lost >= MOST_LOST or not (guilty or innocent):
            reason = f"no grammar can be followed now: {error.message}"
            unserved = frozenset(w.request.id for w in self._asked).difference(guilty)
            failed |= dict.fromkeys(unserved, reason)
        self._asked = [w for w in self._asked if w.request.id not in failed]
        self.counts.replayed += sum(len(w.output_ids) for w in self._asked)
        return StepMasks({}, failed, unserved)
