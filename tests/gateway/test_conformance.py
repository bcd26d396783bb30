"""One table for both doors: the same request gets the same answer, or the same refusal, through
HTTP and gRPC, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

Asked = dict[str, Any]
Scores = tuple[tuple[float, dict[int, float]], ...]
IDS = [72, 101, 108, 108, 111]
ON: Asked = {"temperature": 0, "ignore_eos": True}
# Fields of the request itself in both doors' spelling; all others are of its sampling.
OF_REQUEST = (
    *("n", "request_id", "model", "cache_salt", "domain"),
    *("truncate_prompt_tokens", "resume_from_token", "priority"),
)


@dataclass(frozen=True)
class Sequence:
    """One sequence of an answer. Log-probabilities are rounded to what a float32 tells."""

    text: str
    token_ids: tuple[int, ...]
    finish: str
    prompt_scores: Scores = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a client gets; ``usage`` is of all sequences: prompt, completion."""

    sequences: tuple[Sequence, ...]
    usage: tuple[int, int]


@dataclass(frozen=True)
class Refusal:
    """``code`` is gRPC's name for it."""

    code: str
    param: str | None
    message: str


Outcome = Answer | Refusal
ANSWERED: list[tuple[str, Asked]] = [
    ("greedy", ON | {"max_tokens": 6}),
    ("default length", ON),
    ("seeded", {"max_tokens": 6, "seed": 5, "temperature": 1.3}),
    ("filtered", {"max_tokens": 6, "seed": 5, "top_k": 7, "top_p": 0.8, "min_p": 0.01}),
    ("penalised", ON | {"max_tokens": 8, "repetition_penalty": 1.5, "presence_penalty": 1}),
    ("frequencies", ON | {"max_tokens": 8, "frequency_penalty": 2}),
    ("biased", ON | {"max_tokens": 3, "logit_bias": {72: 100.0}}),
    ("several", {"max_tokens": 4, "n": 3, "seed": 9}),
    ("stopped", {"max_tokens": 60, "temperature": 0, "stop": ["e", "t"]}),
    ("stopped and kept", {"max_tokens": 60, "temperature": 0, "stop": ["e"], "include_stop": True}),
    ("stop tokens", {"max_tokens": 60, "temperature": 0, "stop_token_ids": list(range(64))}),
    ("at least", {"max_tokens": 8, "min_tokens": 8, "temperature": 0}),
    ("special tokens shown", ON | {"max_tokens": 12, "skip_special_tokens": False}),
    ("logprobs", ON | {"max_tokens": 4, "logprobs": 2}),
    ("prompt logprobs", ON | {"max_tokens": 2, "prompt_logprobs": 3}),
    ("prompt logprobs alone", {"max_tokens": 0, "prompt_logprobs": 0}),
    ("allowed", ON | {"max_tokens": 6, "allowed_token_ids": [65, 66, 67]}),
    ("bad words", ON | {"max_tokens": 6, "bad_words": ["e", "th"]}),
    ("formed", {"max_tokens": 9, "temperature": 0, "grammar": {"regex": "[ab]{4}"}}),
    ("cut", ON | {"max_tokens": 4, "truncate_prompt_tokens": 2}),
    ("cut to fit", ON | {"max_tokens": 510, "truncate_prompt_tokens": -1}),
    ("resumed", ON | {"max_tokens": 8, "resume_from_token": 3}),
    ("named", ON | {"max_tokens": 1, "request_id": "mine", "cache_salt": "s", "domain": "d"}),
    ("urgent", ON | {"max_tokens": 1, "priority": -(2**31)}),
]
# All that a regular expression of "e" can begin with.
BAD = ["e", "ee", "eee"]
REFUSED: list[tuple[str, Asked]] = [
    ("unknown model", {"model": "other"}),
    ("temperature", {"temperature": 2.5}),
    ("top_p", {"top_p": 0.0}),
    ("min_p", {"min_p": 1.5}),
    ("n", {"n": 17}),
    ("no answer at all", {"max_tokens": 0}),
    ("too long an answer", {"max_tokens": 513}),
    ("too long together", {"max_tokens": 510}),
    ("at least more than at most", {"max_tokens": 2, "min_tokens": 3}),
    ("logprobs", {"logprobs": 21}),
    ("prompt logprobs", {"prompt_logprobs": 21}),
    ("stop", {"stop": ["x" * 257]}),
    ("stop tokens", {"stop_token_ids": [320]}),
    ("bias", {"logit_bias": {1: 101.0}}),
    ("allowed", {"allowed_token_ids": [320]}),
    ("nothing left", {"allowed_token_ids": [68], "bad_words": ["e"]}),
    ("bad words", {"bad_words": [" "]}),
    (
        "bad words that a grammar needs",
        {"max_tokens": 6, "grammar": {"regex": "e{3}"}, "bad_words": BAD, "request_id": "mine"},
    ),
    ("cut", {"truncate_prompt_tokens": 0}),
    ("salt", {"cache_salt": "s" * 129}),
    ("domain", {"domain": "d" * 65}),
    ("name", {"request_id": "a b"}),
]


def rounded(value: float) -> float:
    """Both doors send what they have: one as float32, one in decimals."""
    return float(f"{value:.5g}")


def by_grpc(house: House, asked: Asked, streamed: bool) -> Outcome:
    of_request = {name: asked[name] for name in OF_REQUEST if name in asked}
    sampling = {name: value for name, value in asked.items() if name not in of_request}
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=IDS), sampling=pb.SamplingParams(**sampling), **of_request
    )
    try:
        if not streamed:
            outputs = list(house.stub.GenerateUnary(request, timeout=60).outputs)
        else:
            outputs = collected(house.stub.Generate(request, timeout=60))
    except grpc.RpcError as error:
        return grpc_refusal(error)
    answered = sum(o.usage.completion_tokens for o in outputs)
    return Answer(tuple(map(grpc_sequence, outputs)), (outputs[0].usage.prompt_tokens, answered))


def collected(chunks: Iterable[Any]) -> list[Any]:
    outputs: dict[int, Any] = {}
    for chunk in chunks:
        output = outputs.setdefault(chunk.index, pb.Output(index=chunk.index))
        output.text += chunk.text_delta
        output.token_ids.extend(chunk.token_ids)
        output.logprobs.extend(chunk.logprobs)
        output.prompt_logprobs.extend(chunk.prompt_logprobs)
        if chunk.finish_reason:
            output.finish_reason = chunk.finish_reason
            output.usage.CopyFrom(chunk.usage)
    return [outputs[index] for index in sorted(outputs)]


def grpc_sequence(output: Any) -> Sequence:
    scores = tuple(
        (
            rounded(found.chosen.logprob),
            {t.token_id: rounded(t.logprob) for t in (*found.top, found.chosen)},
        )
        for found in output.prompt_logprobs
    )
    finish = pb.FinishReason.Name(output.finish_reason).removeprefix("FINISH_REASON_").lower()
    logprobs = tuple(rounded(found.chosen.logprob) for found in output.logprobs)
    return Sequence(output.text, tuple(output.token_ids), finish, scores, logprobs)


def grpc_refusal(error: Any) -> Refusal:
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == error.code().name
    return Refusal(error.code().name, info.metadata.get("param"), error.details())


def by_http(house: House, asked: Asked, streamed: bool) -> Outcome:
    body = {"prompt": IDS, "return_token_ids": True} | asked
    if "include_stop" in body:
        body["include_stop_str_in_output"] = body.pop("include_stop")
    if "grammar" in body:
        body["structured_outputs"] = body.pop("grammar")
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = house.http.post("/v1/completions", json=body)
    if answer.status_code != 200:
        error = answer.json()["error"]
        names = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}
        return Refusal(names[answer.status_code], error["param"], error["message"])
    found = joined(answer.text) if streamed else answer.json()
    usage = found["usage"]
    return Answer(
        tuple(map(http_sequence, found["choices"])),
        (usage["prompt_tokens"], usage["completion_tokens"]),
    )


def joined(text: str) -> Any:
    """A stream as if it were a whole answer."""
    lines = [line[6:] for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    *parts, last = map(json.loads, lines[:-1])
    choices: dict[int, Any] = {}
    for part in parts:
        (new,) = part["choices"]
        choice = choices.setdefault(new["index"], {"text": "", "token_ids": [], "logprobs": None})
        choice["text"] += new["text"]
        choice["token_ids"] += new["token_ids"]
        choice["finish_reason"] = new["finish_reason"]
        if new["logprobs"] is not None:
            choice["logprobs"] = choice["logprobs"] or {"token_logprobs": []}
            choice["logprobs"]["token_logprobs"] += new["logprobs"]["token_logprobs"]
    return {"choices": [choices[i] for i in sorted(choices)], "usage": last["usage"]}


def http_sequence(choice: Any) -> Sequence:
    first, *others = choice.get("prompt_logprobs") or [None]
    assert first is None, "the first token has nothing before it"
    scores = []
    for token, entry in zip(IDS[1:], others, strict=False):
        tops = {int(other): rounded(found["logprob"]) for other, found in entry.items()}
        scores.append((tops[token], tops))
    logprobs = (choice["logprobs"] or {}).get("token_logprobs", [])
    return Sequence(
        choice["text"],
        tuple(choice["token_ids"]),
        choice["finish_reason"],
        tuple(scores),
        tuple(map(rounded, logprobs)),
    )


Door = Callable[["House", Asked, bool], Outcome]
WAYS: list[tuple[Door, bool]] = [(by_grpc, False), (by_grpc, True), (by_http, False)]


def outcomes(house: House, asked: Asked) -> list[Outcome]:
    """Through every way there is; HTTP streams no log-probabilities of prompts."""
    ways = WAYS if "prompt_logprobs" in asked else [*WAYS, (by_http, True)]
    return [door(house, asked, streamed) for door, streamed in ways]


@pytest.mark.parametrize("asked", [a for _, a in ANSWERED], ids=[name for name, _ in ANSWERED])
def test_the_same_answer_comes_through_every_way(house: House, asked: Asked) -> None:
    first, *others = outcomes(house, asked)
    assert isinstance(first, Answer), first
    assert len(first.sequences) == asked.get("n", 1)
    for other in others:
        assert other == first


@pytest.mark.parametrize("asked", [a for _, a in REFUSED], ids=[name for name, _ in REFUSED])
def test_the_same_refusal_comes_through_every_way(house: House, asked: Asked) -> None:
    first, *others = outcomes(house, asked)
    assert isinstance(first, Refusal), first
    for other in others:
        assert other == first


def test_the_table_has_every_field_of_a_request() -> None:
    sampling = {f.name for f in pb.SamplingParams.DESCRIPTOR.fields}
    request = {f.name for f in pb.GenerateRequest.DESCRIPTOR.fields}
    tried = {name for _, asked in ANSWERED for name in asked}
    assert sampling | request - {"text", "token_ids", "sampling", "model"} == tried
