"""Calls whose arguments stand between tags, each value as plain text.

Formats, each from the model's own chat template:

- GLM-4.5 and later: ``<tool_call>N\\n<arg_key>K</arg_key>\\n<arg_value>V</arg_value>...
  </tool_call>``, where V is the text of a string, and JSON of anything else.
- Qwen3-Coder: ``<tool_call>\\n<function=N>\\n<parameter=K>\\nV\\n</parameter>...\\n</function>\\n
  </tool_call>``, with the same rule for V.

Arguments become one JSON object as they come. A value is a string where the tool's schema says so;
else it is the JSON it spells, and a string if it spells none. Strings pass as they come, other
values once they are whole. A call whose name cannot be read is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.gateway.parsers.json_calls import MOST_HEAD, NAME
from moeserve.gateway.parsers.machine import TextMachine, first_marker

# The parameters of each tool: name -> JSON schema.
ToolSchemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TaggedCallFormat:
    """``head`` matches all between ``opening`` and the first of ``key`` and ``closing``. ``blank``
    is what a value has around it once."""

    opening: str
    closing: str
    head: re.Pattern[str]
    key: str
    key_end: str
    value: str
    value_end: str
    blank: str = ""


GLM = TaggedCallFormat(
    "<tool_call>",
    "</tool_call>",
    re.compile(rf"\s*(?P<name>{NAME})\s*\Z"),
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
QWEN_CODER = TaggedCallFormat(
    "<tool_call>",
    "</tool_call>",
    re.compile(rf"\s*<function=(?P<name>{NAME})>\s*(?:</function>\s*)?\Z"),
    "<parameter=",
    ">",
    "",
    "</parameter>",
    blank="\n",
)


class TaggedCallParser(TextMachine):
    """Reads content and calls of one format; ``schemas`` tell which values are strings."""

    def __init__(self, form: TaggedCallFormat, schemas: ToolSchemas) -> None:
        super().__init__()
        self._form = form
        self._schemas = schemas
        self._state = self._outside
        self._name = ""
        self._fields = 0
        self._is_string = False
        self._value: list[str] = []
        self._ending = ""  # a blank that may be the value's last

    def _outside(self) -> bool:
        text, marker = self._cut_before((self._form.opening,))
        self._content(text)
        if marker:
            self._state = self._head
        return bool(marker)

    def _head(self) -> bool:
        form = self._form
        found = first_marker(self._text, (form.key, form.closing))
        if found is None and len(self._text) < MOST_HEAD:
            return False
        end = MOST_HEAD if found is None else found[0]
        head = form.head.match(self._text, 0, end) if end < MOST_HEAD else None
        if head is None:
            self._content(form.opening)
            self._state = self._outside
            return True
        self._cut(end)
        self._open(head["name"])
        return True

    def _open(self, name: str) -> None:
        self._name, self._fields = name, 0
        self._call(name)
        self._state = self._between

    def _between(self) -> bool:
        """Before a key, or the call's end; other text between them is no part of the call."""
        form = self._form
        _, marker = self._cut_before((form.key, form.closing, form.opening))
        if marker == form.key:
            self._state = self._key
        elif marker:
            self._arguments("}" if self._fields else "{}")
            self._state = self._head if marker == form.opening else self._outside
        return bool(marker)

    def _key(self) -> bool:
        at = self._text.find(self._form.key_end)
        if at < 0 and len(self._text) < MOST_HEAD:
            return False
        if not 0 <= at < MOST_HEAD:
            self._arguments("}" if self._fields else "{}")
            self._content(self._form.key)
            self._state = self._outside
            return True
        key = self._cut(at).strip()
        self._cut(len(self._form.key_end))
        self._arguments(("{" if not self._fields else ", ") + json.dumps(key, ensure_ascii=False))
        self._arguments(": ")
        self._fields += 1
        schema = self._schemas.get(self._name, {}).get(key, {})
        self._is_string = isinstance(schema, Mapping) and schema.get("type") == "string"
        self._state = self._before_value if self._form.value else self._begin_value
        return True

    def _before_value(self) -> bool:
        _, marker = self._cut_before((self._form.value,))
        if marker:
            self._state = self._begin_value
        return bool(marker)

    def _begin_value(self) -> bool:
        if not self._text:
            return False
        if self._form.blank and self._text.startswith(self._form.blank):
            self._cut(len(self._form.blank))
        self._value, self._ending = [], ""
        if self._is_string:
            self._arguments('"')
        self._state = self._in_value
        return True

    def _in_value(self) -> bool:
        form = self._form
        text, marker = self._cut_before((form.value_end,))
        text = self._ending + text
        self._ending = ""
        if form.blank and text.endswith(form.blank):
            self._ending = form.blank
            text = text[: -len(form.blank)]
        if self._is_string:
            self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)
        if marker:
            self._close_value()
            self._state = self._between
        return bool(marker)

    def _close_value(self) -> None:
        if self._is_string:
            self._arguments('"')
        else:
            self._arguments(_as_json("".join(self._value)))

    def _end(self) -> None:
        """A call that breaks off keeps what it has, as with JSON."""
        if self._state == self._outside:
            self._content(self._text)
        elif self._state == self._head:
            head = self._form.head.match(self._text)
            if head is None:
                self._content(self._form.opening + self._text)
            else:
                self._call(head["name"])
                self._arguments("{}")


def _as_json(text: str) -> str:
    """The value that a text spells, or the text as a string; NaN and the like are no JSON."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _no_constant(name: str) -> None:
    raise ValueError(name)
