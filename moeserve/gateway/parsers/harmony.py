"""The channels of gpt-oss, as OpenAI's harmony format has them.

From the format's guide (openai/harmony, docs/format.md): an answer is one or more messages, each
``<|start|>assistant<|channel|>CHANNEL to=RECIPIENT <|constrain|>json<|message|>BODY`` and an end:
``<|end|>``, ``<|call|>`` or ``<|return|>``. The prompt ends with the first ``<|start|>assistant``;
the recipient may also stand before the channel. ``analysis`` is reasoning; ``final`` and
``commentary`` are content; whatever has a recipient is a call of ``functions.NAME``, whose body is
its arguments. Text outside of messages is content. Its markers are special tokens, so the text must
be decoded with them.
"""

from __future__ import annotations

import re

from moeserve.gateway.parsers.json_calls import MOST_HEAD
from moeserve.gateway.parsers.machine import MOST_BLANKS, TextMachine

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
# Where one of these is among the end tokens, a call or an answer ends the sequence.
STOPS = ("<|call|>", "<|return|>")

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]{1,256})")
# What may begin a header; a message without one is content.
_BEGINNINGS = (START, CHANNEL, MESSAGE, "to=", "assistant")


class HarmonyParser(TextMachine):
    """Reads an answer from behind ``<|start|>assistant``."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._begin
        self._channel = ""

    def _begin(self) -> bool:
        """A header, or plain text."""
        seen = self._text.lstrip()
        if len(self._text) - len(seen) <= MOST_BLANKS:
            if any(seen.startswith(begin) for begin in _BEGINNINGS):
                self._state = self._header
                return True
            if any(begin.startswith(seen) for begin in _BEGINNINGS):
                return False
        self._state = self._plain
        return True

    def _header(self) -> bool:
        at = self._text.find(MESSAGE)
        if at < 0 and len(self._text) < MOST_HEAD:
            return False
        if not 0 <= at < MOST_HEAD:
            self._state = self._malformed
            return True
        header = self._cut(at)
        self._cut(len(MESSAGE))
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._channel = channel[1] if channel else "final"
        if recipient:
            self._channel = "call"
            self._call(recipient[1].removeprefix("functions."))
        self._state = self._body
        return True

    def _body(self) -> bool:
        text, marker = self._cut_before((*ENDS, START))
        self._show(text)
        if marker:
            self._state = self._begin
        return bool(marker)

    def _show(self, text: str) -> None:
        match self._channel:
            case "call":
                self._arguments(text)
            case "analysis":
                self._reasoning(text)
            case _:
                self._content(text)

    def _plain(self) -> bool:
        """Text of no message, up to one."""
        text, marker = self._cut_before((START, CHANNEL))
        self._content(text)
        if marker:
            self._text = marker + self._text
            self._state = self._header
        return bool(marker)

    def _malformed(self) -> bool:
        """Its first marker would lead here again."""
        self._content(self._cut(MOST_HEAD // 2))
        self._state = self._plain
        return True

    def _end(self) -> None:
        """What is left of a header is no text; what might have been one is."""
        if self._state == self._plain or (
            self._state in (self._begin, self._header) and not self._text.lstrip().startswith("<|")
        ):
            self._content(self._text)
        elif self._state == self._body:
            self._show(self._text)
