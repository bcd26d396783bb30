"""A text that is read with one state at a time, and the markers that part it.

A state is a method that reads from ``_text``, may name the next state, and says whether to go on;
False waits for more text. What it decides must follow from the text alone, never from where a piece
of it ended: so a state waits while a marker may be incomplete. Every state leaves a bounded rest,
so that the cost of a text is linear in its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moeserve.gateway.parsers.parts import (
    ArgumentsPart,
    CallPart,
    ContentPart,
    Part,
    ReasoningPart,
)

# Blanks beyond these are shown at once, whatever may follow.
MOST_BLANKS = 64


def first_marker(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of them begins, and which; no marker may lie in or overlap another."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found, default=None)


def unfinished(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(text), len(marker) - 1), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest


class Blanks:
    """Holds white space back until text follows it, for it may stand at an end."""

    def __init__(self) -> None:
        self._held = ""

    def show(self, text: str) -> str:
        text = self._held + text
        kept = max(len(text.rstrip()), len(text) - MOST_BLANKS)
        self._held = text[kept:]
        return text[:kept]

    def take(self) -> str:
        held, self._held = self._held, ""
        return held


class TextMachine:
    """The base of parsers; a subclass sets ``_state`` and says in ``_end`` what the rest is."""

    def __init__(self) -> None:
        self._text = ""
        self._parts: list[Part] = []
        self._state: Callable[[], bool] = self._wait
        self._blanks = Blanks()
        self._calls = 0

    def push(self, text: str) -> list[Part]:
        self._text += text
        while self._state():
            pass
        return self._taken()

    def flush(self) -> list[Part]:
        self._end()
        self._text = ""
        blanks = self._blanks.take()
        if blanks and not self._calls:
            self._parts.append(ContentPart(blanks))
        return self._taken()

    def _wait(self) -> bool:
        return False

    def _end(self) -> None:
        """What is still unread, where the text ends."""

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _cut(self, size: int) -> str:
        """Reads the next ``size`` characters."""
        cut, self._text = self._text[:size], self._text[size:]
        return cut

    def _cut_before(self, markers: Iterable[str]) -> tuple[str, str]:
        """Reads up to the first marker and past it; without one, all that is part of none."""
        markers = tuple(markers)
        found = first_marker(self._text, markers)
        if found is None:
            return self._cut(len(self._text) - unfinished(self._text, markers)), ""
        before = self._cut(found[0])
        return before, self._cut(len(found[1]))

    def _content(self, text: str) -> None:
        if shown := self._blanks.show(text):
            self._parts.append(ContentPart(shown))

    def _reasoning(self, text: str) -> None:
        if text:
            self._parts.append(ReasoningPart(text))

    def _call(self, name: str, call_id: str = "") -> None:
        """Blanks between a text and a call belong to neither."""
        self._blanks.take()
        self._parts.append(CallPart(self._calls, name, call_id))
        self._calls += 1

    def _arguments(self, text: str) -> None:
        """Of the call that was announced last."""
        if text:
            self._parts.append(ArgumentsPart(self._calls - 1, text))
