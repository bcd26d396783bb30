"""What an answer must be, as a grammar: calls that are asked for, and reasoning within a budget.

``tool_choice`` required or a named function, ``max_thinking_tokens``, and a form of the answer for
a model that reasons first, all say something of the whole text; here it becomes one Lark grammar as
llguidance reads it (``%json`` for arguments, ``<[7]>`` for token 7, ``[max_tokens=N]`` for a rule
that is cut off). Calls are written as the model's family writes them, so the parsers read them
back. Pure: a tokenizer is only asked which markers are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeserve.gateway.parsers import thinking
from moeserve.gateway.parsers.harmony import CHANNEL, CONSTRAIN, ENDS, MESSAGE, START
from moeserve.gateway.parsers.json_calls import (
    DEEPSEEK,
    DEEPSEEK_SEPARATOR,
    HERMES,
    KIMI,
    KIMI_ARGUMENTS,
)
from moeserve.gateway.parsers.styles import AnswerStyle
from moeserve.gateway.parsers.tagged_calls import GLM, QWEN_CODER, TaggedCallFormat
from moeserve.grammar.json_options import json_options

Tool = Mapping[str, Any]
# None where a marker is text to the model's tokenizer.
TokenOf = Callable[[str], int | None]

_ANY = r"/(.|\n)*/"
_SOME = r"/(.|\n)+/"


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What a request says of its answer. ``tools`` must be called, one at least, and no more than
    one unless ``parallel``. ``body`` is what follows reasoning, as a Lark expression; empty is
    anything. ``budget`` bounds the tokens of reasoning; ``inside``: the prompt has begun it."""

    tools: Sequence[Tool] = ()
    parallel: bool = True
    body: str = ""
    budget: int | None = None
    inside: bool = False


def answer_grammar(style: AnswerStyle, shape: AnswerShape, token_of: TokenOf) -> str | None:
    """In Lark; None where any answer will do."""
    reasons = style.reasoning != "none"
    if not shape.tools and not shape.body and (shape.budget is None or not reasons):
        return None
    rules = _Rules(style, shape, token_of)
    return rules.text()


@dataclass(slots=True)
class _Rules:
    """Collects the rules of one grammar."""

    style: AnswerStyle
    shape: AnswerShape
    token_of: TokenOf
    rules: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        body = self._calls() if self.shape.tools else self.shape.body or self._anything()
        match self.style.reasoning:
            case "think":
                start = self._thought(body)
            case "harmony":
                start = self._channels(body)
            case _:
                start = body
        lines = [f"start: {start}", *(f"{name}: {rule}" for name, rule in self.rules.items())]
        return "\n".join(lines)

    def _add(self, name: str, rule: str) -> str:
        self.rules[name] = rule
        return name.partition("[")[0]

    def _marker(self, text: str) -> str:
        token = self.token_of(text)
        return _literal(text) if token is None else f"<[{token}]>"

    def _reasoning(self) -> str:
        budget = self.shape.budget
        limit = "" if budget is None else f"[max_tokens={max(budget, 1)}]"
        return self._add(f"reasoning{limit}", _ANY)

    def _thought(self, body: str) -> str:
        opening, closing = self._marker(thinking.OPENING), self._marker(thinking.CLOSING)
        thought = closing if self.shape.budget == 0 else f"{self._reasoning()} {closing}"
        if self.shape.inside:
            return rf"{thought} /\n{{0,2}}/ {body}"
        return rf"(/\s{{0,2}}/ {opening} {thought} /\n{{0,2}}/)? {body}"

    def _channels(self, body: str) -> str:
        """The header of the first message, up to what ``body`` begins with."""
        channel, message = self._marker(CHANNEL), self._marker(MESSAGE)
        end = f'{self._marker(ENDS[0])} {self._marker(START)} "assistant"'
        analysis = f'{channel} "analysis" {message}'
        thought = f"({analysis} {self._reasoning()} {end})?" if self.shape.budget != 0 else ""
        if self.shape.body and not self.shape.tools:
            return f'{thought} {channel} "final" {message} {body}'
        return f"{thought} {body}"

    def _anything(self) -> str:
        """Text and calls; what opens reasoning is not in it."""
        if self.style.reasoning == "harmony":
            channel, message = self._marker(CHANNEL), self._marker(MESSAGE)
            head = (
                rf"{channel} /(final|commentary)[^<]{{0,256}}/ ({self._marker(CONSTRAIN)} /\w+/)?"
            )
            more = f'{self._marker(ENDS[0])} {self._marker(START)} "assistant" said'
            return self._add("said", f"{head} {message} {_SOME}? ({more})?")
        markers = [m for m in _markers_of(self.style) if self.token_of(m) is not None]
        pieces = " | ".join([_SOME, *map(self._marker, markers)])
        return self._add("said", f"({pieces})*")

    def _calls(self) -> str:
        one = " | ".join(self._call(i, tool["function"]) for i, tool in enumerate(self.shape.tools))
        call = self._add("call", one)
        match self.style.tools:
            case "deepseek":
                opening, closing = map(self._marker, DEEPSEEK.ignored)
                return f"{opening} {self._repeated(call, chr(10))} {closing}"
            case "kimi":
                opening, closing = map(self._marker, KIMI.ignored)
                return f"{opening} {self._repeated(call, '')} {closing}"
            case "harmony":
                return call
            case _:
                return self._repeated(call, "\n")

    def _repeated(self, call: str, between: str) -> str:
        if not self.shape.parallel:
            return call
        return f"{call} ({_literal(between)} {call})*" if between else f"{call}+"

    def _call(self, index: int, function: Mapping[str, Any]) -> str:
        name, mark = function["name"], self._marker
        match self.style.tools:
            case "glm":
                return self._tagged(index, function, GLM, f"{name}\n", "\n")
            case "qwen3_coder":
                return self._tagged(index, function, QWEN_CODER, f"\n<function={name}>\n", "\n")
        arguments = self._arguments(index, function)
        match self.style.tools:
            case "deepseek" if self.style.fenced:
                fence = _literal(name + "\n```json\n")
                head = f'{mark(DEEPSEEK.opening)} "function" {mark(DEEPSEEK_SEPARATOR)} {fence}'
                return f'{head} {arguments} "\\n```" {mark(DEEPSEEK.closing)}'
            case "deepseek":
                head = f"{_literal(name)} {mark(DEEPSEEK_SEPARATOR)}"
                return f"{mark(DEEPSEEK.opening)} {head} {arguments} {mark(DEEPSEEK.closing)}"
            case "kimi":
                head = f"{_literal(f'functions.{name}:')} /[0-9]{{1,3}}/ {mark(KIMI_ARGUMENTS)}"
                return f"{mark(KIMI.opening)} {head} {arguments} {mark(KIMI.closing)}"
            case "harmony":
                head = f"{mark(CHANNEL)} {_literal(f'commentary to=functions.{name} ')}"
                return f'{head} {mark(CONSTRAIN)} "json" {mark(MESSAGE)} {arguments}'
        head = _literal(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        return f'{mark(HERMES.opening)} {head} {arguments} "}}\\n" {mark(HERMES.closing)}'

    def _arguments(self, index: int, function: Mapping[str, Any]) -> str:
        schema = {"type": "object"} | dict(function.get("parameters") or {})
        return self._json(f"arguments_{index}", schema, strict=function.get("strict") is True)

    def _json(self, name: str, schema: Mapping[str, Any], *, strict: bool) -> str:
        """What a schema has that no grammar can say is left out, unless it is ``strict``."""
        options = json_options() | {"lenient": not strict, "coerce_one_of": not strict}
        text = json.dumps(dict(schema) | {"x-guidance": options}, ensure_ascii=False)
        return self._add(name, f"%json {text}")

    def _tagged(
        self,
        index: int,
        function: Mapping[str, Any],
        form: TaggedCallFormat,
        opening: str,
        between: str,
    ) -> str:
        parameters = function.get("parameters") or {}
        required, properties = parameters.get("required"), parameters.get("properties")
        fields = []
        for i, (key, schema) in enumerate(_mapping(properties).items()):
            value = self._value(f"value_{index}_{i}", schema, parameters, form)
            one = f"{self._key(form, key, between)} {value} {_literal(between)}"
            must = isinstance(required, list) and key in required
            fields.append(one if must else f"({one})?")
        closing = self._marker(form.closing)
        if form is QWEN_CODER:
            closing = f'"</function>\\n" {closing}'
        return f"{self._marker(form.opening)} {_literal(opening)} {' '.join(fields)} {closing}"

    def _key(self, form: TaggedCallFormat, key: str, between: str) -> str:
        head = f"{self._marker(form.key)} {_literal(key)} {self._marker(form.key_end)}"
        if form.value:
            return f"{head} {_literal(between)} {self._marker(form.value)}"
        return f"{head} {_literal(form.blank)}"

    def _value(
        self, name: str, schema: Any, parameters: Mapping[str, Any], form: TaggedCallFormat
    ) -> str:
        """A string is its text, up to the end tag; all else is JSON."""
        end = self.token_of(form.value_end)
        if isinstance(schema, Mapping) and schema.get("type") == "string" and "enum" not in schema:
            if end is not None:
                return f"{self._add(name, _ANY)} <[{end}]>"
            ending = form.blank + form.value_end
            return self._add(f"{name}[suffix={_literal(ending)}]", _ANY)
        closing = f"<[{end}]>" if end is not None else _literal(form.blank + form.value_end)
        if isinstance(schema, Mapping) and isinstance(schema.get("enum"), list):
            spelled = [x if isinstance(x, str) else json.dumps(x) for x in schema["enum"]]
            return f"({' | '.join(map(_literal, spelled))}) {closing}"
        shared = {k: parameters[k] for k in ("$defs", "definitions") if k in parameters}
        own = dict(schema) if isinstance(schema, Mapping) else {}
        return f"{self._json(name, own | shared, strict=False)} {closing}"


def _mapping(value: object) -> Mapping[str, Any]:
    """A schema is a stranger's: what should be an object may be anything."""
    return value if isinstance(value, Mapping) else {}


def _markers_of(style: AnswerStyle) -> tuple[str, ...]:
    """All that calls of a style are written with, each once."""
    by_style: Mapping[str, tuple[str, ...]] = {
        "hermes": (HERMES.opening, HERMES.closing),
        "deepseek": (*DEEPSEEK.ignored, DEEPSEEK.opening, DEEPSEEK.closing, DEEPSEEK_SEPARATOR),
        "kimi": (*KIMI.ignored, KIMI.opening, KIMI.closing, KIMI_ARGUMENTS),
        "glm": (GLM.opening, GLM.closing, GLM.key, GLM.key_end, GLM.value, GLM.value_end),
        "qwen3_coder": (QWEN_CODER.opening, QWEN_CODER.closing),
    }
    return by_style.get(style.tools, ())


def _literal(text: str) -> str:
    """In Lark a string is written as in JSON."""
    return json.dumps(text, ensure_ascii=False)
