"""A model's text becomes content, reasoning and calls, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.gateway.parsers.answer import ParsedAnswer
from moeserve.gateway.parsers.machine import MOST_BLANKS
from moeserve.gateway.parsers.parts import AnswerParser
from moeserve.gateway.parsers.styles import AnswerStyle, ToolStyle, open_parser, style_of

STYLES: tuple[ToolStyle, ...] = get_args(ToolStyle)
SCHEMAS = {"f": {"a": {"type": "string"}}}

# What texts are made of: whole markers, parts of them, and what stands between.
MARKERS = {
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', '"a": "', '"}}'],
    "deepseek": [
        *"<｜tool▁calls▁begin｜> <｜tool▁call▁begin｜>function<｜tool▁sep｜>".split(),
        "<｜tool▁sep｜>",
        *"<｜tool▁call▁end｜> <｜tool▁calls▁end｜> f g".split(),
        "\n```json\n{",
        "}\n```",
    ],
    "kimi": [
        *"<|tool_calls_section_begin|> <|tool_call_begin|>functions.f:0 <|tool_call_end|>".split(),
        "<|tool_call_argument_begin|>{",
        "<|tool_calls_section_end|>",
    ],
    "glm": [
        *"<tool_call>f </tool_call> <arg_key>a</arg_key> <arg_key>b</arg_key>".split(),
        *"<arg_value> </arg_value> [1 ] null".split(),
    ],
    "qwen3_coder": [
        *"<tool_call> </tool_call> <function=f> </function> <parameter=a> <parameter=b>".split(),
        *"</parameter> [1 ] null".split(),
    ],
    "harmony": [
        *"<|start|>assistant <|channel|>analysis <|channel|>final <|channel|>commentary".split(),
        *"to=functions.f <|constrain|>json <|message|> <|end|> <|call|> <|return|>".split(),
    ],
    "none": [],
}
BETWEEN = [
    "<think>",
    "</think>",
    "{",
    "}",
    '"',
    "\\",
    "[",
    "]",
    "\n",
    "  ",
    "<",
    "<|",
    "a",
    "é",
    ":1",
]


def styled(tools: ToolStyle) -> AnswerStyle:
    return AnswerStyle(tools, "harmony" if tools == "harmony" else "think")


@st.composite
def texts(draw: st.DrawFn) -> tuple[AnswerStyle, str, list[int]]:
    """A style, a text with its markers, and where the text is cut."""
    style = draw(st.sampled_from(STYLES))
    piece = st.one_of(st.sampled_from([*MARKERS[style], *BETWEEN]), st.text(max_size=3))
    text = "".join(draw(st.lists(piece, max_size=25)))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=12))
    return styled(style), text, sorted(cuts)


def read(parser: AnswerParser, *pieces: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and name and arguments of each call."""
    answer = ParsedAnswer(parser, "id")
    for piece in pieces:
        answer.take(piece, last=False)
    answer.take("", last=True)
    calls = [(call.name, "".join(call.arguments)) for call in answer.calls]
    return answer.content, answer.reasoning, calls


def whole(tools: ToolStyle, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    return read(open_parser(styled(tools), SCHEMAS), text)


@settings(deadline=None)
@given(texts())
def test_cuts_change_nothing_and_no_text_raises(case: tuple[AnswerStyle, str, list[int]]) -> None:
    style, text, cuts = case
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    once = read(open_parser(style, SCHEMAS), text)
    assert read(open_parser(style, SCHEMAS), *pieces) == once
    assert read(open_parser(style, SCHEMAS), *text) == once


@settings(deadline=None)
@given(st.sampled_from(STYLES), st.text(alphabet="ab \n{}\"'[]", max_size=400))
def test_a_text_without_markers_is_content_as_it_is(style: ToolStyle, text: str) -> None:
    assert whole(style, text) == (text, "", [])


@settings(deadline=None)
@given(st.sampled_from([s for s in STYLES if s != "harmony"]), st.text(max_size=200))
def test_without_tools_and_reasoning_nothing_is_read(style: ToolStyle, text: str) -> None:
    assert read(open_parser(AnswerStyle(style), None), text) == (text, "", [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), JSON, max_size=4)


def written(style: ToolStyle, name: str, arguments: dict[str, Any]) -> str:
    """A call as the models' templates write it."""
    text = json.dumps(arguments, ensure_ascii=False)
    match style:
        case "hermes":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>\n'
        case "deepseek":
            call = f"function<｜tool▁sep｜>{name}\n```json\n{text}\n```"
            return f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>\n"
        case "kimi":
            return (
                f"<|tool_call_begin|>functions.{name}:3<|tool_call_argument_begin|>{text}"
                "<|tool_call_end|>"
            )
        case _:
            return (
                f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}"
                "<|call|><|start|>assistant"
            )


@settings(deadline=None)
@given(
    st.sampled_from(["hermes", "deepseek", "kimi", "harmony"]),
    st.lists(st.tuples(st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True), OBJECTS), min_size=1),
)
def test_calls_come_back_as_they_were_written(
    style: Any, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    texts = [written(style, name, arguments) for name, arguments in calls]
    if style == "harmony" and any(text.count("<|") != 6 for text in texts):
        return  # a marker in a string: the model's tokenizer has no text for it
    content, reasoning, found = whole(style, "".join(texts))
    assert (content, reasoning) == ("", "")
    assert [(name, json.loads(text)) for name, text in found] == calls


TAG_VALUES = st.text(alphabet='ab {}"\\\n<é', max_size=20)


@settings(deadline=None)
@given(TAG_VALUES, JSON)
def test_tagged_values_are_strings_where_the_schema_says_so(text: str, value: Any) -> None:
    spelled = json.dumps(value, ensure_ascii=False)
    if "</" in spelled or "</" in text:
        return
    glm = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n"
    glm += f"<arg_key>b</arg_key>\n<arg_value>{spelled}</arg_value>\n</tool_call>"
    qwen = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n"
    qwen += f"<parameter=b>\n{spelled}\n</parameter>\n</function>\n</tool_call>"
    for style, written in (("glm", glm), ("qwen3_coder", qwen)):
        content, _, [(name, arguments)] = whole(style, written)  # type: ignore[arg-type]
        assert (content, name) == ("", "f")
        assert json.loads(arguments) == {"a": text, "b": value}


@pytest.mark.parametrize(
    ("style", "text", "calls"),
    [
        (
            "hermes",
            '<tool_call>{"arguments": {"q": 1}, "name": "g"}</tool_call>',
            [("g", '{"q": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>', [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "g", "arguments": {"q": 1}}', [("g", '{"q": 1}')]),
        ("hermes", '<tool_call>{"name": "g", "arguments": {"q": "1', [("g", '{"q": "1')]),
        (
            "deepseek",
            '<｜tool▁call▁begin｜>h<｜tool▁sep｜>{"b": 2}<｜tool▁call▁end｜>',
            [("h", '{"b": 2}')],
        ),
        ("glm", "<tool_call>now</tool_call>", [("now", "{}")]),
        ("glm", "<tool_call>now", [("now", "{}")]),
        (
            "harmony",
            "assistant to=functions.g<|channel|>commentary json<|message|>{}",
            [("g", "{}")],
        ),
    ],
)
def test_other_spellings_of_calls_are_read(
    style: ToolStyle, text: str, calls: list[tuple[str, str]]
) -> None:
    assert whole(style, text) == ("", "", calls)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", "<tool_call>nonsense</tool_call> and more"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("hermes", "<tool_call>" + '{"name": "f"' + " " * 600),
        ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>no json<｜tool▁call▁end｜>"),
        ("kimi", "<|tool_call_begin|>whatever{}"),
        ("glm", "<tool_call>two words</tool_call>"),
        ("qwen3_coder", "<tool_call>no function</tool_call>"),
        ("harmony", "no channel here < or | there"),
    ],
)
def test_what_is_no_call_is_content(style: ToolStyle, text: str) -> None:
    assert whole(style, text) == (text, "", [])


def test_calls_are_announced_before_their_arguments_are_whole() -> None:
    answer = ParsedAnswer(open_parser(styled("hermes"), SCHEMAS), "id")
    answer.take('<tool_call>{"name": "f", "arguments": {"a": "long', last=False)
    assert [(c.name, c.arguments) for c in answer.calls] == [("f", ['{"a": "long'])]
    glm = ParsedAnswer(open_parser(styled("glm"), SCHEMAS), "id")
    glm.take("<tool_call>f<arg_key>a</arg_key><arg_value>lo", last=False)
    assert "".join(glm.calls[0].arguments) == '{"a": "lo'


def test_reasoning_is_what_stands_between_its_markers() -> None:
    hermes = "<think>\nhm <tool_call>\n\n</think>\n\nYes.\n<tool_call>"
    content, reasoning, calls = whole(
        "hermes", hermes + '{"name": "f", "arguments": {}}</tool_call>'
    )
    assert (content, reasoning, calls) == ("Yes.", "hm <tool_call>", [("f", "{}")])
    harmony = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes"
    )
    assert whole("harmony", harmony) == ("Yes", "hm", [])


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    style = AnswerStyle("none", "think")
    inside = open_parser(style, None, "User: hi\nAssistant: <think>\n")
    assert read(inside, "hm</think>Yes") == ("Yes", "hm", [])
    closed = open_parser(style, None, "Assistant: <think>\n\n</think>\n\n")
    assert read(closed, "Yes, <think> is a tag") == ("Yes, <think> is a tag", "", [])
    assert read(open_parser(style, None, "<think>"), "never ends ") == ("", "never ends ", [])


def test_blanks_are_held_back_within_bounds() -> None:
    parser = open_parser(AnswerStyle("hermes"), SCHEMAS)
    shown = sum(len(part.text) for _ in range(5000) for part in parser.push(" "))  # type: ignore[union-attr]
    assert shown == 5000 - MOST_BLANKS
    assert sum(len(part.text) for part in parser.flush()) == MOST_BLANKS  # type: ignore[union-attr]


def test_many_blanks_before_a_text_are_content() -> None:
    for style in STYLES:
        assert whole(style, " " * 100 + "<think>") == (" " * 100 + "<think>", "", [])


def test_only_as_many_calls_are_kept_as_are_asked_for() -> None:
    answer = ParsedAnswer(open_parser(styled("hermes"), SCHEMAS), "id", most_calls=1)
    parts = answer.take(written("hermes", "f", {}) + written("hermes", "g", {}), last=True)
    assert [call.name for call in answer.calls] == ["f"]
    assert len(parts) == 2


def test_the_same_answer_gives_the_same_call_ids() -> None:
    first, again, other = (
        ParsedAnswer(open_parser(styled("hermes"), SCHEMAS), seed) for seed in ("a", "a", "b")
    )
    for answer in (first, again, other):
        answer.take(written("hermes", "f", {}), last=True)
    ids = [answer.calls[0].call_id for answer in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    kimi = ParsedAnswer(open_parser(styled("kimi"), SCHEMAS), "a")
    kimi.take(written("kimi", "f", {}), last=True)
    assert kimi.calls[0].call_id == "functions.f:3"


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (None, "none", "none"),
        ("{{ messages }}", "none", "none"),
        ("'<tool_call>\\n{\"name\": ' ... '</think>'", "hermes", "think"),
        ("'<tool_call>' '<function=' '<parameter='", "qwen3_coder", "none"),
        ("'<tool_call>' '<arg_key>' '</think>'", "glm", "think"),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' '</think>'", "deepseek", "think"),
        ("'<|tool_calls_section_begin|><|tool_call_begin|>'", "kimi", "none"),
        ("'<|start|>assistant<|channel|>final<|message|>'", "harmony", "harmony"),
    ],
)
def test_a_template_tells_the_style(template: str | None, tools: str, reasoning: str) -> None:
    style = style_of(template)
    assert (style.tools, style.reasoning) == (tools, reasoning)
    told = style_of(template, "kimi", "none")
    assert (told.tools, told.reasoning) == ("kimi", "none")
