"""Fields that say what form an answer must have: one grammar, or an error that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeserve.core import Grammar, GrammarKind
from moeserve.errors import InvalidRequestError
from moeserve.gateway.limits import ModelLimits, sampling_params
from moeserve.gateway.openai.structured import grammar_of

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"é":{"type":"integer"}}}'
OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')
TAG = {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}
TAGS = {"structures": [TAG], "triggers": ["<f"]}
MODEL = ModelLimits(vocab_size=100, max_len=64)


def json_grammar(whitespace: str | None = None) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, TEXT, whitespace)


def named(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}


SAID: list[tuple[dict[str, Any], Grammar | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"json": None}}, None),
    ({"guided_decoding_backend": "xgrammar"}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"guided_json_object": True}, OBJECT),
    ({"response_format": named(strict=True, description="d")}, json_grammar()),
    ({"response_format": named(strict=False)}, json_grammar()),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, OBJECT),
    ({"structured_outputs": {"json": SCHEMA}}, json_grammar()),
    ({"structured_outputs": {"json": json.dumps(SCHEMA, indent=4)}}, json_grammar()),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, json_grammar("")),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, json_grammar(" ?")),
    ({"guided_json": SCHEMA}, json_grammar()),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]?"}, json_grammar("[ ]?")),
    ({"structured_outputs": {"regex": "a+"}}, Grammar(GrammarKind.REGEX, "a+")),
    ({"guided_regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
    ({"structured_outputs": {"choice": ["a", "b", "a"]}}, Grammar(GrammarKind.CHOICE, '["a","b"]')),
    ({"guided_choice": ["é"]}, Grammar(GrammarKind.CHOICE, '["é"]')),
    ({"structured_outputs": {"grammar": "start: A"}}, Grammar(GrammarKind.LARK, "start: A")),
    ({"guided_grammar": "root ::= x"}, Grammar(GrammarKind.LARK, "root ::= x")),
    (
        {"response_format": {"type": "structural_tag", **TAGS}},
        Grammar(
            GrammarKind.STRUCTURAL_TAG,
            json.dumps(TAGS, ensure_ascii=False, separators=(",", ":")),
        ),
    ),
    (
        {"structured_outputs": {"structural_tag": json.dumps(TAGS)}},
        Grammar(
            GrammarKind.STRUCTURAL_TAG,
            json.dumps(TAGS, ensure_ascii=False, separators=(",", ":")),
        ),
    ),
]


@pytest.mark.parametrize(("body", "grammar"), SAID, ids=lambda x: str(x)[:40])
def test_every_way_to_say_it_is_one_grammar(body: dict[str, Any], grammar: Grammar | None) -> None:
    assert grammar_of(body) == grammar


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"schema": {}}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": named(strict="yes")}, "response_format.json_schema.strict"),
    ({"response_format": named(extra=1)}, "response_format.json_schema"),
    ({"response_format": named(schema=7)}, "response_format.json_schema.schema"),
    ({"response_format": named(schema="{")}, "response_format.json_schema.schema"),
    ({"structured_outputs": {"yaml": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.*"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.*"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.structures"),
    (
        {"response_format": {"type": "structural_tag", **TAGS, "triggers": ["x"]}},
        "response_format.structures[0]",
    ),
    ({"guided_regex": "a", "guided_json": {}}, "guided_*"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_*"),
    ({"guided_regex": 7}, "guided_regex"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda x: str(x)[:40])
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        grammar_of(body)
    assert refused.value.param == param
    assert len(refused.value.message) < 300


def test_the_size_of_a_grammar_is_bounded() -> None:
    most = Grammar(GrammarKind.REGEX, "é" * (128 * 1024))
    assert sampling_params({"grammar": most}, MODEL).grammar == most
    for more in (
        Grammar(GrammarKind.REGEX, "é" * (128 * 1024) + "x"),
        Grammar(GrammarKind.JSON_SCHEMA, "{}", "x" * 257),
        Grammar(GrammarKind.REGEX, "\ud800"),
        Grammar(GrammarKind.REGEX, ""),
        "a+",
    ):
        with pytest.raises(InvalidRequestError, match="grammar"):
            sampling_params({"grammar": more}, MODEL)


def test_an_answer_in_a_given_form_has_an_end() -> None:
    given = {"grammar": OBJECT, "ignore_eos": True}
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        sampling_params(given, MODEL)
