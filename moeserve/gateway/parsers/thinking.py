"""Reasoning that stands before the answer, between ``<think>`` and ``</think>``.

As DeepSeek-R1, Qwen3, GLM-4.5 and Kimi-K2-Thinking write it. A prompt may end inside it: templates
of some models open it themselves. What follows is read by another parser. Line breaks around
the markers belong to neither side. A ``<think>`` that is not the first of a text is text.
"""

from __future__ import annotations

from moeserve.gateway.parsers.machine import MOST_BLANKS, Blanks, TextMachine
from moeserve.gateway.parsers.parts import AnswerParser, Part, ReasoningPart

OPENING, CLOSING = "<think>", "</think>"


def ends_inside(prompt: str) -> bool:
    """Whether a rendered prompt has opened the reasoning that the model is to go on with."""
    return prompt.rstrip().endswith(OPENING)


class ThinkingParser(TextMachine):
    """``inside`` where the prompt has opened the reasoning; ``answer`` reads what follows it."""

    def __init__(self, answer: AnswerParser, *, inside: bool) -> None:
        super().__init__()
        self._answer = answer
        self._pauses = Blanks()
        self._state = self._skip_breaks if inside else self._begin

    def _begin(self) -> bool:
        seen = self._text.lstrip()
        blanks = len(self._text) - len(seen)
        if blanks <= MOST_BLANKS:
            if seen.startswith(OPENING):
                self._cut(blanks + len(OPENING))
                self._state = self._skip_breaks
                return True
            if OPENING.startswith(seen):
                return False
        self._state = self._beyond
        return True

    def _skip_breaks(self) -> bool:
        self._text = self._text.lstrip("\r\n")
        if not self._text:
            return False
        self._state = self._inside
        return True

    def _inside(self) -> bool:
        text, marker = self._cut_before((CLOSING,))
        if shown := self._pauses.show(text):
            self._parts.append(ReasoningPart(shown))
        if marker:
            self._pauses.take()
            self._state = self._skip_breaks_after
        return bool(marker)

    def _skip_breaks_after(self) -> bool:
        self._text = self._text.lstrip("\r\n")
        if not self._text:
            return False
        self._state = self._beyond
        return True

    def _beyond(self) -> bool:
        self._parts += self._answer.push(self._cut(len(self._text)))
        return False

    def flush(self) -> list[Part]:
        if self._state == self._inside:
            self._reasoning(self._pauses.take() + self._text)
        elif self._state in (self._begin, self._beyond):
            self._parts += self._answer.push(self._text)
        self._text = ""
        self._parts += self._answer.flush()
        return self._taken()
