"""What a body says about the form of its answer, as one ``core.Grammar``.

OpenAI's ``response_format``, vLLM's ``structured_outputs`` and its older ``guided_*`` fields say
the same in three ways; a body has one of them. A schema is written as JSON again, so that grammars
which mean the same are equal. Here fields are told apart; ``limits`` bounds what is in them, and
whether it is a grammar at all says who compiles it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from moeserve.core import Grammar, GrammarKind
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.fields import mapping, refuse

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}
# The names of everything that is read here. The backend is ours to choose: its name is accepted.
STRUCTURED_FIELDS = frozenset(
    [
        "response_format",
        "structured_outputs",
        "guided_whitespace_pattern",
        "guided_decoding_backend",
        *_GUIDED,
    ]
)
ANY_OBJECT = '{"type":"object"}'


def grammar_of(body: Body) -> Grammar | None:
    """None where any text will do. InvalidRequestError names the field that is wrong."""
    asked = {
        "response_format": _response_format(body),
        "structured_outputs": _structured_outputs(body),
        "guided_*": _guided(body),
    }
    found = {name: grammar for name, grammar in asked.items() if grammar is not None}
    if len(found) > 1:
        refuse(min(found), f"the form of the answer is given twice: {', '.join(sorted(found))}")
    return next(iter(found.values()), None)


def schema_grammar(schema: object, name: str, whitespace: str | None = None) -> Grammar:
    """The JSON documents of a schema, given as JSON or as its text; ``name`` is the field's."""
    found = _object(schema, name, "a JSON Schema, which is an object")
    return Grammar(GrammarKind.JSON_SCHEMA, _compact(found, name), whitespace)


def _response_format(body: Body) -> Grammar | None:
    name = "response_format"
    form = mapping(body, name)
    kind = form.get("type")
    if not form or kind == "text":
        _refuse_others(form, name, {"type"})
        return None
    if kind == "structural_tag":
        return _structural_tag({k: v for k, v in form.items() if k != "type"}, name)
    if kind == "json_object":
        _refuse_others(form, name, {"type"})
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)
    if kind != "json_schema":
        expected = "text, json_object, json_schema or structural_tag"
        refuse(f"{name}.type", f"{kind!a:.60}: expected {expected}")
    _refuse_others(form, name, {"type", "json_schema"})
    return _named_schema(form.get("json_schema"), f"{name}.json_schema")


def _named_schema(given: object, name: str) -> Grammar:
    """``name``, ``description`` and ``strict`` change nothing: the schema always holds."""
    if not isinstance(given, dict):
        refuse(name, "expected an object with name and schema")
    _refuse_others(given, name, {"name", "description", "strict", "schema"})
    if not isinstance(given.get("strict"), bool | None):
        refuse(f"{name}.strict", "expected true or false")
    schema = given.get("schema")
    return schema_grammar({"type": "object"} if schema is None else schema, f"{name}.schema")


def _structured_outputs(body: Body) -> Grammar | None:
    name = "structured_outputs"
    given = {k: v for k, v in mapping(body, name).items() if v is not None}
    if not given:
        return None
    _refuse_others(given, name, {*_KINDS, "disable_any_whitespace", "whitespace_pattern"})
    whitespace = _whitespace(given.get("whitespace_pattern"), f"{name}.whitespace_pattern")
    dense = given.get("disable_any_whitespace", False)
    if not isinstance(dense, bool):
        refuse(f"{name}.disable_any_whitespace", "expected true or false")
    return _one_of(given, f"{name}.", "" if dense else whitespace)


def _guided(body: Body) -> Grammar | None:
    given = {kind: body[name] for name, kind in _GUIDED.items() if body.get(name) is not None}
    pattern = body.get("guided_whitespace_pattern")
    whitespace = _whitespace(pattern, "guided_whitespace_pattern")
    return _one_of(given, "guided_", whitespace) if given else None


def _one_of(given: Mapping[str, object], prefix: str, whitespace: str | None) -> Grammar | None:
    kinds = [kind for kind in _KINDS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        refuse(f"{prefix}*", f"expected exactly one of {', '.join(_KINDS)}; {len(kinds)} are given")
    return _KINDS[kinds[0]](given[kinds[0]], prefix + kinds[0], whitespace)


def _json(value: object, name: str, whitespace: str | None) -> Grammar:
    return schema_grammar(value, name, whitespace)


def _json_object(value: object, name: str, whitespace: str | None) -> Grammar:
    if value is not True:
        refuse(name, "expected true or false")
    return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT, whitespace)


def _regex(value: object, name: str, whitespace: str | None) -> Grammar:
    return Grammar(GrammarKind.REGEX, _text(value, name))


def _lark(value: object, name: str, whitespace: str | None) -> Grammar:
    return Grammar(GrammarKind.LARK, _text(value, name))


def _choice(value: object, name: str, whitespace: str | None) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        refuse(name, "expected a list of at least one string")
    if not all(value):
        refuse(name, "a choice is empty: give each at least one character")
    return Grammar(GrammarKind.CHOICE, _compact(list(dict.fromkeys(value)), name))


def _tags(value: object, name: str, whitespace: str | None) -> Grammar:
    found = _object(value, name, "an object with structures and triggers")
    return _structural_tag({k: v for k, v in found.items() if k != "type"}, name)


def _structural_tag(given: Mapping[str, object], name: str) -> Grammar:
    """vLLM's first form: ``begin``, ``schema`` and ``end`` of each structure."""
    _refuse_others(given, name, {"structures", "triggers"})
    structures, triggers = given.get("structures"), given.get("triggers")
    if not isinstance(structures, list) or not structures:
        refuse(f"{name}.structures", "expected a list of at least one object")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        refuse(f"{name}.triggers", "expected a list of strings")
    for i, one in enumerate(structures):
        where = f"{name}.structures[{i}]"
        if not isinstance(one, dict):
            refuse(where, "expected an object with begin, schema and end")
        _refuse_others(one, where, {"begin", "schema", "end"})
        begin, schema = one.get("begin"), one.get("schema")
        if not isinstance(begin, str) or not isinstance(one.get("end"), str):
            refuse(where, "begin and end are strings")
        if not isinstance(schema, dict):
            refuse(where, "schema is a JSON Schema, which is an object")
        if not begin.startswith(tuple(triggers)):
            refuse(where, f"begin={begin!a:.60} starts with none of the triggers")
    kept = {"structures": structures, "triggers": triggers}
    return Grammar(GrammarKind.STRUCTURAL_TAG, _compact(kept, name))


_KINDS: Mapping[str, Callable[[object, str, str | None], Grammar]] = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "structural_tag": _tags,
}


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        refuse(name, "expected a string of at least one character")
    return value


def _whitespace(value: object, name: str) -> str | None:
    return None if value is None else _text(value, name)


def _compact(value: object, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        refuse(name, "nested too deep")


def _object(value: object, name: str, expected: str) -> dict[str, object]:
    """Given as JSON or as its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            refuse(name, f"not JSON ({error})"[:200])
    if not isinstance(value, dict):
        refuse(name, f"expected {expected}")
    return value


def _refuse_others(given: Mapping[str, object], name: str, known: set[str]) -> None:
    if unknown := given.keys() - known:
        refuse(name, f"unknown option {min(unknown)!a:.60}")
