"""Calls that stand between markers and have their arguments as a JSON object.

Formats, each from the model's own chat template and card:

- Hermes (NousResearch's function-calling format, used by Qwen2.5 and Qwen3):
  ``<tool_call>\\n{"name": N, "arguments": {...}}\\n</tool_call>``, one after the other.
- DeepSeek V3 and R1: ``<｜tool▁calls▁begin｜>``, for each call ``<｜tool▁call▁begin｜>function
  <｜tool▁sep｜>N\\n```json\\n{...}\\n```<｜tool▁call▁end｜>``, ``<｜tool▁calls▁end｜>``.
  V3.1: a call is ``<｜tool▁call▁begin｜>N<｜tool▁sep｜>{...}<｜tool▁call▁end｜>``. Both are read.
- Kimi-K2 (docs/tool_call_guidance.md of its repository): ``<|tool_calls_section_begin|>``, for each
  call ``<|tool_call_begin|>functions.N:0<|tool_call_argument_begin|>{...}<|tool_call_end|>``,
  ``<|tool_calls_section_end|>``; what stands before the arguments is the call's id.

A call is announced when its name and the beginning of its arguments are there, and its arguments
then pass as they come. What is malformed before that is content, with its markers. Arguments end
with their object; quotes inside are understood, so a marker in a string is not the call's end.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from moeserve.gateway.parsers.machine import TextMachine

NAME = r"[\w.:/\-]{1,256}"
# What precedes arguments is shorter, or no call.
MOST_HEAD = 512

_TELLING = re.compile(r'["\\{}\[\]<]')
_AFTER_ARGUMENTS = re.compile(r"[\s}`]*")


@dataclass(frozen=True, slots=True)
class JsonCallFormat:
    """``head`` matches what stands between ``opening`` and the arguments' brace, with groups
    ``name`` or ``other_name``, and ``id`` where calls have one. ``ignored`` are markers around
    calls. ``enveloped``: name and arguments are members of one object, in any order."""

    opening: str
    closing: str
    head: re.Pattern[str]
    ignored: tuple[str, ...] = ()
    enveloped: bool = False


HERMES = JsonCallFormat(
    "<tool_call>",
    "</tool_call>",
    re.compile(rf'\s*\{{\s*"name"\s*:\s*"(?P<name>{NAME})"\s*,\s*"arguments"\s*:\s*(?=\{{)'),
    enveloped=True,
)
DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
DEEPSEEK = JsonCallFormat(
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    re.compile(
        rf"\s*\w*\s*{DEEPSEEK_SEPARATOR}\s*(?P<name>{NAME})\s*```(?:json)?\s*(?=\{{)"
        rf"|\s*(?P<other_name>{NAME})\s*{DEEPSEEK_SEPARATOR}\s*(?=\{{)"
    ),
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
KIMI = JsonCallFormat(
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    re.compile(
        r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.\-]{1,256}):\d{1,9})\s*"
        r"<\|tool_call_argument_begin\|>\s*(?=\{)"
    ),
    ignored=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
)


class JsonExtent:
    """Finds where a JSON object ends, as it comes; its first character opens it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escape = False

    def end(self, text: str) -> int | None:
        """After how many characters the object ends, or stops being JSON; None where it goes on."""
        start = 0
        if self._escape and text:
            self._escape, start = False, 1
        while found := _TELLING.search(text, start):
            start = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\" if self._in_string:
                    if start == len(text):
                        self._escape = True
                    start += 1
                case "<" if not self._in_string:
                    return found.start()
                case "{" | "[" if not self._in_string:
                    self._depth += 1
                case "}" | "]" if not self._in_string:
                    self._depth -= 1
                    if self._depth == 0:
                        return start
        return None


class JsonCallParser(TextMachine):
    """Reads content and calls of one format."""

    def __init__(self, form: JsonCallFormat) -> None:
        super().__init__()
        self._form = form
        self._state = self._outside
        self._extent = JsonExtent()
        self._envelope: list[str] = []

    def _outside(self) -> bool:
        text, marker = self._cut_before((self._form.opening, *self._form.ignored))
        self._content(text)
        if marker == self._form.opening:
            self._state = self._head
        return bool(marker)

    def _head(self) -> bool:
        form = self._form
        found = form.head.match(self._text, 0, MOST_HEAD)
        if found is not None:
            groups = found.groupdict("")
            name = groups["name"] or groups.get("other_name", "")
            self._call(name, groups.get("id", ""))
            self._cut(found.end())
            self._extent = JsonExtent()
            self._state = self._inside
            return True
        if len(self._text) < MOST_HEAD and form.closing not in self._text:
            return False
        if form.enveloped:
            self._envelope = []
            self._state = self._whole
        else:
            self._content(form.opening)
            self._state = self._outside
        return True

    def _inside(self) -> bool:
        end = self._extent.end(self._text)
        if end is None:
            self._arguments(self._cut(len(self._text)))
            return False
        self._arguments(self._cut(end))
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Up to the closing marker; other text than an envelope's is content."""
        skipped = _AFTER_ARGUMENTS.match(self._text)
        assert skipped is not None
        self._cut(skipped.end())
        if self._text.startswith(self._form.closing):
            self._cut(len(self._form.closing))
        elif self._form.closing.startswith(self._text):
            return False
        self._state = self._outside
        return True

    def _whole(self) -> bool:
        """An envelope in another order than usual, or none at all."""
        text, marker = self._cut_before((self._form.closing,))
        self._envelope.append(text)
        if marker:
            self._read_envelope(marker)
            self._state = self._outside
        return bool(marker)

    def _read_envelope(self, marker: str) -> None:
        text = "".join(self._envelope)
        call = _call_of(text)
        if call is None:
            self._content(self._form.opening + text + marker)
        else:
            self._call(call[0])
            self._arguments(call[1])

    def _end(self) -> None:
        if self._state == self._head and not self._form.enveloped:
            self._content(self._form.opening + self._text)
        elif self._state in (self._head, self._whole):
            self._envelope = [*(self._envelope if self._state == self._whole else ()), self._text]
            self._read_envelope("")
        elif self._state == self._outside:
            self._content(self._text)


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of an envelope; None where it is none."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or not isinstance(read.get("name"), str) or not read["name"]:
        return None
    arguments = read.get("arguments", read.get("parameters", {}))
    if isinstance(arguments, str):
        return (read["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return read["name"], json.dumps(arguments, ensure_ascii=False)
