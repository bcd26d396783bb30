"""What crosses from a door to a rank and back is what was sent, and nothing else gets in."""

from __future__ import annotations

import contextlib
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from moeserve.engine.ranks.messages import (
    parse,
    read_ending,
    read_news,
    read_submission,
    read_use,
    write_news,
    write_submission,
    write_uses,
)
from moeserve.engine.sequence import History, KvSource
from moeserve.errors import InvalidRequestError
from moeserve.pb import rank_pb2 as pb

VOCAB = 50_000

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
tokens = st.integers(0, VOCAB - 1)
token_lists = st.lists(tokens, max_size=20).map(tuple)
counts = st.integers(0, 2**31 - 1)


def reals(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, **more)


# What a door does by itself does not cross: its defaults stand on the other side.
DOORS_OWN = ("stop", "include_stop", "skip_special_tokens", "only_prompt")
params = st.builds(
    SamplingParams,
    max_tokens=counts,
    min_tokens=counts,
    temperature=reals(0, 2),
    top_k=counts,
    top_p=reals(0, 1, exclude_min=True),
    min_p=reals(0, 1),
    repetition_penalty=reals(0.01, 2),
    presence_penalty=reals(-2, 2),
    frequency_penalty=reals(-2, 2),
    logit_bias=st.lists(st.tuples(tokens, reals(-100, 100)), max_size=5).map(tuple),
    seed=st.integers(-(2**63), 2**64 - 1),
    stop_token_ids=token_lists,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    allowed_token_ids=token_lists,
    bad_token_ids=st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=3).map(
        tuple
    ),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), texts, st.none() | texts),
)
requests = st.builds(
    Request,
    id=texts.map(RequestId),
    prompt_ids=token_lists,
    params=params,
    deadline=st.none() | reals(0, 1e6),
    scope=st.builds(CacheScope, texts, texts),
    domain=texts,
    priority=st.integers(-(2**31), 2**31 - 1),
    tenant=st.text(max_size=64),
)
sources = st.lists(st.builds(KvSource, st.text(max_size=9), st.text(max_size=9)), max_size=3)
histories = st.builds(History, token_lists, counts, st.booleans(), sources.map(tuple))
scores = reals(-math.inf, 0, allow_nan=False)
logprobs = st.lists(
    st.builds(Logprobs, scores, st.lists(st.tuples(tokens, scores), max_size=4).map(tuple)),
    max_size=3,
).map(tuple)
events = st.builds(
    Event,
    request_id=texts.map(RequestId),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    logprobs=logprobs,
    prompt_logprobs=logprobs,
    finish=st.none() | st.sampled_from(FinishReason),
    error=st.just(""),
    cached_tokens=st.integers(0, 2**32 - 1),
    queue_s=st.just(0.0),  # a door knows its own
)


def sent(request: Request, history: History, now: float) -> pb.Submission:
    out = pb.Submission()
    write_submission(out, request, history, now)
    return pb.Submission.FromString(out.SerializeToString())


@given(requests, histories, reals(0, 1e6), reals(0, 1e6))
def test_every_field_of_a_request_survives(
    request: Request, history: History, here: float, there: float
) -> None:
    found, made = read_submission(sent(request, history, here), there, VOCAB)
    left = None if request.deadline is None else max(0.0, request.deadline - here)
    assert made == history
    assert found == replace(
        request,
        params=replace(request.params, seed=request.params.seed % 2**64),
        arrival=there,
        deadline=None if left is None else there + left,
    )


def test_a_field_that_is_new_is_not_forgotten() -> None:
    """Each that crosses is given another value than its default, by its kind."""
    grammar = Grammar(GrammarKind.REGEX, "a+", "")
    lists: dict[str, Any] = {
        "logit_bias": ((1, 2.5),),
        "stop_token_ids": (1,),
        "allowed_token_ids": (1, 2),
        "bad_token_ids": ((1,), (2, 3)),
        "grammar": grammar,
    }
    crossing = [f for f in fields(SamplingParams) if f.name not in DOORS_OWN]
    others: dict[str, Any] = {f.name: _other(f.default) for f in crossing}
    changed = SamplingParams(**(others | lists))
    scope = CacheScope("a", "b")
    request = Request(RequestId("é"), (1,), changed, 0.0, 5.0, scope, "c", "00-ab-cd-01")
    assert read_submission(sent(request, History(), 0.0), 0.0, VOCAB)[0] == request
    assert all(getattr(changed, f.name) != f.default for f in crossing)
    stays = replace(
        changed, stop=("x",), include_stop=True, skip_special_tokens=False, only_prompt=True
    )
    more = replace(request, params=stays)
    assert read_submission(sent(more, History(), 0.0), 0.0, VOCAB)[0] == request


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if value == ():
        return value
    return (value or 0) + (3 if isinstance(value, int | None) else 0.25)


@given(events, texts)
def test_every_field_of_an_event_survives(event: Event, error: str) -> None:
    if event.finish is not None:
        event = event._replace(error=error)
    out = pb.News()
    write_news(out, event)
    assert read_news(pb.News.FromString(out.SerializeToString())) == event


@given(st.lists(st.builds(ExpertUse, texts, counts, st.lists(counts, max_size=9).map(tuple))))
def test_uses_of_experts_survive(uses: list[ExpertUse]) -> None:
    assert [read_use(use) for use in write_uses(uses)] == uses


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_read_or_refused(content: bytes) -> None:
    """Nothing but our own error leaves the readers."""
    with contextlib.suppress(InvalidRequestError):
        for submission in parse(pb.ToRank, content).submit:
            read_submission(submission, 0.0, VOCAB)
    with contextlib.suppress(InvalidRequestError):
        for news in parse(pb.FromRank, content).news:
            read_news(news)


@given(st.binary(max_size=60), st.integers(0, 300), requests, histories)
def test_a_message_that_was_changed_on_the_way_is_read_or_refused(
    noise: bytes, start: int, request: Request, history: History
) -> None:
    content = sent(request, history, 0.0).SerializeToString()
    changed = content[:start] + noise + content[start + len(noise) :]
    try:
        found, _ = read_submission(parse(pb.Submission, changed), 0.0, VOCAB)
    except InvalidRequestError:
        return
    assert max((*found.prompt_ids, *found.params.stop_token_ids), default=0) < VOCAB
    assert math.isfinite(found.params.temperature) and found.params.temperature >= 0


SOUND = Request(RequestId("a"), (1, 2), SamplingParams())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.prompt.append(VOCAB), f"token {VOCAB}: the model has {VOCAB}"),
        (lambda s: s.outputs.append(2**32 - 1), "token 4294967295"),
        (lambda s: s.sampling.stop_token_ids.append(VOCAB), "token"),
        (lambda s: s.sampling.bias_ids.append(1), "0 finite numbers are needed for 1 tokens"),
        (lambda s: s.sampling.biases.append(1.0), "1 finite numbers are needed for 0 tokens"),
        (lambda s: setattr(s.sampling, "temperature", math.nan), "temperature=nan"),
        (lambda s: setattr(s.sampling, "temperature", -1.0), "temperature=-1.0"),
        (lambda s: setattr(s.sampling, "top_p", 0.0), "top_p=0.0"),
        (lambda s: setattr(s.sampling, "min_p", math.inf), "min_p=inf"),
        (lambda s: setattr(s.sampling, "repetition_penalty", 0.0), "repetition_penalty=0.0"),
        (lambda s: setattr(s.sampling, "repetition_penalty", 5e-324), "repetition_penalty=5e-324"),
        (lambda s: setattr(s.sampling, "presence_penalty", math.nan), "presence_penalty=nan"),
        (lambda s: setattr(s.sampling, "logprobs", 2**32 - 1), "logprobs=4294967295"),
        (lambda s: setattr(s.sampling, "prompt_logprobs", VOCAB + 1), "prompt_logprobs=50001"),
        (lambda s: s.sampling.allowed_token_ids.append(VOCAB), "token 50000"),
        (lambda s: s.sampling.bad_token_ids.add(ids=[1, VOCAB]), "token 50000"),
        (lambda s: s.sampling.bad_token_ids.add(), "bad_token_ids: a sequence without tokens"),
        (lambda s: setattr(s, "timeout_s", math.nan), "timeout_s=nan"),
        (lambda s: setattr(s, "timeout_s", -1.0), "timeout_s=-1.0"),
    ],
)
def test_numbers_that_a_step_cannot_compute_with_are_named(change: Any, words: str) -> None:
    submission = sent(SOUND, History(), 0.0)
    assert read_submission(submission, 0.0, VOCAB)[0] == SOUND
    change(submission)
    with pytest.raises(InvalidRequestError, match=words):
        read_submission(submission, 0.0, VOCAB)


def test_reasons_that_are_none_are_refused() -> None:
    for reason in FinishReason:
        assert read_ending(pb.Ending(id="a", reason=reason.value)) == ("a", reason)
    for words in ("", "because", "STOP", "x" * 1000):
        with pytest.raises(InvalidRequestError, match=r"is no reason to end a request"):
            read_ending(pb.Ending(id="a", reason=words))
    with pytest.raises(InvalidRequestError, match=r"'because' is no reason"):
        read_news(pb.News(id="a", finish="because"))
    with pytest.raises(InvalidRequestError, match=r"1 log-probabilities of 2 tokens"):
        read_news(pb.News(id="a", scores=[pb.Scores(top_ids=[1, 2], top=[0.0])]))
    with pytest.raises(InvalidRequestError, match=r"0 log-probabilities of 1 tokens"):
        read_news(pb.News(id="a", prompt_scores=[pb.Scores(top_ids=[1])]))


def test_values_without_a_place_in_a_message_are_an_error_of_the_writer() -> None:
    for wrong in (
        replace(SOUND, prompt_ids=(-1,)),
        replace(SOUND, prompt_ids=(2**32,)),
        replace(SOUND, id=RequestId("\ud800")),
        replace(SOUND, params=SamplingParams(max_tokens=-1)),
    ):
        with pytest.raises(ValueError):
            write_submission(pb.Submission(), wrong, History(), 0.0)
