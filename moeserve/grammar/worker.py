"""The parent's side of a ``child``: starts it, asks it, ends it, and knows whose turn it was.

What is asked is answered in order, one answer for each question; between the two the parent may do
something else. A worker that was late or has ended is of no use any more: make another.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Grammar
from moeserve.grammar.layout import FIRST_ROW, FIRST_TOKEN, NOBODY
from moeserve.process.ask import AnsweringProcess, receive_all
from moeserve.process.child import start

# Until a question has been taken in, and until a new process is ready.
SEND_S = 5.0
START_S = 15.0
_NEXT: Mapping[str, Any] = {"do": "next"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What grammars are about: a ``tokenizer.json`` or a GGUF file, how many logits the model has,
    and which tokens end an answer, of which there is at least one."""

    tokenizer: Path
    size: int
    eos_ids: tuple[int, ...]


class GrammarWorker:
    """Owns a child, and the memory that it writes masks to, whose size is the child's business.
    Not for several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Starts it, and does not wait until it is ready. UnavailableError where no process can be
        started."""
        self.ready = False
        self._row_bytes = 0
        self._descriptor = os.memfd_create("moeserve-grammar")
        os.ftruncate(self._descriptor, mmap.PAGESIZE)
        self._memory = mmap.mmap(self._descriptor, mmap.PAGESIZE)
        struct.pack_into("q", self._memory, 0, NOBODY)
        self._log = os.memfd_create("moeserve-grammar-log")
        self._open: tuple[int, ...] = (self._descriptor, self._log)
        self._process: AnsweringProcess | None = None
        try:
            self._process = _start(self._descriptor, self._log)
            words = {"tokenizer": str(vocabulary.tokenizer), "vocab": vocabulary.size}
            self.ask({"do": "open", "eos": list(vocabulary.eos_ids), **words})
        except BaseException:
            self.close()
            raise

    @property
    def turn(self) -> int:
        """Whose turn it is, or was when the child ended; ``NOBODY`` where it was nobody's."""
        key: int = struct.unpack_from("q", self._memory)[0]
        return key

    def ask(self, message: Mapping[str, Any]) -> None:
        """DeadlineError, UnavailableError: it takes no more questions."""
        assert self._process is not None
        self._process.send(message, SEND_S)

    def ask_next(self, tokens: Sequence[int]) -> None:
        """The same rows again, each with one more token: at most ``MOST_TOKENS``."""
        struct.pack_into(f"{len(tokens)}i", self._memory, FIRST_TOKEN, *tokens)
        self.ask(_NEXT)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """To the oldest question that has none. DeadlineError, UnavailableError: there is none."""
        assert self._process is not None
        if not self.ready:
            opened = receive_all([self._process], START_S)[0]
            self.ready, self._row_bytes = True, opened["row_bytes"]
        return receive_all([self._process], timeout_s)[0]

    def masks(self, rows: int) -> NDArray[np.uint8]:
        """The first so many rows, as the child wrote them for the last answer; they stay as they
        are until masks are asked for again. Bit i of byte b is token 8 b + i."""
        if FIRST_ROW + rows * self._row_bytes > len(self._memory):
            self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        flat = np.frombuffer(self._memory, np.uint8, rows * self._row_bytes, FIRST_ROW)
        return flat.reshape(rows, self._row_bytes)

    def close(self) -> None:
        """Ends the child; masks that were given out stay readable. May be called again."""
        if self._process is not None:
            self._process.send_signal(9)  # it has nothing to put in order
            self._process.close()
        for descriptor in self._open:
            os.close(descriptor)
        self._open = ()


def written(grammar: Grammar) -> list[Any]:
    """As a child reads it."""
    return [grammar.kind.value, grammar.text, grammar.whitespace]


def _start(descriptor: int, log: int) -> AnsweringProcess:
    command = [sys.executable, "-m", "moeserve.grammar.child", str(descriptor)]
    pipe = subprocess.PIPE
    popen = start(command, stdin=pipe, stdout=pipe, stderr=log, pass_fds=(descriptor,))
    return AnsweringProcess("the grammar worker", popen, Path(f"/proc/self/fd/{log}"))
