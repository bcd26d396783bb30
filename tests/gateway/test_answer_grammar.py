"""What a grammar lets a model write is what the parsers read back as the calls asked for."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moeserve.gateway.parsers.answer import ParsedAnswer
from moeserve.gateway.parsers.answer_grammar import AnswerShape, answer_grammar
from moeserve.gateway.parsers.styles import AnswerStyle, open_parser

END = "<|im_end|>"
STYLES = {
    "hermes": AnswerStyle("hermes", "think"),
    "qwen3_coder": AnswerStyle("qwen3_coder", "none"),
    "glm": AnswerStyle("glm", "think"),
    "deepseek": AnswerStyle("deepseek", "think", fenced=True),
    "deepseek_v31": AnswerStyle("deepseek", "think"),
    "kimi": AnswerStyle("kimi", "none"),
    "harmony": AnswerStyle("harmony", "harmony"),
}
THINK = ["<think>", "</think>"]
TOKENS = {
    "hermes": ["<tool_call>", "</tool_call>", *THINK],
    "qwen3_coder": ["<tool_call>", "</tool_call>"],
    "glm": [
        *"<tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>".split(),
        *THINK,
    ],
    "deepseek": [
        *"<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜>".split(),
        *"<｜tool▁call▁end｜> <｜tool▁sep｜>".split(),
        *THINK,
    ],
    "kimi": [
        *"<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|>".split(),
        *"<|tool_call_end|> <|tool_call_argument_begin|>".split(),
    ],
    "harmony": "<|start|> <|channel|> <|message|> <|constrain|> <|end|> <|call|>".split(),
}
TOKENS["deepseek_v31"] = TOKENS["deepseek"]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
SCHEMAS = {"weather": WEATHER["function"]["parameters"]["properties"], "clock": {}}
each_style = pytest.mark.parametrize("name", STYLES)


def tokenizer_of(name: str) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    inner.add_tokens([AddedToken(m, normalized=False) for m in TOKENS[name]])
    return inner


class Writer:
    """A model that writes at random what a grammar allows."""

    def __init__(self, name: str, shape: AnswerShape) -> None:
        self.name = name
        self._inner = tokenizer_of(name)
        grammar = answer_grammar(STYLES[name], shape, self._inner.token_to_id)
        assert grammar is not None
        self._end = self._inner.token_to_id(END)
        own = LLTokenizer(self._inner.to_str(), eos_token=[self._end])
        self._matcher = LLMatcher(own, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def allowed(self) -> list[int]:
        mask = self._matcher.compute_bitmask()
        assert not self._matcher.is_error(), self._matcher.get_error()
        return [t for t in range(self._inner.get_vocab_size()) if mask[t // 8] >> t % 8 & 1]

    def accepts(self, text: str) -> bool:
        """Whether the grammar allows the text, and its end after it."""
        for token in self._inner.encode(text, add_special_tokens=False).ids:
            if token not in self.allowed():
                return False
            assert self._matcher.consume_token(token)
        return self._end in self.allowed()

    def writes(self, seed: int, most: int = 3000) -> str:
        """Markers and ends are chosen often, so that it comes to an end; ASCII, for the rest."""
        draw = random.Random(seed)
        made: list[int] = []
        first_marker = self._end + 1
        while len(made) < most:
            allowed = self.allowed()
            if allowed == [self._end] or (self._end in allowed and draw.random() < 0.6):
                return self._inner.decode(made, skip_special_tokens=False)
            telling = [t for t in allowed if t >= first_marker or chr_of(self._inner, t) in '"}']
            plain = [t for t in allowed if t < self._end and chr_of(self._inner, t).isascii()]
            pool = telling if telling and draw.random() < 0.4 else plain or telling
            ending = self._inner.encode("\n</parameter>") if draw.random() < 0.1 else None
            for token in ending.ids if ending else [draw.choice(pool)]:
                if token in self.allowed():  # a value ends with a text that chance never writes
                    assert self._matcher.consume_token(token)
                    made.append(token)
        pytest.fail(f"no end after {most} tokens")

    def read(self, text: str) -> ParsedAnswer:
        answer = ParsedAnswer(open_parser(STYLES[self.name], SCHEMAS), "id")
        answer.take(text, last=True)
        return answer


def chr_of(inner: Tokenizer, token: int) -> str:
    return inner.decode([token], skip_special_tokens=False)


@each_style
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_written_is_calls_of_the_tools(name: str, seed: int) -> None:
    writer = Writer(name, AnswerShape(tools=(WEATHER, CLOCK)))
    text = writer.writes(seed)
    answer = writer.read(text)
    assert answer.content == "", text
    assert answer.calls, text
    for call in answer.calls:
        arguments = json.loads("".join(call.arguments))
        if call.name == "weather":
            assert isinstance(arguments["city"], str), text
            assert isinstance(arguments["days"], int), text
            assert arguments.keys() <= {"city", "days", "unit"}
        else:
            assert (call.name, type(arguments)) == ("clock", dict)


@each_style
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_call_of_the_named_tool_without_parallel_calls(name: str, seed: int) -> None:
    writer = Writer(name, AnswerShape(tools=(CLOCK,), parallel=False))
    assert [call.name for call in writer.read(writer.writes(seed)).calls] == ["clock"]


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 3}}\n'
    "</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    'weather\n```json\n{"city": "Bern", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Bern", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    '<|tool_call_argument_begin|>{"city": "Bern", "days": 3}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.weather <|constrain|>json<|message|>{"city": "Bern", "days": 3}',
}


@each_style
def test_calls_as_the_templates_write_them_are_allowed(name: str) -> None:
    shape = AnswerShape(tools=(WEATHER, CLOCK))
    assert Writer(name, shape).accepts(WRITTEN[name])
    assert not Writer(name, shape).accepts("Just text.")
    if STYLES[name].reasoning == "think":
        assert Writer(name, shape).accepts("<think>\nHm.\n</think>\n\n" + WRITTEN[name])
        opened = AnswerShape(tools=(WEATHER,), inside=True)
        assert Writer(name, opened).accepts("Hm.\n</think>\n\n" + WRITTEN[name])


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("inside", [False, True])
def test_reasoning_ends_at_its_budget(budget: int, inside: bool) -> None:
    shape = AnswerShape(budget=budget, inside=inside)
    opening = "" if inside else "<think>"
    for thought in ("x" * budget, "x" * (budget + 1)):
        text = f"{opening}{thought}</think>\n\nYes. <tool_call>"
        assert Writer("hermes", shape).accepts(text) == (len(thought) == budget)
    assert not Writer("hermes", shape).accepts(opening + "x" * (budget + 1))


def test_harmonys_reasoning_ends_at_its_budget() -> None:
    rest = "<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    for thought in ("x" * 7, "x" * 8):
        text = f"<|channel|>analysis<|message|>{thought}{rest}"
        assert Writer("harmony", AnswerShape(budget=7)).accepts(text) == (len(thought) == 7)


def test_an_answer_may_be_short_of_its_budget_or_not_reason_at_all() -> None:
    for text in ("<think>a</think>Yes.", "Yes.", WRITTEN["hermes"]):
        assert Writer("hermes", AnswerShape(budget=7)).accepts(text)


def test_a_form_of_the_answer_begins_behind_the_reasoning() -> None:
    body = '%json {"type": "boolean"}'
    for text, allowed in (("true", True), ("<think>Hm.</think>\n\ntrue", True), ("Hm.", False)):
        assert Writer("hermes", AnswerShape(body=body)).accepts(text) == allowed
    final = "<|channel|>final<|message|>true"
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for text, allowed in ((final, True), (thought + final, True), ("true", False)):
        assert Writer("harmony", AnswerShape(body=body)).accepts(text) == allowed


def test_where_any_answer_will_do_there_is_no_grammar() -> None:
    assert answer_grammar(STYLES["hermes"], AnswerShape(), lambda _: None) is None
    assert answer_grammar(STYLES["kimi"], AnswerShape(budget=3), lambda _: None) is None


def test_markers_that_are_no_tokens_are_text() -> None:
    shape = AnswerShape(tools=(CLOCK,), parallel=False)
    grammar = answer_grammar(AnswerStyle("hermes"), shape, lambda _: None)
    inner = tokenizer_of("kimi")
    own = LLTokenizer(inner.to_str(), eos_token=[inner.token_to_id(END)])
    matcher = LLMatcher(own, LLMatcher.grammar_from_lark(grammar), log_level=0)
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    for token in inner.encode(text, add_special_tokens=False).ids:
        assert matcher.consume_token(token)
    assert matcher.is_accepting()
