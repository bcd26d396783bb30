"""From token ids to text that is ready to show, one token at a time.

A tokenizer decodes a sequence, not a token: a character may span tokens, and the space before a
word depends on whether anything precedes it. So the newest tokens are decoded behind a short
window of earlier ones, and the part that the window alone would give is cut off. What ends in
U+FFFD may be an unfinished character and is held back until it is whole, or known to be wrong, or
the request ends. What may be the beginning of a stop string is held back likewise. The window is
bounded, so a token costs the same wherever it stands.

Where a text is the bytes of its tokens, one after the other (``Decodes.byte_pieces``), nothing of
this is needed: the bytes are decoded as they come, which is several times cheaper.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from moeserve.core import FinishReason, Request

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most 4 bytes, and a token at least one: behind the last three tokens
# every character is whole or known to be wrong.
UNDECIDED = 3
WINDOW = 12
MOST_HELD = 24


class Decodes(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def byte_pieces(self, skip_special_tokens: bool = True) -> Mapping[int, bytes] | None:
        """For every id the bytes that it adds to a text, if a text is made of nothing else."""
        ...


class Detokenizes(Protocol):
    def push(self, token_id: int) -> str:
        """What the new token makes ready."""
        ...

    def flush(self) -> str:
        """The rest, where the sequence ends."""
        ...


def open_detokenizer(
    tokenizer: Decodes, prompt_ids: Sequence[int], skip_special: bool
) -> Detokenizes:
    """The cheaper one where it gives the same: the prompt must end with a whole character, too."""
    pieces = tokenizer.byte_pieces(skip_special)
    if pieces is not None:
        # As below: special tokens alone say nothing about what precedes.
        tails = (prompt_ids[-MOST_HELD:], prompt_ids)
        texts = (tokenizer.decode(ids, skip_special_tokens=skip_special) for ids in tails)
        if not next(filter(None, texts), "").endswith(REPLACEMENT):
            return ByteDetokenizer(pieces)
    return Detokenizer(tokenizer, prompt_ids, skip_special)


class ByteDetokenizer:
    """Text of a growing sequence of bytes, after whole characters. What begins a character is held
    back until it is whole, or known to be wrong."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class Detokenizer:
    """Text of a growing sequence: the pieces join to ``decode(prompt + output)`` less the prompt.

    Where the bytes are not UTF-8 a byte-level tokenizer gives the same text, too; one with byte
    fallback marks whole runs of bytes as wrong in hindsight, so there the number of U+FFFD may
    differ.
    """

    def __init__(self, tokenizer: Decodes, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        tail = prompt_ids[-MOST_HELD:]
        if not self._decode(tail):  # special tokens alone say nothing about what precedes
            tail = prompt_ids
        self._window = self._cleanest_end(tail)
        self._text = self._decode(self._window)
        # So many tokens of the window are settled, and characters of its text shown.
        self._settled, self._shown = len(self._window), len(self._text)
        for held in range(min(UNDECIDED, len(self._window)) + 1):
            before = self._decode(self._window[: len(self._window) - held])
            if not before.endswith(REPLACEMENT):
                self._settled, self._shown = len(self._window) - held, len(before)
                break

    def push(self, token_id: int) -> str:
        """What the new token makes ready."""
        before, self._text = self._text, self._decode([*self._window, token_id])
        if self._text == before and self._leaves_no_trace(token_id):
            return ""
        self._window.append(token_id)
        whole = len(self._text.rstrip(REPLACEMENT))
        if whole == len(self._text):
            return self._settle()
        if len(self._window) - self._settled >= MOST_HELD:
            return self._give_up_on_oldest()
        return self._show(whole)

    def flush(self) -> str:
        """The rest, where the sequence ends."""
        return self._show(len(self._text))

    def _settle(self) -> str:
        delta = self._show(len(self._text))
        recent = self._window[self._settled :]
        text = self._decode(recent)
        if text:
            self._window, self._text, self._shown = recent, text, len(text)
        self._settled = len(self._window)
        return delta

    def _give_up_on_oldest(self) -> str:
        """Show the held bytes as wrong, and begin a new window with the last few."""
        recent = self._cleanest_end(self._window)
        older = self._decode(self._window[: len(self._window) - len(recent)])
        delta = older[self._shown :]
        self._window, self._text = recent, self._decode(recent)
        self._settled = self._shown = 0
        return delta + self._show(len(self._text.rstrip(REPLACEMENT)))

    def _cleanest_end(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, cut between characters; all of them if the last show nothing."""
        text = self._decode(ids)

        def misfit(size: int) -> tuple[int, bool]:
            start = max(0, len(ids) - size)
            stops = range(max(start, len(ids) - UNDECIDED), len(ids) + 1)
            wrong = min(self._decode(ids[start:stop]).count(REPLACEMENT) for stop in stops)
            return wrong, self._decode(ids[:start]) + self._decode(ids[start:]) != text

        best = min(range(WINDOW - UNDECIDED, WINDOW + 1), key=misfit)
        return list(ids[-best:]) if self._decode(ids[-best:]) else list(ids)

    def _show(self, stop: int) -> str:
        delta = self._text[self._shown : stop]
        self._shown = max(self._shown, stop)
        return delta

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _leaves_no_trace(self, token_id: int) -> bool:
        """Special tokens and ids without a text; a space that only a beginning hides shows here.

        They must not push text out of the window.
        """
        return not self._decode([token_id, token_id])


class StopMatcher:
    """Ends text at the stop string that is complete first; of several, the longest.

    The outcome does not depend on how the text is cut into pieces. ``met`` is the one that did.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(s for s in stops if s)
        self._include = include
        self._held = ""
        self.met = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string was met."""
        if not self._stops:
            return text, False
        text, self._held = self._held + text, ""
        ends = [(at + len(s), -len(s), s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            end, length, self.met = min(ends)
            return text[: end if self._include else end + length], True
        held = max((overlap(text, s) for s in self._stops), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop`` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Piece(NamedTuple):
    """Text that is ready, and whether a stop string ended the request with it."""

    text: str
    stopped: bool = False


class TextStream:
    """The text of one request. The first ``min_tokens`` tokens are not searched for stops."""

    def __init__(self, tokenizer: Decodes, request: Request) -> None:
        params = request.params
        self._params = params
        self._made = 0
        self._detokenizer = open_detokenizer(
            tokenizer, request.prompt_ids, params.skip_special_tokens
        )
        self._matcher = StopMatcher(params.stop, params.include_stop)

    @property
    def stop_met(self) -> str:
        """The stop string that ended the text; empty where none did."""
        return self._matcher.met

    def push(self, token_id: int, finish: FinishReason | None) -> Piece:
        """Text after one more token; with ``finish`` nothing is held back any more."""
        self._made += 1
        text = ""
        if finish is not FinishReason.STOP or self._params.include_stop:
            text = self._detokenizer.push(token_id)
        if finish is not None:
            text += self._detokenizer.flush()
        if self._made <= self._params.min_tokens:
            return Piece(text)
        ready, stopped = self._matcher.push(text)
        if finish is not None and not stopped:
            ready += self._matcher.flush()
        return Piece(ready, stopped)

    def extend(
        self, token_ids: Sequence[int], finish: FinishReason | None
    ) -> tuple[str, int, bool]:
        """``push`` for several, or for an end without tokens: their text, how many of them count,
        and whether a stop string ended the request with the last of these."""
        if finish is None and not self._params.stop:
            return "".join(map(self._detokenizer.push, token_ids)), len(token_ids), False
        if not token_ids:
            return self.flush() if finish is not None else "", 0, False
        text, last = "", len(token_ids)
        for made, token_id in enumerate(token_ids, 1):
            piece = self.push(token_id, finish if made == last else None)
            text += piece.text
            if piece.stopped:
                return text, made, True
        return text, last, False

    def flush(self) -> str:
        """What is still held back, where a request ends between tokens."""
        ready, stopped = self._matcher.push(self._detokenizer.flush())
        return ready if stopped else ready + self._matcher.flush()
