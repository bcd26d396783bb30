"""The process that holds the grammars of one rank, or checks those of one door.

Speaks lines of JSON (``process.answer``) and writes masks into memory that it shares with its
parent (``layout``), a file whose descriptor is its argument. Before each turn it writes down whose
it is, so that the parent knows whose fault it was if this process ends.

A turn that takes more processor time than it may ends this process (SIGPROF), as does memory
beyond the limit, or a stack that overflows: that is how a grammar is refused which llguidance's own
limits let pass. Imports neither torch nor numpy.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from moeserve.core import Grammar, GrammarKind
from moeserve.grammar.compiling import matcher_of, reason_of
from moeserve.grammar.layout import FIRST_ROW, FIRST_TOKEN, NOBODY
from moeserve.models.tokenizer_parts import tokenizer_source
from moeserve.process.answer import Channel

# Processor time of a turn, seconds: to compile for a door, and for a rank, where what a door let
# pass is not to fail; for a mask, and for each token before it.
CHECK_S = 0.35
COMPILE_S = 0.7
MASK_S = 0.25
TOKEN_S = 0.002
# Address space beyond what the process has when it is ready.
MEMORY_BYTES = 1 << 30


@dataclass(slots=True)
class _Held:
    """A matcher, and how many of the request's tokens it has seen."""

    matcher: LLMatcher
    seen: int = 0


class Matchers:
    """Owns a tokenizer, and a matcher for every key."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, FIRST_ROW)
        self._held: dict[int, _Held] = {}
        self._rows: list[tuple[int, _Held]] = []  # of the last question; none where one failed
        self._row_bytes = 0

    def open(self, tokenizer: str, vocab: int, eos: list[int]) -> dict[str, Any]:
        """``tokenizer`` is a ``tokenizer.json`` or a GGUF file."""
        text = tokenizer_source(Path(tokenizer))
        own = LLTokenizer(text, eos_token=eos)
        larger = vocab > own.vocab_size  # a model's vocabulary may be padded
        self._tokenizer = LLTokenizer(text, n_vocab=vocab, eos_token=eos) if larger else own
        anything = matcher_of(Grammar(GrammarKind.REGEX, "."), self._tokenizer)
        self._row_bytes = len(anything.compute_bitmask())
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        return {"row_bytes": self._row_bytes}

    def check(self, grammar: Sequence[Any]) -> dict[str, Any]:
        """Whether it can be compiled, and begun: ``error`` is empty, or says why not."""
        self._turn(0, CHECK_S)
        try:
            matcher = matcher_of(read_grammar(grammar), self._tokenizer)
            matcher.compute_bitmask()
            error = reason_of(matcher) if matcher.is_error() else ""
        except ValueError as refused:
            error = str(refused)
        self._turn(NOBODY, 0)
        return {"error": error}

    def masks(
        self,
        rows: Sequence[tuple[int, int, int, list[int]]],
        begin: Sequence[tuple[int, Sequence[Any]]],
        end: Sequence[int],
    ) -> dict[str, Any]:
        """For each of ``rows`` (row, key, tokens seen before, tokens since) the mask of what may
        come next; rows are numbered as they come. ``begin`` has keys with their grammars; of
        ``end`` nothing more is asked. Tokens seen before are as many as at the end of the last
        turn, or none: then all come again."""
        for key in end:
            self._held.pop(key, None)
        failed: dict[int, str] = {}
        for key, grammar in begin:
            self._turn(key, COMPILE_S)
            try:
                self._held[key] = _Held(matcher_of(read_grammar(grammar), self._tokenizer))
            except ValueError as error:
                failed[key] = str(error)
        if rows:
            self._make_room(1 + max(row for row, *_ in rows))
        for row, key, seen, tokens in rows:
            if key not in failed:
                self._turn(key, MASK_S + TOKEN_S * len(tokens))
                if problem := self._fill(row, self._held[key], seen, tokens):
                    failed[key] = problem
        self._turn(NOBODY, 0)
        self._rows = [] if failed else [(key, self._held[key]) for _, key, *_ in rows]
        return {"failed": list(failed.items())} if failed else {}

    def next(self) -> dict[str, Any]:
        """The same rows once more: of each one more token has come, which lies in the memory that
        is shared. Only after a question of which nothing failed."""
        tokens = struct.unpack_from(f"{len(self._rows)}i", self._memory, FIRST_TOKEN)
        failed: dict[int, str] = {}
        for row, ((key, held), token) in enumerate(zip(self._rows, tokens, strict=True)):
            self._turn(key, MASK_S + TOKEN_S)
            if problem := self._fill(row, held, held.seen, (token,)):
                failed[key] = problem
        self._turn(NOBODY, 0)
        if failed:
            self._rows = []
        return {"failed": list(failed.items())} if failed else {}

    def _fill(self, row: int, held: _Held, seen: int, tokens: Sequence[int]) -> str:
        """Write the mask of one row; what is wrong, if anything."""
        matcher = held.matcher
        if seen != held.seen:
            assert seen == 0, f"{seen} tokens are said to be seen, and {held.seen} are"
            matcher.reset()
        held.seen = seen + len(tokens)
        for token in tokens:
            # Behind the end nothing is of interest: a step may have been under way already.
            if matcher.is_stopped() or not matcher.consume_token(token):
                break
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return reason_of(matcher)
        first = FIRST_ROW + row * self._row_bytes
        self._memory[first : first + self._row_bytes] = mask
        return ""

    def _turn(self, key: int, seconds: float) -> None:
        """From now on it is the turn of ``key``, for so much processor time; 0 is no limit."""
        struct.pack_into("q", self._memory, 0, key)
        signal.setitimer(signal.ITIMER_PROF, seconds)

    def _make_room(self, rows: int) -> None:
        """The parent follows when it looks at a row."""
        if len(self._memory) < (needed := FIRST_ROW + rows * self._row_bytes):
            os.ftruncate(self._descriptor, 2 * needed)
            self._memory = mmap.mmap(self._descriptor, 2 * needed)


def read_grammar(sent: Sequence[Any]) -> Grammar:
    """As ``worker.written`` writes it."""
    kind, text, whitespace = sent
    return Grammar(GrammarKind(kind), text, whitespace)


def main() -> None:
    channel = Channel()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    matchers = Matchers(int(sys.argv[1]))
    channel.serve(
        {
            "open": matchers.open,
            "check": matchers.check,
            "masks": matchers.masks,
            "next": matchers.next,
        }
    )


if __name__ == "__main__":
    main()
