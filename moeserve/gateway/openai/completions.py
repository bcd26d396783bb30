"""Bodies of ``/v1/completions``."""

from __future__ import annotations

from dataclasses import replace

from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.fields import (
    COMMON,
    AnswerFormat,
    Echo,
    common,
    flag,
    refuse,
    refuse_others,
)
from moeserve.gateway.openai.structured import STRUCTURED_FIELDS, grammar_of
from moeserve.gateway.service import ClientRequest

FIELDS = COMMON | STRUCTURED_FIELDS | {"prompt", "echo", "best_of", "resume_from_token"}


def parse_completion(body: Body) -> tuple[ClientRequest, AnswerFormat]:
    wanted, form = common(body, chat=False, ignored=refuse_others(body, FIELDS))
    if "prompt" not in body:
        refuse("prompt", "missing: send a string, token ids, or a list of either")
    resumed = limits.RESUME.check("resume_from_token", body.get("resume_from_token", 0))
    wanted = replace(wanted, prompts=_prompts(body["prompt"]), resume_from=resumed)
    params = dict(wanted.params)
    if "logprobs" in body:
        params["logprobs"] = body["logprobs"]
    if (grammar := grammar_of(body)) is not None:
        params["grammar"] = grammar
    if flag(body, "echo"):
        params, form = _with_echo(params, form)
    wanted = replace(wanted, params=params)
    return _with_best_of(body["best_of"], wanted, form) if "best_of" in body else (wanted, form)


def _with_echo(
    params: dict[str, object], form: AnswerFormat
) -> tuple[dict[str, object], AnswerFormat]:
    """The prompt's log-probabilities are as many as the answer's, where these are wanted."""
    wanted = params.get("logprobs")
    if limits.asks_prompt_alone(params, echo=True):
        params = limits.prompt_alone(params)
    if wanted is None:
        return params, replace(form, echo=Echo())
    count = limits.BOUNDS["logprobs"].check("logprobs", wanted)
    more = params.get("prompt_logprobs", 0)
    most = max(count, limits.BOUNDS["prompt_logprobs"].check("prompt_logprobs", more))
    return params | {"prompt_logprobs": most}, replace(form, echo=Echo(count))


def _with_best_of(
    value: object, wanted: ClientRequest, form: AnswerFormat
) -> tuple[ClientRequest, AnswerFormat]:
    """More sequences than are shown, each with its log-probability."""
    try:
        made = limits.BOUNDS["n"].check("best_of", value)
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param="best_of") from error
    n = limits.BOUNDS["n"].check("n", wanted.n)
    if made < n:
        refuse("best_of", f"{made} are made and n={n} wanted: best_of is at least n")
    if made == n:
        return wanted, form
    if form.stream:
        refuse("best_of", "is known at the end: leave stream out")
    params = {"logprobs": 0} | dict(wanted.params)
    return replace(wanted, n=made, params=params), replace(form, best=n)


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
