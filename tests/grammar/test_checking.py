"""A grammar is refused before its request is queued, whatever it does to whoever compiles it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from moeserve.core import Grammar, GrammarKind
from moeserve.errors import InvalidRequestError, TokenizerError, UnavailableError
from moeserve.grammar.checking import GrammarChecker
from moeserve.grammar.worker import Vocabulary
from moeserve.models.library import resolve_model

VOCABULARY = Vocabulary(resolve_model("demo") / "tokenizer.json", 4096, (0,))
HONEST = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def schema(**keys: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(keys))


def tags(begin: str, schema: dict[str, object], end: str, trigger: str) -> Grammar:
    given = {"structures": [{"begin": begin, "schema": schema, "end": end}], "triggers": [trigger]}
    return Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(given))


USABLE = (
    HONEST,
    Grammar(GrammarKind.REGEX, "^[0-9]{3}$"),
    Grammar(GrammarKind.REGEX, "((a{1,50}){1,50}){1,50}"),  # slow to match, not to begin
    Grammar(GrammarKind.CHOICE, '["a","\\n","\\"","é"]'),
    Grammar(GrammarKind.LARK, 'start: "a" | start start'),
    Grammar(GrammarKind.LARK, 'root ::= "a" | "b" root'),
    tags("<function=f>", {"type": "object"}, "</function>", "<function="),
    Grammar(GrammarKind.JSON_SCHEMA, "{}", r"[ ]?"),
    schema(type="object", properties={"a": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": {}}}),
)
REFUSED = (
    Grammar(GrammarKind.REGEX, "("),
    Grammar(GrammarKind.REGEX, "(?=a)b"),
    Grammar(GrammarKind.REGEX, "(" * 3000 + "a" + ")" * 3000),
    Grammar(GrammarKind.LARK, "nonsense"),
    Grammar(GrammarKind.LARK, "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    Grammar(GrammarKind.CHOICE, "{"),
    Grammar(GrammarKind.STRUCTURAL_TAG, "{}"),
    Grammar(GrammarKind.STRUCTURAL_TAG, '{"structures": [], "triggers": []}'),
    Grammar(GrammarKind.JSON_SCHEMA, "[" * 3000 + "]" * 3000),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type":"array","items":' * 3000 + "{}" + "}" * 3000),
    Grammar(GrammarKind.JSON_SCHEMA, "{}", "("),
    schema(type="nonsense"),
    schema(uniqueItems=True),
    schema(uniqueItems=True, **{"x-guidance": {"lenient": True}}),
    schema(**{"$ref": "http://example.com/schema.json"}),
)
KILLED = (
    schema(enum=[f"value number {i}" for i in range(200_000)]),
    schema(allOf=[{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 40)]),
    Grammar(GrammarKind.LARK, "start: " + '"a"? ' * 20_000),
)


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(VOCABULARY)
    yield checker
    checker.close()


@pytest.mark.long
@pytest.mark.parametrize("grammar", USABLE, ids=lambda g: g.text[:20])
def test_what_can_be_followed_passes(checker: GrammarChecker, grammar: Grammar) -> None:
    checker.check(grammar)
    assert checker.known(grammar)


@pytest.mark.long
@pytest.mark.parametrize("grammar", REFUSED, ids=lambda g: g.text[:20])
def test_what_cannot_is_refused_and_costs_no_worker(
    checker: GrammarChecker, grammar: Grammar
) -> None:
    checker.check(HONEST)
    before = checker.workers
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="the grammar cannot be used: ") as refused:
            checker.check(grammar)
        assert len(refused.value.message) < 500
        assert refused.value.param == "grammar"
    assert checker.workers == before
    assert not checker.known(grammar)


@pytest.mark.long
@pytest.mark.parametrize("grammar", KILLED, ids=lambda g: g.text[:20])
def test_what_takes_too_much_ends_its_worker_once_and_the_next_is_served(
    checker: GrammarChecker, grammar: Grammar
) -> None:
    checker.check(HONEST)
    before = checker.workers
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="more time or memory"):
            checker.check(grammar)
    checker.check(schema(type="integer", minimum=before))
    assert checker.workers == before + 1


def test_without_a_tokenizer_there_are_no_grammars() -> None:
    with pytest.raises(TokenizerError, match="grammars need both"):
        GrammarChecker().check(HONEST)


@pytest.mark.long
def test_a_file_that_is_no_tokenizer_is_not_the_grammars_fault(tmp_path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    checker = GrammarChecker(Vocabulary(file, 4096, (0,)))
    with pytest.raises(UnavailableError, match="the grammar worker ended"):
        checker.check(HONEST)
    checker.close()
