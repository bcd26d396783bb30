"""Grammars at the doors: whether one can be used is found out before its request is queued.

Compiling takes a moment, beside the event loop and in another process (``grammar.checking``), one
after the other; so many may wait for it.
"""

from __future__ import annotations

import asyncio

from moeserve.core import Grammar
from moeserve.errors import ExhaustedError
from moeserve.grammar.checking import GrammarChecker

MOST_WAITING = 64
WAIT_S = 10.0


class GrammarGate:
    """Lets grammars pass that ``checker``, which is its owner's, can compile."""

    def __init__(self, checker: GrammarChecker | None = None) -> None:
        self._checker = checker or GrammarChecker()
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def admit(self, grammar: Grammar) -> None:
        """InvalidRequestError says what is wrong with it; ExhaustedError where too many wait."""
        if self._checker.known(grammar):
            return
        if self._waiting >= MOST_WAITING:
            raise ExhaustedError(f"{self._waiting} grammars wait to be compiled: try again later")
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S), self._turn:
                await asyncio.to_thread(self._checker.check, grammar)
        except TimeoutError as error:
            raise ExhaustedError("grammars wait to be compiled: try again later") from error
        finally:
            self._waiting -= 1
