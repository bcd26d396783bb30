"""Bodies of ``/v1/completions``."""

from __future__ import annotations

from dataclasses import replace

from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.fields import (
    COMMON,
    AnswerFormat,
    common,
    refuse,
    refuse_others,
)
from moeserve.gateway.openai.structured import STRUCTURED_FIELDS, grammar_of
from moeserve.gateway.service import ClientRequest

_FIELDS = COMMON | STRUCTURED_FIELDS | {"prompt"}


def parse_completion(body: Body) -> tuple[ClientRequest, AnswerFormat]:
    refuse_others(body, _FIELDS)
    wanted, form = common(body, chat=False)
    if "prompt" not in body:
        refuse("prompt", "missing: send a string, token ids, or a list of either")
    params = dict(wanted.params)
    if "logprobs" in body:
        params["logprobs"] = body["logprobs"]
    if (grammar := grammar_of(body)) is not None:
        params["grammar"] = grammar
    return replace(wanted, prompts=_prompts(body["prompt"]), params=params), form


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        refuse("prompt", "expected a string, token ids, or a list of either")
    if not value:
        refuse("prompt", "empty: send at least one")
    if all(type(item) is int for item in value):
        return (tuple(value),)
    if len(value) > limits.MAX_PROMPTS:
        refuse("prompt", f"{len(value)} prompts, at most {limits.MAX_PROMPTS}")
    for item in value:
        if not isinstance(item, str | list):
            refuse("prompt", "expected a string, token ids, or a list of either")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)
