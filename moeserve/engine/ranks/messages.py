"""Requests and events as protobuf, between a door's process and a rank's.

Writers raise ValueError where a value has no place in a message. Readers raise InvalidRequestError,
which names what came, for bytes that are no message and for values that mean nothing here.

Every field survives, but for these: times go as what is left of them, seeds modulo 2**64, of which
the sampler uses no more; and what a door does by itself (stop strings and other text, how long a
request waited) stays there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from moeserve.core import (
    CacheScope,
    Event,
    FinishReason,
    Grammar,
    GrammarKind,
    Logprobs,
    Request,
    RequestId,
    SamplingParams,
)
from moeserve.engine.ranks.homes import ExpertUse
from moeserve.engine.sequence import History, KvSource
from moeserve.errors import InvalidRequestError
from moeserve.observe.spans import TRACE_CHARS
from moeserve.pb import rank_pb2 as pb

M = TypeVar("M", bound=Message)
# A logit of fp32 divided by less may be infinite, which is no logit.
_LEAST_DIVISOR = 1e-200
# Where the KV of a request can be had; more are never asked.
MOST_SOURCES = 8
# Of the name of a tenant.
TENANT_CHARS = 64


def parse(kind: type[M], content: bytes) -> M:
    """The message of these bytes."""
    try:
        return kind.FromString(content)
    except DecodeError as error:
        name = kind.DESCRIPTOR.name
        raise InvalidRequestError(f"{len(content)} bytes that are no {name}") from error


def write_submission(out: pb.Submission, request: Request, history: History, now: float) -> None:
    """``now`` is by the clock of its deadline."""
    out.id = request.id
    out.outputs.extend(history.output_ids)
    out.reached, out.moved = history.reached, history.moved
    for source in history.sources:
        out.sources.add(
            address=source.address, server_name=source.server_name, running=source.running
        )
    out.prompt.extend(request.prompt_ids)
    out.salt, out.adapter = request.scope.salt, request.scope.adapter
    out.domain, out.trace, out.priority = request.domain, request.trace, request.priority
    out.tenant = request.tenant
    if request.deadline is not None:
        out.timeout_s = max(0.0, request.deadline - now)
    _write_sampling(out.sampling, request.params)


def read_submission(
    submission: pb.Submission, now: float, vocab_size: int
) -> tuple[Request, History]:
    """The request by this process's clock, which says ``now``, and what it has made.

    A step that computes with a wrong number fails for all who are in it, so none comes in.
    """
    _require_numbers(submission, vocab_size)
    request = Request(
        RequestId(submission.id),
        tuple(submission.prompt),
        _read_sampling(submission.sampling),
        arrival=now,
        deadline=now + submission.timeout_s if submission.HasField("timeout_s") else None,
        scope=CacheScope(submission.salt, submission.adapter),
        domain=submission.domain,
        trace=submission.trace[:TRACE_CHARS],
        priority=submission.priority,
        tenant=submission.tenant[:TENANT_CHARS],
    )
    made = tuple(submission.outputs)
    if len(submission.sources) > MOST_SOURCES:
        raise InvalidRequestError(
            f"{len(submission.sources)} sources of KV: expected {MOST_SOURCES} at most"
        )
    sources = tuple(KvSource(s.address, s.server_name, s.running) for s in submission.sources)
    return request, History(made, submission.reached, submission.moved, sources)


def read_ending(ending: pb.Ending) -> tuple[RequestId, FinishReason]:
    return RequestId(ending.id), _read_reason(ending.reason)


def _read_reason(value: str) -> FinishReason:
    try:
        return FinishReason(value)
    except ValueError as error:
        raise InvalidRequestError(f"{value[:40]!r} is no reason to end a request") from error


def _require_numbers(submission: pb.Submission, vocab_size: int) -> None:
    s = submission.sampling
    numbers = {
        "temperature": s.temperature >= 0,
        "top_p": s.top_p > 0,
        "min_p": s.min_p >= 0,
        "repetition_penalty": s.repetition_penalty >= _LEAST_DIVISOR,
        "presence_penalty": True,
        "frequency_penalty": True,
    }
    for name, sound in numbers.items():
        value = getattr(s, name)
        if not (sound and math.isfinite(value)):
            raise InvalidRequestError(f"{name}={value} cannot be computed with", param=name)
    if len(s.bias_ids) != len(s.biases) or not all(map(math.isfinite, s.biases)):
        raise InvalidRequestError(
            f"logit_bias: {len(s.biases)} finite numbers are needed for {len(s.bias_ids)} tokens",
            param="logit_bias",
        )
    if not 0 <= submission.timeout_s < math.inf:
        raise InvalidRequestError(f"timeout_s={submission.timeout_s} is no time", param="timeout")
    lists = [submission.prompt, submission.outputs, s.bias_ids, s.stop_token_ids]
    for ids in (*lists, s.allowed_token_ids, *(bad.ids for bad in s.bad_token_ids)):
        if (largest := max(ids, default=0)) >= vocab_size:
            raise InvalidRequestError(f"token {largest}: the model has {vocab_size}")
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(s, name)) > vocab_size:
            raise InvalidRequestError(
                f"{name}={count}: the model has {vocab_size} tokens", param=name
            )
    if not all(bad.ids for bad in s.bad_token_ids):
        raise InvalidRequestError("bad_token_ids: a sequence without tokens", param="bad_words")


def _read_sampling(s: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=tuple(zip(s.bias_ids, s.biases, strict=True)),
        seed=s.seed,
        stop_token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
        prompt_logprobs=s.prompt_logprobs if s.HasField("prompt_logprobs") else None,
        allowed_token_ids=tuple(s.allowed_token_ids),
        bad_token_ids=tuple(tuple(bad.ids) for bad in s.bad_token_ids),
        grammar=_read_grammar(s.grammar) if s.HasField("grammar") else None,
    )


def _read_grammar(g: pb.Grammar) -> Grammar:
    if g.kind not in set(GrammarKind):
        raise InvalidRequestError(f"{g.kind[:40]!r} is no kind of grammar", param="grammar")
    return Grammar(GrammarKind(g.kind), g.text, g.whitespace if g.HasField("whitespace") else None)


def _write_sampling(out: pb.Sampling, params: SamplingParams) -> None:
    out.max_tokens = params.max_tokens
    out.min_tokens = params.min_tokens
    out.temperature = params.temperature
    out.top_k = params.top_k
    out.top_p = params.top_p
    out.min_p = params.min_p
    out.repetition_penalty = params.repetition_penalty
    out.presence_penalty = params.presence_penalty
    out.frequency_penalty = params.frequency_penalty
    out.bias_ids.extend([i for i, _ in params.logit_bias])
    out.biases.extend([bias for _, bias in params.logit_bias])
    out.seed = params.seed & (2**64 - 1)
    out.stop_token_ids.extend(params.stop_token_ids)
    out.ignore_eos = params.ignore_eos
    if params.logprobs is not None:
        out.logprobs = params.logprobs
    if params.prompt_logprobs is not None:
        out.prompt_logprobs = params.prompt_logprobs
    out.allowed_token_ids.extend(params.allowed_token_ids)
    out.bad_token_ids.extend([pb.BadTokens(ids=bad) for bad in params.bad_token_ids])
    if params.grammar is not None:
        out.grammar.kind, out.grammar.text = params.grammar.kind.value, params.grammar.text
        if params.grammar.whitespace is not None:
            out.grammar.whitespace = params.grammar.whitespace


def write_news(out: pb.News, event: Event) -> None:
    out.id = event.request_id
    out.tokens.extend(event.token_ids)
    out.scores.extend(map(_scores_of, event.logprobs))
    out.prompt_scores.extend(map(_scores_of, event.prompt_logprobs))
    if event.finish is not None:
        out.finish, out.error = event.finish.value, event.error
    out.cached_tokens = event.cached_tokens


def read_news(news: pb.News) -> Event:
    for scores in (*news.scores, *news.prompt_scores):
        if len(scores.top_ids) != len(scores.top):
            raise InvalidRequestError(
                f"{len(scores.top)} log-probabilities of {len(scores.top_ids)} tokens"
            )
    return Event(
        request_id=RequestId(news.id),
        token_ids=tuple(news.tokens),
        logprobs=tuple(map(_logprobs_of, news.scores)),
        finish=_read_reason(news.finish) if news.finish else None,
        error=news.error,
        cached_tokens=news.cached_tokens,
        prompt_logprobs=tuple(map(_logprobs_of, news.prompt_scores)),
    )


def _scores_of(logprobs: Logprobs) -> pb.Scores:
    ids, values = zip(*logprobs.top, strict=True) if logprobs.top else ((), ())
    return pb.Scores(chosen=logprobs.chosen, top_ids=ids, top=values)


def _logprobs_of(scores: pb.Scores) -> Logprobs:
    return Logprobs(scores.chosen, tuple(zip(scores.top_ids, scores.top, strict=True)))


def write_uses(uses: Sequence[ExpertUse]) -> list[pb.Use]:
    return [pb.Use(kind=use.kind, tokens=use.tokens, ranks=use.use_R) for use in uses]


def read_use(use: pb.Use) -> ExpertUse:
    return ExpertUse(use.kind, use.tokens, tuple(use.ranks))
