"""Whether a grammar can be compiled, before anything waits for it.

The same child process, with the same limits, compiles it for a door as will for a rank. What was
found is kept for grammars that come again: most clients have few.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from moeserve.core import Grammar
from moeserve.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidRequestError,
    TokenizerError,
    UnavailableError,
)
from moeserve.grammar.worker import GrammarWorker, Vocabulary, written

# The child's limits are of processor time; this is what a host may take that does much besides.
CHECK_S = 5.0
# Until other grammars have been checked.
WAIT_S = 10.0
MOST_KEPT = 1024


class GrammarChecker:
    """Owns the worker of a door, made when the first grammar comes. For any thread: one grammar
    is checked at a time. Without a ``vocabulary`` there are no grammars."""

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.workers = 0
        self._vocabulary = vocabulary
        self._worker: GrammarWorker | None = None
        self._found: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, grammar: Grammar) -> bool:
        """Whether ``check`` answers at once, and that it can be compiled."""
        return self._found.get(_digest(grammar)) == ""

    def check(self, grammar: Grammar) -> None:
        """InvalidRequestError says why it cannot be compiled; ExhaustedError where others take
        too long; TokenizerError where the model has nothing that grammars could be about."""
        if self._vocabulary is None:
            raise TokenizerError(
                "the model has no tokenizer, or no token that ends an answer: grammars need both",
                param="grammar",
            )
        if not self._lock.acquire(timeout=WAIT_S):
            raise ExhaustedError("other grammars are being compiled: try again later")
        try:
            digest = _digest(grammar)
            if digest not in self._found:
                self._found[digest] = self._ask(self._vocabulary, grammar)
            self._found.move_to_end(digest)
            while len(self._found) > MOST_KEPT:
                self._found.popitem(last=False)
            error = self._found[digest]
        finally:
            self._lock.release()
        if error:
            raise InvalidRequestError(f"the grammar cannot be used: {error}", param="grammar")

    def close(self) -> None:
        """Ends the worker; may be called again."""
        with self._lock:
            self._drop()

    def _ask(self, vocabulary: Vocabulary, grammar: Grammar) -> str:
        """What is wrong with it; empty if nothing is."""
        try:
            if self._worker is None:
                self._worker = GrammarWorker(vocabulary)
                self.workers += 1
            self._worker.ask({"do": "check", "grammar": written(grammar)})
            error: str = self._worker.answer(CHECK_S)["error"]
        except (DeadlineError, UnavailableError):
            started = self._worker is not None and self._worker.ready
            self._drop()
            if not started:
                raise
            return "it takes more time or memory than a grammar may; simplify it"
        except BaseException:
            self._drop()
            raise
        return error

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(repr(grammar).encode("utf-8", "surrogatepass")).digest()
