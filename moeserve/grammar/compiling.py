"""A grammar, as ``core.Grammar`` has it, to a matcher of llguidance, within its limits.

Runs in the child alone: ``llguidance`` is imported here, and nowhere else.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from moeserve.core import Grammar, GrammarKind
from moeserve.grammar.json_options import json_options

# What one mask, and what compiling, may do; a state of a lexer takes 1 to 2 kB.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
LONGEST_REASON = 300


def matcher_of(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """At the beginning of an answer. ValueError says why there is none."""
    try:
        source = source_of(grammar, tokenizer)
    except (RecursionError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from error
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(reason_of(matcher))
    return matcher


def reason_of(matcher: LLMatcher) -> str:
    """Why it is in error, in short."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())[:LONGEST_REASON]


def source_of(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """As llguidance writes grammars."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            options: Any = json_options(grammar.whitespace)
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.CHOICE:
            choices = " | ".join(map(json.dumps, json.loads(grammar.text)))
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case GrammarKind.STRUCTURAL_TAG:
            return LLMatcher.grammar_from_lark(_tags(json.loads(grammar.text), tokenizer))
        case _:
            return LLMatcher.grammar_from_lark(_lark(grammar.text))


def _lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the library's own is a plain Exception
        raise ValueError(f"neither Lark nor GBNF: {error}"[:LONGEST_REASON]) from error


def _tags(given: Any, tokenizer: LLTokenizer) -> str:
    """Free text, with the structures that their triggers begin. A trigger is a special token where
    the tokenizer has it as one."""
    tags = []
    for one in given["structures"]:
        found = [t for t in given["triggers"] if one["begin"].startswith(t)]
        schema = {**one["schema"], "x-guidance": json_options(None)}
        longest = max(found, key=len)
        tags.append(StructTag(trigger=longest, begin=one["begin"], grammar=schema, end=one["end"]))
    special = all(_is_special(tag.trigger, tokenizer) for tag in tags)
    return StructTag.to_grammar(tags, assume_special=special)


def _is_special(text: str, tokenizer: LLTokenizer) -> bool:
    ids = tokenizer.tokenize_str(text, parse_special=True)
    return len(ids) == 1 and tokenizer.is_special_token(ids[0])
